"""A sweep of four trials of one shape, and a worker of them that is a process of its own.

    python -m tests.sweeps.packed_sweep SWEEP STEP

runs them in the home that the environment names, and kills itself as `kill -9` would when a second
trial's charge of STEP is durable.
"""

import os
import signal
import sys

import yaml

from sweeps.database.attempts import Attempt, Attempts
from sweeps.database.store import Store, open_store
from sweeps.home import HOME_VARIABLE, Home
from sweeps.pack_run import PackRun
from sweeps.service import make_plan, record
from trainer.mechanism.branch import Branch

WIDTH = 4
SPEC = {
    "version": 1,
    "name": "packed",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {
        "policy": "per_trial",
        "target_epsilon": 50.0,
        "target_delta": 1e-5,
        "accountant": "rdp",
    },
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": {"grid_search": [0.5, 1.0, 2.0, 4.0]},
        "expected_batch_size": 64,
        "iterations": 12,
        "noise_multiplier": 2.0,
        "l2_clip_norm": 1.0,
    },
    "report_every_steps": 4,
    "resources": {"max_concurrent_trials": 1, "trials_per_worker": WIDTH},
}


def recorded(path, **changes):
    """A new sweep in a home: the home, the database, and the sweep's id."""
    home = Home.from_environment({HOME_VARIABLE: str(path)})
    home.create()
    spec = home.path / "spec.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, **changes}))
    plan = make_plan(spec, home)
    store = open_store(home)
    return home, store, record(plan, store)


def pack_of(store: Store, home: Home, sweep_id: str, width: int = WIDTH) -> PackRun:
    """All trials of a sweep that may run, in one worker."""
    return PackRun(store, home, [row.trial_id for row in store.runnable(sweep_id)], width)


def run_on(store: Store, home: Home, sweep_id: str, width: int = WIDTH) -> None:
    """Runs them for as long as they may."""
    run = pack_of(store, home, sweep_id, width)
    while not run.is_over:
        run.next_reports()


def _main(sweep_id: str, stop_at: int) -> None:
    charge, charged = Attempts.charge, set()

    def charge_and_stop(self: Attempts, attempt: Attempt, branch: Branch, step: int) -> int:
        total = charge(self, attempt, branch, step)
        if step == stop_at:
            charged.add(attempt.trial_id)
            if len(charged) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return total

    Attempts.charge = charge_and_stop
    home = Home.from_environment()
    run_on(open_store(home), home, sweep_id)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
