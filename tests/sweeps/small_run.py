"""A sweep of one tiny trial, and a worker of it that is a process of its own.

    python -m tests.sweeps.small_run kill|freeze STEP

runs the trial in the home that the environment names. When the charge of STEP is durable, it kills
itself as `kill -9` would; or it stops as on a machine that hangs, and goes on once it is woken.
"""

import os
import signal
import sys
from pathlib import Path

import sqlalchemy as sa

from accounting import BudgetTerms
from sweeps.database.admitting import NewTrial
from sweeps.database.attempts import Attempt, Attempts
from sweeps.database.store import NewSweep, Store, open_store
from sweeps.database.tables import checkpoints, reading
from sweeps.home import Home
from sweeps.worker import TrialRun
from tests.trainer.killed_trial import CONFIG, arrays
from trainer.mechanism.branch import Branch
from trainer.reporting import TrialReport
from trainer.training.plan import mechanism_of

SWEEP = "s-1"
TRIAL = "s-1-0000"
STEPS = CONFIG.iterations
EVERY = CONFIG.report_every_steps


def submit(store: Store) -> None:
    """Records the sweep, with room for several branches."""
    mechanism = mechanism_of(CONFIG)
    trial = NewTrial(
        trial_id=TRIAL,
        number=0,
        mechanism=mechanism,
        reason="",
        config={},
        trial_config=CONFIG,
        planned_iterations=mechanism.iterations,
        planned_epsilon=1.0,
    )
    sweep = NewSweep(
        sweep_id=SWEEP,
        name="s",
        spec={
            "privacy": {
                "policy": "per_trial",
                "target_epsilon": 50.0,
                "target_delta": CONFIG.target_delta,
                "accountant": CONFIG.accountant,
            }
        },
        spec_hash="hash",
        dataset="digits:1.0.0",
        dataset_fingerprint="print",
        terms=BudgetTerms(epsilon=50.0, delta=CONFIG.target_delta, policy="per_trial"),
    )
    store.create_sweep(sweep, [trial])


def run_on(store: Store, home: Home) -> list[TrialReport]:
    """Takes the trial up and runs it for as long as it may; gives its reports."""
    reports: list[TrialReport] = []
    with TrialRun(store, home, TRIAL) as run:
        while (report := run.next_report()) is not None:
            reports.append(report)
            if report.outcome != "running":
                break
    return reports


def last_checkpoint(store: Store) -> dict[str, bytes]:
    """Everything that the newest recorded checkpoint holds, by name."""
    query = sa.select(checkpoints.c.location).order_by(checkpoints.c.step.desc()).limit(1)
    with reading(store.ledger.engine) as connection:
        location = connection.scalars(query).one()
    return arrays(Path(location))


def _main(how: str, stop_at: int) -> None:
    signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
    charge = Attempts.charge

    def charge_and_stop(self: Attempts, attempt: Attempt, branch: Branch, step: int) -> int:
        total = charge(self, attempt, branch, step)
        if step == stop_at:
            os.kill(os.getpid(), signals[how])
        return total

    Attempts.charge = charge_and_stop
    home = Home.from_environment()
    store = open_store(home)
    reports = run_on(store, home)
    sys.stdout.write(f"{[report.step for report in reports]}\n")


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
