"""One process drives a sweep; what people ask of it meanwhile is heard and kept."""

import dataclasses
import signal

import pytest
import sqlalchemy as sa

from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import Store, open_store
from sweeps.errors import FencedError, HaltedError, StoreError
from sweeps.home import Home
from tests.sweeps.database.small_sweep import (
    FIRST,
    METRICS,
    PLAN,
    PROCESS_SECS,
    TRIAL,
    a_full_trial,
    a_sweep,
    child,
    ends_of_attempts,
    everything,
    go_to,
    kinds,
    line_of,
    row_of,
    run_to,
    state_of,
)
from trainer.config import OptimizerName

OTHER = "s-1-001"

# -- the driver ------------------------------------------------------------------------------


def test_one_drives_at_a_time(home: Home, store: Store) -> None:
    other = open_store(home)
    assert not other.is_driven("s-1")
    with store.driving_lock("s-1") as first:
        assert first
        assert other.is_driven("s-1")
        with other.driving_lock("s-1") as second, other.driving_lock("s-2") as elsewhere:
            assert (second, elsewhere) == (False, True)
    assert not other.is_driven("s-1")
    other.ledger.close()


DRIVER = """
import time
from sweeps.home import Home
from sweeps.database.store import open_store

store = open_store(Home.from_environment())
with store.driving_lock("s-1") as held:
    print(held, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_right_to_drive_ends_with_its_process(
    environment: dict[str, str], store: Store
) -> None:
    process = child(environment, DRIVER)
    assert line_of(process) == "True"
    assert store.is_driven("s-1")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PROCESS_SECS)
    with store.driving_lock("s-1") as held:
        assert held


def test_who_takes_over_finds_nobody_at_work(store: Store) -> None:
    run_to(store, 10)
    store.set_wish("s-1", Wish.PAUSE)
    store.take_over("s-1", "host:7")
    sweep = store.sweep("s-1")
    assert (sweep.state, sweep.driver) == ("RUNNING", "host:7")
    assert sweep.wish == "pause", "it comes back to what was asked"
    assert ends_of_attempts(store) == ["interrupted"]
    assert (state_of(store), row_of(store).charged_iterations) == ("RUNNING", 10)
    assert ("sweep_resume", None) not in kinds(store), "MLflow saw no end"


def test_who_reopens_a_sweep_that_had_ended_tells_of_it(store: Store) -> None:
    assert store.end_sweep("s-1", SweepState.PAUSED)
    with pytest.raises(StoreError, match="is PAUSED; allowed is a running one"):
        store.take_over("s-1", "host:7")
    store.reopen("s-1")
    sweep = store.sweep("s-1")
    assert (sweep.state, sweep.ended_at) == ("RUNNING", None)
    assert kinds(store)[3:] == [("sweep_end", None), ("sweep_resume", None)]


def test_who_reopens_a_running_sweep_takes_back_what_was_asked_of_it(store: Store) -> None:
    store.set_wish("s-1", Wish.PAUSE)
    store.give_up("s-1", "its workers get nowhere")
    assert store.sweep("s-1").reason == "its workers get nowhere"
    store.reopen("s-1")
    assert (store.sweep("s-1").wish, store.sweep("s-1").reason) == ("", "")
    assert ("sweep_resume", None) not in kinds(store), "MLflow saw no end"


def test_a_sweep_does_not_end_while_somebody_lets_a_trial_go_on(store: Store) -> None:
    before = kinds(store)
    for state in (SweepState.COMPLETED, SweepState.FAILED):
        assert not store.end_sweep("s-1", state)
        assert store.sweep("s-1").state == "RUNNING"
    assert kinds(store) == before
    for trial_id in (TRIAL, OTHER):
        store.end_trial(trial_id, TrialState.CANCELLED)
    assert store.end_sweep("s-1", SweepState.COMPLETED)
    assert store.sweep("s-1").state == "COMPLETED"


def test_a_sweep_that_has_ended_is_not_driven(store: Store) -> None:
    with store.driving_lock("s-1"):
        assert store.is_driven("s-1")
        store.end_sweep("s-1", SweepState.PAUSED)
        assert not store.is_driven("s-1"), "nobody takes up what goes on of it now"


def test_an_unknown_sweep_cannot_be_taken_over(engine: sa.Engine, store: Store) -> None:
    before = everything(engine)
    with pytest.raises(StoreError, match="'nope'"):
        store.take_over("nope", "host:7")
    assert everything(engine) == before


def test_what_is_under_way_comes_first(full: Store) -> None:
    names = [row.trial_id for row in full.runnable("s-1")]
    assert names == ["s-1-000", "s-1-001", "s-1-002"]
    run_to(full, 10, "s-1-002")
    full.end_trial("s-1-000", TrialState.CANCELLED)
    assert [row.trial_id for row in full.runnable("s-1")] == ["s-1-002", "s-1-001"]


def test_trials_that_share_programs_start_one_after_the_other(empty_store: Store) -> None:
    optimizers: list[OptimizerName] = ["sgd", "adam", "momentum", "adam", "sgd", "sgd"]
    trials = [
        dataclasses.replace(trial, trial_config=dataclasses.replace(config, optimizer=optimizer))
        for trial, optimizer in zip(map(a_full_trial, range(6)), optimizers, strict=True)
        if (config := trial.trial_config) is not None
    ]
    empty_store.create_sweep(a_sweep(), trials)
    assert [row.number for row in empty_store.runnable("s-1")] == [0, 4, 5, 1, 3, 2]
    run_to(empty_store, 10, "s-1-003")
    assert [row.number for row in empty_store.runnable("s-1")] == [3, 0, 4, 5, 1, 2]


# -- wishes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [Wish.PAUSE, Wish.STOP])
def test_a_wish_is_heard_by_who_runs_and_by_who_would_begin(store: Store, wish: Wish) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 20)
    assert store.attempts.report(attempt, FIRST.branch_id, 10, METRICS).wish is Wish.NONE
    store.set_wish("s-1", wish)
    assert store.wish("s-1") is wish
    assert store.attempts.report(attempt, FIRST.branch_id, 20, METRICS).wish is wish
    with pytest.raises(HaltedError, match=f"asked to {wish}"):
        store.attempts.begin(OTHER)
    assert state_of(store, OTHER) == "ADMITTED"
    if wish is Wish.PAUSE:
        with pytest.raises(HaltedError):
            store.attempts.begin(TRIAL)
        store.attempts.check_holds(attempt)
    else:  # what runs is to end, whoever takes it there
        assert store.attempts.begin(TRIAL).number == 2


def test_a_wish_asks_for_a_running_sweep(engine: sa.Engine, store: Store) -> None:
    for trial_id in (TRIAL, OTHER):
        store.end_trial(trial_id, TrialState.CANCELLED)
    store.end_sweep("s-1", SweepState.COMPLETED)
    before = everything(engine)
    with pytest.raises(StoreError, match="is COMPLETED; allowed is a running one"):
        store.set_wish("s-1", Wish.PAUSE)
    with pytest.raises(StoreError, match="'nope'"):
        store.set_wish("nope", Wish.PAUSE)
    assert everything(engine) == before


def test_the_end_of_a_sweep_fulfils_a_wish(store: Store) -> None:
    store.set_wish("s-1", Wish.PAUSE)
    store.end_sweep("s-1", SweepState.PAUSED)
    assert store.wish("s-1") is Wish.NONE


def test_a_paused_trial_keeps_what_is_reserved_for_it(store: Store) -> None:
    attempt = run_to(store, 10)
    store.attempts.pause(attempt)
    assert (state_of(store), ends_of_attempts(store)) == ("PAUSED", ["paused"])
    reservation = store.ledger.reservation(TRIAL)
    assert (reservation.state, reservation.charged, reservation.committed) == ("open", 10, PLAN)
    assert store.wish("s-1") is Wish.NONE
    assert kinds(store)[-1] == ("metrics", TRIAL), "to MLflow it has not ended"
    with pytest.raises(FencedError, match="PAUSED"):
        store.attempts.charge(attempt, FIRST, 20)
    assert store.attempts.charge(store.attempts.begin(TRIAL), FIRST, 20) == 20
    assert state_of(store) == "RUNNING"


def test_a_trial_that_has_to_pause_pauses_its_sweep(store: Store) -> None:
    attempt = run_to(store, 10)
    store.attempts.pause(attempt, "the disk is full")
    assert (state_of(store), row_of(store).reason) == ("PAUSED", "the disk is full")
    assert store.wish("s-1") is Wish.PAUSE
    with pytest.raises(HaltedError):
        store.attempts.begin(OTHER)


# -- the end at once -------------------------------------------------------------------------


def test_a_cancelled_sweep_fences_who_works_on_it(engine: sa.Engine, full: Store) -> None:
    done = full.attempts.begin("s-1-002")
    go_to(full, done, PLAN, end=TrialState.COMPLETED)
    running = run_to(full, 10)
    full.cancel_sweep("s-1")
    assert full.sweep("s-1").state == "CANCELLED"
    assert [row.state for row in full.trials("s-1")] == ["CANCELLED", "CANCELLED", "COMPLETED"]
    assert full.runnable("s-1") == []
    with pytest.raises(FencedError):
        full.attempts.check_holds(running)
    before = everything(engine)
    for write in (
        lambda: full.attempts.charge(running, FIRST, 20),
        lambda: full.attempts.report(running, FIRST.branch_id, 10, METRICS),
        lambda: full.attempts.begin(OTHER),
    ):
        with pytest.raises(StoreError, match="CANCELLED"):
            write()
    assert everything(engine) == before
    states = [full.ledger.reservation(row.trial_id).state for row in full.trials("s-1")]
    assert states == ["closed", "released", "closed"]
    assert kinds(full)[-2:] == [("trial_end", TRIAL), ("trial_end", OTHER)]


def test_a_sweep_is_cancelled_once(engine: sa.Engine, store: Store) -> None:
    store.cancel_sweep("s-1")
    before = everything(engine)
    with pytest.raises(StoreError, match="is CANCELLED; allowed is one under way"):
        store.cancel_sweep("s-1")
    assert everything(engine) == before
