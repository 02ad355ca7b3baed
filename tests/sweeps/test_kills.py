"""One sweep on a cluster, killed at random moments until it has ended; somebody else beside it.

Nothing is lost, nothing is paid twice, and what came of it is what would have come of it in peace.
``DP_SWEEPS_KILLS`` says how often (default 4; 25 take some minutes), and ``DP_SWEEPS_KILLS_SEED``
which moments.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from sweeps.database.tables import checkpoints, reading, trials, writing
from sweeps.home import Home
from tests.sweeps.whole_cluster import cluster, customer, kill_all
from tests.sweeps.whole_sweep import (
    BINARY,
    DEADLINE_SECS,
    attempts_at,
    branch_rows,
    charges,
    environment_of_users,
    rows_of,
    wait_for,
    worker_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("DP_SWEEPS_KILLS", "4"))
SEED = int(os.environ.get("DP_SWEEPS_KILLS_SEED", "1"))
VICTIMS = ("driver", "worker", "accountant", "ray")
BUDGET = "scans"
EPSILON = 200.0
SPEC = {
    "version": 1,
    "name": "kills",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {
        "policy": "open",
        "target_epsilon": EPSILON,
        "target_delta": 1e-5,
        "budget": BUDGET,
    },
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": {"grid_search": [8.0, 2.0, 0.5, 1e-6]},
        "expected_batch_size": {"grid_search": [64, 128]},
        "iterations": 600 * KILLS,
        "noise_multiplier": 4.0,
        "l2_clip_norm": 1.0,
    },
    "scheduler": {
        "name": "async_hyperband",
        "grace_period": 150 * KILLS,
        "reduction_factor": 2,
    },
    "report_every_steps": 50,
    "seed": 12345,
    "resources": {"max_concurrent_trials": 2},
}


class Place:
    """The home, the commands that are given there, and what they leave."""

    def __init__(self, path):
        self.home = Home.from_environment({"DP_SWEEPS_HOME": str(path)})
        self.store = open_store(self.home)
        self.environment = {"DP_SWEEPS_HOME": str(path), "PYTHONPATH": str(ROOT)}

    def command(self, *arguments):
        done = subprocess.run(
            [str(BINARY), *arguments],
            env={**environment_of_users(), **self.environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECS,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
        return done.stdout

    @property
    def sweep(self):
        return self.store.sweeps()[0]

    @property
    def is_over(self):
        return self.sweep.state != "RUNNING"

    def wait_for_a_charge(self):
        """Waits until any trial has been charged for more, or the sweep has ended."""
        before = sum(charges(self.store).values())
        wait_for(lambda: self.is_over or sum(charges(self.store).values()) > before)

    def process(self, victim, rng):
        """The process id of a driver, a worker or the accountant; None if there is none."""
        with contextlib.suppress(ValueError, IndexError, FileNotFoundError):
            if victim == "driver":
                return int(self.sweep.driver.rpartition(":")[2])
            if victim == "accountant":
                return int((self.home.path / "accountant.pid").read_text())
            now = [row for row in rows_of(self.store) if row.state == TrialState.RUNNING]
            return worker_of(self.store, rng.choice(now).trial_id)
        return None

    @contextlib.contextmanager
    def secrets_kept(self, folder):
        """Keeps a copy of every root of noise, which a trial's end removes."""
        over = threading.Event()

        def keep():
            while not over.wait(0.05):
                for path in self.home.secrets_dir.glob("*"):
                    with contextlib.suppress(OSError):  # it has just ended
                        if not (folder / path.name).exists():
                            shutil.copy2(path, folder)

        folder.mkdir()
        thread = threading.Thread(target=keep)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def survive(place, rng):
    """Runs the sweep under fire; gives who was killed, and what the customer was told."""
    killed, said = [], []
    order = [victim for _ in range(KILLS) for victim in rng.sample(VICTIMS, len(VICTIMS))]
    start = ["run", str(place.home.path / "spec.yaml")]
    while not killed or not place.is_over:
        with (
            cluster(2) as (ray, address),
            customer(address, BUDGET, place.environment, said),
        ):
            place.command(*start, "--address", address, "--detach")
            while not place.is_over and len(killed) < KILLS:
                place.wait_for_a_charge()
                time.sleep(2 * rng.random())  # to be anywhere between that charge and later ones
                killed.append(order[len(killed)])
                if killed[-1] == "ray":
                    kill_all(ray)
                    break
                if pid := place.process(killed[-1], rng):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            else:
                wait_for(lambda: place.is_over)
        wait_for(lambda: not place.store.is_driven(place.sweep.sweep_id))
        start = ["resume"]
    return killed, said


