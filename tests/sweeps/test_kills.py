"""One sweep, killed at random moments until it has ended: nothing is lost, nothing is paid twice.

``DP_SWEEPS_KILLS`` says how often (default 3; 25 take some minutes), and ``DP_SWEEPS_KILLS_SEED``
which moments.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweeps.database.states import TrialState
from tests.sweeps.whole_sweep import (
    DEADLINE_SECS,
    attempts_at,
    branch_rows,
    charges,
    rows_of,
    running,
    store_of_when_there,
    wait_for,
    worker_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

KILLS = int(os.environ.get("DP_SWEEPS_KILLS", "3"))
SEED = int(os.environ.get("DP_SWEEPS_KILLS_SEED", "1"))
SPEC = {
    "version": 1,
    "name": "kills",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {"policy": "open", "target_epsilon": 200.0, "target_delta": 1e-5},
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


def wait_for_a_charge(process, store):
    """Waits until any trial has been charged for more, or the sweep has ended."""
    before = sum(charges(store).values())
    wait_for(lambda: process.poll() is not None or sum(charges(store).values()) > before)


def kill(process, store, rng):
    """Kills a worker, the driver alone, or all of it; says which."""
    victims = ["driver", "everything"]
    running_now = [row for row in rows_of(store) if row.state == TrialState.RUNNING]
    with_worker = [row for row in running_now if attempts_at(store, row.trial_id)]
    if with_worker:
        victims.append("worker")
    victim = rng.choice(victims)
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        if victim == "worker":
            os.kill(worker_of(store, rng.choice(with_worker).trial_id), signal.SIGKILL)
        elif victim == "driver":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    return victim


def verified(folder):
    """What `dp-sweeps verify` says of the newest sweep."""
    binary = Path(sys.executable).with_name("dp-sweeps")
    env = {**os.environ, "DP_SWEEPS_HOME": str(folder / "home")}
    done = subprocess.run(
        [str(binary), "verify", "--json"],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
        check=False,
    )
    return json.loads(done.stdout)


def test_a_sweep_survives_whatever_is_killed(tmp_path):
    rng = random.Random(SEED)
    killed, spec, store = [], SPEC, None
    while len(killed) < KILLS:
        with running(tmp_path, spec) as process:
            spec = None  # from now on it is resumed
            store = store or store_of_when_there(tmp_path)[0]
            while process.poll() is None and len(killed) < KILLS:
                wait_for_a_charge(process, store)
                time.sleep(rng.random())  # to be anywhere between that charge and later ones
                killed.append(kill(process, store, rng))
                if killed[-1] != "worker":
                    process.communicate(timeout=DEADLINE_SECS)
            if process.poll() is None:
                _, err = process.communicate(timeout=DEADLINE_SECS)
                assert process.returncode == 0, err
    assert store is not None
    if store.sweeps()[0].state == "RUNNING":
        with running(tmp_path, None) as process:
            _, err = process.communicate(timeout=DEADLINE_SECS)
        assert process.returncode == 0, err
    rows = rows_of(store)
    assert {row.state for row in rows} <= {"COMPLETED", "PRUNED"}, killed
    # Every step of every trial was paid once, however often it was taken.
    assert len(branch_rows(store)) == len(rows), killed
    furthest = {row.trial_id: 0 for row in rows}
    for row in store.reports(rows[0].sweep_id):
        furthest[row.trial_id] = max(furthest[row.trial_id], row.step)
    assert charges(store) == furthest, killed
    found = verified(tmp_path)
    assert found["ok"], (killed, found)
