"""A sweep of a few small trials, and looks at what the database holds of it."""

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from accounting import BudgetTerms, DpSgdMechanism
from accounting.policies import Policy
from accounting.renyi import epsilon_of_rdp, step_rdp
from sweeps.database.admitting import NewTrial
from sweeps.database.attempts import Attempt
from sweeps.database.states import TrialState
from sweeps.database.store import NewSweep, Store
from sweeps.database.tables import reading
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import MechanismConfig
from trainer.mechanism.branch import Branch
from trainer.training.plan import mechanism_of

ROOT = Path(__file__).parents[3]
METRICS = {"epsilon": 0.5, "eval_accuracy": 0.75, "eval_loss": 1.25}
SWEEP = "s-1"
TRIAL = "s-1-000"
PLAN = 100
MECHANISM = DpSgdMechanism(
    noise_multiplier=2.0, sampling_prob=0.1, iterations=PLAN, neighboring_relation="zero_out"
)
ORDER = 8.0
"""Of the filter of a budget under `open`."""
# Epsilons of budgets. A full trial's plan needs 2.34 and 0.35 of banded noise, a step more 2.35;
# twice the plan needs 3.36.
TIGHT = 2.34
TIGHT_BANDED = 0.35
ROOMY = 5.0
PROCESS_SECS = 60


def a_sweep(*, epsilon: float = 3.0, policy: Policy = "per_trial") -> NewSweep:
    return NewSweep(
        sweep_id=SWEEP,
        name="s",
        spec={"privacy": privacy_of(policy)},
        spec_hash="hash",
        dataset="digits:1.0.0",
        dataset_fingerprint="print",
        terms=BudgetTerms(epsilon=epsilon, delta=1e-5, policy=policy),
    )


def sweep_holding(trials: float, policy: Policy = "open") -> NewSweep:
    """A sweep whose budget holds so many trials under `open`, and the same epsilon otherwise."""
    rdp = trials * PLAN * step_rdp(MECHANISM.step, ORDER)
    terms = BudgetTerms(
        epsilon=epsilon_of_rdp(rdp, 1e-5, ORDER),
        delta=1e-5,
        policy=policy,
        rdp_order=ORDER if policy == "open" else None,
    )
    return dataclasses.replace(a_sweep(policy=policy), terms=terms)


def privacy_of(policy: Policy = "per_trial") -> dict[str, Any]:
    """The privacy section of a specification that leaves every decision to the budget."""
    return {
        "policy": policy,
        "target_epsilon": 1000.0,
        "target_delta": 1e-5,
        "accountant": "pld",
    }


def a_trial(number: int, state: TrialState = TrialState.ADMITTED) -> NewTrial:
    """A trial without anything for the trainer."""
    rejected = state is TrialState.REJECTED
    return NewTrial(
        trial_id=f"{SWEEP}-{number:03}",
        number=number,
        mechanism=None if rejected else MECHANISM,
        reason="needs 9.1, allowed is 3" if rejected else "",
        config={"learning_rate": 0.5},
        trial_config=None,
        planned_iterations=PLAN,
        planned_epsilon=float("inf") if rejected else 2.5,
    )


def a_full_trial(number: int, *, bands: int = 1) -> NewTrial:
    """A trial that the trainer could run."""
    config = TrialConfig(
        noise_multiplier=4.0 if bands > 1 else 2.0,
        sampling_prob=0.1,
        iterations=PLAN,
        data=DataConfig(name="digits"),
        model=ModelConfig(name="logistic_regression"),
        optimizer="sgd",
        learning_rate=1.0,
        l2_clip_norm=1.0,
        expected_batch_size=64.0,
        report_every_steps=10,
        target_delta=1e-5,
        mechanism=MechanismConfig(bands=bands),
    )
    return dataclasses.replace(
        a_trial(number), mechanism=mechanism_of(config), trial_config=config
    )


def a_branch(number: int = 1, start_step: int = 0) -> Branch:
    """One lineage of noise, told from others by its number."""
    return Branch(f"{number:016x}", start_step)


FIRST = a_branch()


def run_to(
    store: Store,
    step: int,
    trial_id: str = TRIAL,
    *,
    accuracy: float = 0.75,
    branch: Branch = FIRST,
) -> Attempt:
    """Begins to run a trial, and charges and reports a step of it."""
    attempt = store.attempts.begin(trial_id)
    go_to(store, attempt, step, accuracy=accuracy, branch=branch)
    return attempt


def go_to(
    store: Store,
    attempt: Attempt,
    step: int,
    *,
    accuracy: float = 0.75,
    branch: Branch = FIRST,
    end: TrialState | None = None,
) -> None:
    """Charges and reports a step."""
    store.attempts.charge(attempt, branch, step)
    metrics = {**METRICS, "eval_accuracy": accuracy}
    store.attempts.report(attempt, branch.branch_id, step, metrics, end=end)


def row_of(store: Store, trial_id: str = TRIAL) -> sa.Row[Any]:
    row = store.trial(trial_id)
    assert row is not None
    return row


def charged(store: Store, trial_id: str = TRIAL) -> int:
    return row_of(store, trial_id).charged_iterations


def state_of(store: Store, trial_id: str = TRIAL) -> str:
    return row_of(store, trial_id).state


def ledger_charge(store: Store, trial_id: str = TRIAL) -> int:
    return store.ledger.reservation(trial_id).charged


def kinds(store: Store) -> list[tuple[str, str | None]]:
    return [(message.kind, message.trial_id) for message in store.outbox.undelivered()]


def everything(engine: sa.Engine) -> dict[str, list[Any]]:
    """All rows of all tables."""
    metadata = sa.MetaData()
    with reading(engine) as connection:
        metadata.reflect(connection)
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        }


def ends_of_attempts(store: Store, trial_id: str = TRIAL) -> list[str | None]:
    """How each attempt at a trial ended, in order."""
    query = sa.text('SELECT "end" FROM attempts WHERE trial_id = :id ORDER BY number')
    with reading(store.ledger.engine) as connection:
        return list(connection.scalars(query, {"id": trial_id}))


def sum_over_branches(store: Store) -> int:
    query = "SELECT coalesce(sum(charged_step - start_step), 0) FROM branches"
    with reading(store.ledger.engine) as connection:
        return int(connection.exec_driver_sql(query).scalar_one())


def run_together(jobs: Sequence[threading.Thread]) -> None:
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(PROCESS_SECS)
        assert not job.is_alive()


def child(environment: dict[str, str], code: str) -> "subprocess.Popen[str]":
    """A process of its own on the same database."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()
