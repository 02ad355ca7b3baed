"""The shared accountant on a real Ray, whose process is killed for real."""

import os
import signal
from pathlib import Path
from typing import cast

import pytest
import ray

from accounting import BudgetExceeded, DpSgdMechanism, InvalidPrivacyParameter, Ledger
from cluster import ClusterError, Shared, connect
from cluster.shared import process_of
from sweeps.accountant import METHODS, shared_ledger
from sweeps.database.tables import open_ledger
from sweeps.home import Home

MECHANISM = DpSgdMechanism(
    noise_multiplier=2.0, sampling_prob=0.01, iterations=1000, neighboring_relation="zero_out"
)
BUDGET = {
    "dataset": "scans",
    "dataset_fingerprint": "v1",
    "epsilon": 2.0,
    "delta": 1e-5,
    "policy": "open",
}


def test_what_is_shared_is_the_ledgers_own():
    own = {name for name in vars(Ledger) if not name.startswith("_")}
    assert set(METHODS) < own
    assert not {"transaction", "engine", "entries"} & set(METHODS)


def test_without_ray_it_says_so():
    with pytest.raises(ClusterError, match="Ray is not connected"):
        shared_ledger()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_serves_the_cluster_dies_and_comes_back_with_nothing_lost():
    home = Home.from_environment()
    environment = {"DP_SWEEPS_HOME": str(home.path)}
    with connect(num_cpus=2, env_vars={**environment, "PYTHONPATH": str(Path.cwd())}):
        ledger = shared_ledger()
        ledger.create_budget("b", **BUDGET)
        first = ledger.reserve("b", MECHANISM, request_id="t-0")
        process = process_of(cast("Shared", ledger))
        assert process != os.getpid()

        def work(ledger: Ledger, number: int) -> int:
            name = f"t-{number}"
            ledger.reserve("b", MECHANISM, request_id=name)
            return ledger.charge(name, 10 * number).charged

        # Workers go on while the accountant is killed under them.
        remote = ray.remote(num_cpus=0.5)(work)
        answers = [remote.remote(ledger, number) for number in range(1, 5)]
        os.kill(process, signal.SIGKILL)
        assert ray.get(answers) == [10, 20, 30, 40]
        assert process_of(cast("Shared", ledger)) != process

        assert ledger.reserve("b", MECHANISM, request_id="t-0") == first
        with pytest.raises(InvalidPrivacyParameter, match="iterations"):
            ledger.charge("t-0", -1)
        for number in range(5, 5 + ledger.account("b").copies_that_fit(MECHANISM)):
            ledger.reserve("b", MECHANISM, request_id=f"t-{number}")
        with pytest.raises(BudgetExceeded) as refused:
            ledger.reserve("b", MECHANISM, request_id="one-more")
        error = refused.value
        assert error.spent + error.reserved + error.requested > error.limit
        with pytest.raises(AttributeError):
            ledger.transaction()

        ray.kill(ray.get_actor("dp-sweeps-accountant"), no_restart=True)
        assert ledger.settle("t-1").charged == 10  # another takes its place
        shared = ledger.status("b").to_json()
    with_no_ray = open_ledger(home)
    assert with_no_ray.status("b").to_json() == shared
    assert with_no_ray.verify().ok
    with_no_ray.close()
