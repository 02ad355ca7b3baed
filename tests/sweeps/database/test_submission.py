"""A sweep is recorded whole, with the budget's decisions, and its trials end once."""

import dataclasses

import pytest
import sqlalchemy as sa

from accounting import LedgerError
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store
from sweeps.errors import DatabaseError, StoreError
from tests.sweeps.database.small_sweep import (
    FIRST,
    METRICS,
    TRIAL,
    a_sweep,
    a_trial,
    ends_of_attempts,
    everything,
    kinds,
    privacy_of,
    row_of,
    state_of,
)


def test_a_created_sweep_reads_back(store: Store) -> None:
    sweep = store.sweep("s-1")
    assert (sweep.name, sweep.state, sweep.dataset) == ("s", "RUNNING", "digits:1.0.0")
    assert (sweep.wish, sweep.driver) == ("", "")
    assert sweep.spec == {"privacy": privacy_of()}
    rows = store.trials("s-1")
    assert [row.state for row in rows] == ["ADMITTED", "ADMITTED", "REJECTED"]
    assert [row.planned_epsilon for row in rows] == [2.5, 2.5, None]
    assert rows[2].reason == "needs 9.1, allowed is 3"
    assert [row.sweep_id for row in store.sweeps()] == ["s-1"]


def test_mlflow_hears_of_the_sweep_and_of_admitted_trials_only(store: Store) -> None:
    assert kinds(store) == [
        ("sweep_start", None),
        ("trial_start", "s-1-000"),
        ("trial_start", "s-1-001"),
    ]


def test_a_sweep_is_created_whole_or_not_at_all(engine: sa.Engine, store: Store) -> None:
    before = everything(engine)
    twin = dataclasses.replace(a_sweep(), sweep_id="s-2")
    with pytest.raises(LedgerError, match=TRIAL):  # s-1 has reserved for the trial already
        store.create_sweep(twin, [a_trial(7), a_trial(0)])
    assert everything(engine) == before
    rejected = [a_trial(7, TrialState.REJECTED), a_trial(2, TrialState.REJECTED)]
    with pytest.raises(DatabaseError, match="onstraint") as caught:  # s-1 has the trial already
        store.create_sweep(twin, rejected)
    assert "INSERT" not in str(caught.value)
    assert everything(engine) == before


def test_an_unknown_sweep_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="'nope'"):
        store.sweep("nope")


def test_an_unknown_trial_is_named(store: Store) -> None:
    assert store.trial("nope") is None
    with pytest.raises(StoreError, match="'nope'"):
        store.attempts.begin("nope")
    with pytest.raises(StoreError, match="'nope'"):
        store.attempts.assignment("nope")
    with pytest.raises(StoreError, match="'nope'"):
        store.end_trial("nope", TrialState.FAILED)


# -- states ----------------------------------------------------------------------------------


def test_a_trial_runs_and_ends(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL, worker="host:1")
    assert (attempt.number, state_of(store)) == (1, "RUNNING")
    store.attempts.fail(attempt, "its model cannot count")
    row = row_of(store)
    assert (row.state, row.reason) == ("FAILED", "its model cannot count")
    assert kinds(store)[3:] == [("trial_end", TRIAL)]
    told = store.outbox.undelivered()[-1].payload
    assert told == {"state": "FAILED", "reason": "its model cannot count"}
    assert ends_of_attempts(store) == ["ended"]
    assert store.ledger.reservation(TRIAL).state == "released"


def test_an_ended_trial_may_not_run_again(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 1)
    store.attempts.report(attempt, FIRST.branch_id, 1, METRICS, end=TrialState.COMPLETED)
    with pytest.raises(StoreError, match="COMPLETED"):
        store.attempts.begin(TRIAL)


def test_a_rejected_trial_never_runs(store: Store) -> None:
    with pytest.raises(StoreError, match="REJECTED"):
        store.attempts.begin("s-1-002")
    with pytest.raises(StoreError, match="not one that may run"):
        store.attempts.assignment("s-1-002")


def test_ending_twice_changes_nothing(store: Store) -> None:
    assert store.end_trial(TRIAL, TrialState.CANCELLED, "first") is True
    assert store.end_trial(TRIAL, TrialState.FAILED, "second") is False
    assert row_of(store).reason == "first"
    assert kinds(store).count(("trial_end", TRIAL)) == 1


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.PAUSED, TrialState.QUEUED])
def test_a_trial_ends_in_an_ended_state_only(
    engine: sa.Engine, store: Store, state: TrialState
) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 1)
    before = everything(engine)
    with pytest.raises(StoreError, match="cannot become"):
        store.attempts.report(attempt, FIRST.branch_id, 1, METRICS, end=state)
    assert everything(engine) == before


def test_an_admitted_trial_cannot_complete_without_running(store: Store) -> None:
    with pytest.raises(StoreError, match="cannot become COMPLETED from ADMITTED"):
        store.end_trial(TRIAL, TrialState.COMPLETED)


def test_the_end_of_a_sweep_names_its_artifacts(store: Store) -> None:
    store.end_sweep("s-1", SweepState.PAUSED, ["/a.png"])
    assert store.sweep("s-1").state == "PAUSED"
    assert store.sweep("s-1").ended_at is not None
    last = store.outbox.undelivered()[-1]
    assert (last.kind, last.payload) == (
        "sweep_end",
        {"state": "PAUSED", "artifacts": ["/a.png"]},
    )