def test_a_sweep_survives_whatever_is_killed(tmp_path):
    place = Place(tmp_path / "home")
    spec = place.home.path / "spec.yaml"
    spec.write_text(json.dumps(SPEC))
    place.command("budget", "create", BUDGET, "--from", str(spec))
    with place.secrets_kept(tmp_path / "secrets"):
        killed, said = survive(place, random.Random(SEED))
    rows = rows_of(place.store)
    assert place.sweep.state == "COMPLETED", killed
    assert {row.state for row in rows} <= {"COMPLETED", "PRUNED"}, killed
    # Every step of every trial was paid once, however often it was taken.
    assert len(branch_rows(place.store)) == len(rows), killed
    furthest = {row.trial_id: 0 for row in rows}
    for row in place.store.reports(place.sweep.sweep_id):
        furthest[row.trial_id] = max(furthest[row.trial_id], row.step)
    assert charges(place.store) == furthest, killed
    found = json.loads(place.command("verify", "--json"))
    assert found["ok"], (killed, found)
    assert found["mlflow_checked"]
    assert_paid_once(place, rows, said)
    assert_as_in_peace(place, tmp_path)


def assert_paid_once(place, rows, said):
    """The budget has paid for the sweep and for the customer, and for nobody else."""
    ledger = place.store.ledger
    told = {line.split()[1] for line in said if line.startswith("paid") and line.count(" ") == 1}
    assert told
    for name in told:
        paid = ledger.reservation(name)
        assert (paid.state, paid.charged) == ("closed", 5)
    paid = {name: ledger.reservation(name).charged for name in ledger.reservation_ids(BUDGET)}
    ours = {row.trial_id: row.charged_iterations for row in rows}
    assert {name: charged for name, charged in paid.items() if name in ours} == ours
    others = {name: charged for name, charged in paid.items() if name not in ours}
    assert all(name.startswith("other-") for name in others)
    # What was on its way when its customer died is paid or not, and no more than that.
    assert set(others.values()) <= {0, 5}


def assert_as_in_peace(place, tmp_path):
    """A trial that came to its end gives, on its noise and in one go, the same to the bit."""
    copy = tmp_path / "peace"
    shutil.copytree(place.home.path, copy, symlinks=True)
    shutil.rmtree(copy / "secrets", ignore_errors=True)
    shutil.copytree(tmp_path / "secrets", copy / "secrets")
    shutil.rmtree(copy / "sweeps")
    calm = Place(copy)
    row = next(row for row in rows_of(place.store) if row.state == TrialState.COMPLETED)
    with writing(calm.store.ledger.engine) as connection:
        connection.execute(checkpoints.delete())
        connection.execute(
            trials.update().where(trials.c.trial_id == row.trial_id).values(state="ADMITTED")
        )
    calm.command("resume")
    assert attempts_at(calm.store, row.trial_id)[-1].charged_before == row.charged_iterations
    assert branch_rows(calm.store) == branch_rows(place.store), "it repeated its steps"
    assert last_checkpoint(calm, row.trial_id) == last_checkpoint(place, row.trial_id)


def last_checkpoint(place, trial_id):
    from tests.trainer.killed_trial import arrays

    newest = sa.select(checkpoints.c.location).filter_by(trial_id=trial_id)
    with reading(place.store.ledger.engine) as connection:
        location = connection.scalars(newest.order_by(checkpoints.c.step.desc())).first()
    assert location is not None
    return arrays(Path(location))
