"""Sweeps whose trials can be forked, with training made up or real."""

from typing import Any

import yaml

from accounting import Ledger
from sweeps.database.states import TrialState
from sweeps.database.store import Store, open_store
from sweeps.home import CHECKPOINTS_VARIABLE, HOME_VARIABLE, Home
from sweeps.service import make_plan, record
from trainer.mechanism.branch import Branch

MEASURED = {"epsilon": 0.5, "eval_accuracy": 0.5, "eval_loss": 1.0}
SPEC = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {
        "policy": "per_trial",
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "accountant": "rdp",
    },
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": {"grid_search": [1.0, 2.0]},
        "expected_batch_size": 32,
        "iterations": 20,
        "noise_multiplier": 2.0,
        "l2_clip_norm": 1.0,
    },
    "report_every_steps": 5,
}
OPEN = {"policy": "open", "target_epsilon": 4.0}


def home_at(path, checkpoints_url=""):
    return Home.from_environment({HOME_VARIABLE: str(path), CHECKPOINTS_VARIABLE: checkpoints_url})


def submitted(home, *, privacy=None, **changes):
    """A store with a new sweep in it, and the ids of its trials."""
    spec = {**SPEC, **changes, "privacy": {**SPEC["privacy"], **(privacy or {})}}
    home.create()
    path = home.path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    plan = make_plan(path, home)
    store = open_store(home)
    sweep_id = record(plan, store)
    return store, [row.trial_id for row in store.trials(sweep_id)]


def branch(number, start_step=0):
    return Branch(f"{number:016x}", start_step)


def pretend(store: Store, trial_id, *steps, state: TrialState | None = TrialState.PRUNED):
    """Makes up that a trial reported at some steps, with a checkpoint each, and ended."""
    attempt = store.attempts.begin(trial_id)
    for step in steps:
        store.attempts.charge(attempt, branch(1), step)
        store.attempts.report(attempt, branch(1).branch_id, step, MEASURED)
        store.attempts.checkpoint(attempt, step, f"/nowhere/{step}")
    if state is not None:
        store.end_trial(trial_id, state)
    return attempt


def row_of(store: Store, trial_id: str) -> Any:
    """A trial's row, which is there."""
    row = store.trial(trial_id)
    assert row is not None
    return row


def paid_for(store: Store, trial_id: str) -> Any:
    """A trial's reservation."""
    return store.ledger.reservation(trial_id)


def journal(store: Store):
    """Kind and facts of every entry, oldest first."""
    ledger: Ledger = store.ledger
    return [(entry.kind, entry.facts) for entry, _ in ledger.entries()]
