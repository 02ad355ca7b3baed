"""Who may write: a trial's newest attempt alone, and what it has charged is never lost."""

import dataclasses
import json
import signal
import threading

import pytest
import sqlalchemy as sa

from sweeps.database.attempts import MAX_LOST
from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.errors import FencedError, OverspentError, StoreError
from tests.sweeps.database.small_sweep import (
    FIRST,
    METRICS,
    PLAN,
    PROCESS_SECS,
    TRIAL,
    a_branch,
    charged,
    child,
    ends_of_attempts,
    everything,
    go_to,
    kinds,
    line_of,
    row_of,
    run_to,
    run_together,
    state_of,
    sum_over_branches,
)

# -- charges ---------------------------------------------------------------------------------


def test_a_charge_is_monotone_and_idempotent(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    steps = (10, 10, 4, 30, 0)
    totals = [store.attempts.charge(attempt, FIRST, step) for step in steps]
    assert totals == [10, 10, 10, 30, 30]
    assert charged(store) == 30


def test_a_charge_beyond_the_plan_changes_nothing(engine: sa.Engine, store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, PLAN - 1)
    before = everything(engine)
    with pytest.raises(OverspentError, match=f"more than the {PLAN} reserved"):
        store.attempts.charge(attempt, FIRST, PLAN + 1)
    after = everything(engine)
    refused = set(after.pop("ledger_journal")) - set(before.pop("ledger_journal"))
    assert len(refused) == 1
    assert "charge_refused" in refused.pop()
    assert after == before
    assert store.attempts.charge(attempt, FIRST, PLAN) == PLAN


# -- the fence -------------------------------------------------------------------------------


def test_an_older_attempt_is_fenced(engine: sa.Engine, store: Store) -> None:
    attempts = store.attempts
    old = attempts.begin(TRIAL)
    attempts.charge(old, FIRST, 10)
    attempts.check_holds(old)
    new = attempts.begin(TRIAL)
    before = everything(engine)
    for write in (
        lambda: attempts.charge(old, FIRST, 20),
        lambda: attempts.report(old, FIRST.branch_id, 10, METRICS),
        lambda: attempts.report(old, FIRST.branch_id, 10, METRICS, end=TrialState.COMPLETED),
        lambda: attempts.checkpoint(old, 10, "/there"),
        lambda: attempts.fail(old, "why"),
        lambda: attempts.pause(old),
        lambda: attempts.out_of_memory(old, 8),
        lambda: attempts.check_holds(old),
    ):
        with pytest.raises(FencedError, match="attempt 1"):
            write()
    assert everything(engine) == before
    assert attempts.charge(new, a_branch(2), 20) == 30
    assert ends_of_attempts(store) == ["lost", None]


def test_a_guessed_attempt_is_fenced(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    with pytest.raises(FencedError):
        store.attempts.charge(dataclasses.replace(attempt, attempt_id="0" * 32), FIRST, 1)
    assert charged(store) == 0


def test_the_attempt_of_an_ended_trial_is_fenced(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.end_trial(TRIAL, TrialState.PRUNED)
    with pytest.raises(FencedError, match="PRUNED"):
        store.attempts.charge(attempt, FIRST, 1)
    with pytest.raises(FencedError, match="has ended"):
        store.attempts.check_holds(attempt)


def test_an_attempt_that_ended_is_fenced_before_another_begins(
    engine: sa.Engine, store: Store
) -> None:
    attempt = run_to(store, 10)
    store.take_over("s-1", "host:2")
    before = everything(engine)
    with pytest.raises(FencedError):
        store.attempts.charge(attempt, FIRST, 20)
    with pytest.raises(FencedError):
        store.attempts.fail(attempt, "its driver is gone")
    assert everything(engine) == before


# -- reports ---------------------------------------------------------------------------------


def test_averages_are_reported_beside_the_last_iterate(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 9)
    averages = {"ema_eval_accuracy": 0.8, "polyak_eval_loss": float("nan")}
    store.attempts.report(attempt, FIRST.branch_id, 9, METRICS | averages)
    (row,) = store.reports("s-1")
    assert (row.eval_accuracy, row.ema_eval_accuracy) == (0.75, 0.8)
    assert row.polyak_eval_loss is row.polyak_eval_accuracy is None
    told = store.outbox.undelivered()[-1].payload["metrics"]
    assert told == METRICS | averages | {"polyak_eval_loss": None}


def test_a_report_waits_for_its_charge(engine: sa.Engine, store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 9)
    before = everything(engine)
    for branch, step in ((FIRST, 10), (a_branch(2), 9)):
        with pytest.raises(StoreError, match="before it is charged"):
            store.attempts.report(attempt, branch.branch_id, step, METRICS)
    assert everything(engine) == before


def test_a_report_is_kept_once_and_told_once(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 10)
    for _ in range(2):
        store.attempts.report(attempt, FIRST.branch_id, 10, METRICS)
    (row,) = store.reports("s-1")
    assert (row.step, row.charged_iterations, row.eval_accuracy) == (10, 10, 0.75)
    assert kinds(store)[3:] == [("metrics", TRIAL)]
    assert store.outbox.undelivered()[-1].payload == {"step": 10, "metrics": METRICS}


def test_numbers_that_are_not_finite_become_null(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 1)
    given = {"epsilon": float("inf"), "eval_accuracy": 0.5, "eval_loss": float("nan")}
    store.attempts.report(attempt, FIRST.branch_id, 1, given)
    (row,) = store.reports("s-1")
    assert (row.epsilon, row.eval_accuracy, row.eval_loss) == (None, 0.5, None)
    metrics = {"epsilon": None, "eval_accuracy": 0.5, "eval_loss": None}
    assert store.outbox.undelivered()[-1].payload == {"step": 1, "metrics": metrics}


def test_the_report_that_ends_a_trial_is_one_with_the_end(
    engine: sa.Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 10)
    before = everything(engine)
    with monkeypatch.context() as broken:
        broken.setattr("sweeps.database.rows.end_attempt", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            go_to(store, attempt, 10, end=TrialState.COMPLETED)
    assert everything(engine) == before, "no report without the end"

    go_to(store, attempt, 10, end=TrialState.COMPLETED)
    assert state_of(store) == "COMPLETED"
    assert [row.step for row in store.reports("s-1")] == [10]
    assert kinds(store)[3:] == [("metrics", TRIAL), ("trial_end", TRIAL)]
    reservation = store.ledger.reservation(TRIAL)
    assert (reservation.state, reservation.charged, reservation.committed) == ("closed", 10, 10)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# -- workers that die ------------------------------------------------------------------------


def test_workers_that_die_over_a_trial_in_a_row_fail_it(store: Store) -> None:
    run_to(store, 10)
    for _ in range(MAX_LOST):  # of which the first has got somewhere
        store.attempts.begin(TRIAL)
    assert state_of(store) == "RUNNING"
    with pytest.raises(StoreError, match=f"{MAX_LOST} workers died over it"):
        store.attempts.begin(TRIAL)
    row = row_of(store)
    assert row.state == "FAILED"
    assert row.reason == f"{MAX_LOST} workers died over it without getting any further"
    assert ends_of_attempts(store) == ["lost"] * MAX_LOST + ["ended"]
    assert store.ledger.reservation(TRIAL).state == "closed"
    assert kinds(store)[-1] == ("trial_end", TRIAL)


def test_a_trial_that_gets_further_may_lose_any_number_of_workers(store: Store) -> None:
    for step in range(1, 2 * MAX_LOST):
        run_to(store, step)
        store.attempts.begin(TRIAL)  # one that gets nowhere between any two that do
    assert ends_of_attempts(store) == ["lost"] * (4 * MAX_LOST - 3) + [None]


def test_workers_whose_driver_died_do_not_count(store: Store) -> None:
    for number in range(2 * MAX_LOST):
        store.attempts.begin(TRIAL)
        store.take_over("s-1", f"host:{number}")
    assert store.attempts.begin(TRIAL).number == 2 * MAX_LOST + 1
    assert ends_of_attempts(store) == ["interrupted"] * (2 * MAX_LOST) + [None]


def test_a_trial_that_was_readmitted_may_lose_as_many_again(full: Store) -> None:
    for _ in range(MAX_LOST):
        full.attempts.begin(TRIAL)
    with pytest.raises(StoreError, match="died"):
        full.attempts.begin(TRIAL)
    full.readmit({TRIAL: None})
    for number in range(MAX_LOST):
        assert full.attempts.begin(TRIAL).number == MAX_LOST + 1 + number
    with pytest.raises(StoreError, match="died"):
        full.attempts.begin(TRIAL)
    assert state_of(full) == "FAILED"


def test_an_attempt_that_ran_out_of_memory_is_not_lost(full: Store) -> None:
    for number in range(2 * MAX_LOST):
        attempt = full.attempts.begin(TRIAL)
        full.attempts.out_of_memory(attempt, 64 - number)
    assert full.attempts.assignment(TRIAL).config.clipping.microbatch_size == 65 - 2 * MAX_LOST
    assert ends_of_attempts(full) == ["out_of_memory"] * (2 * MAX_LOST)


# -- several at once -------------------------------------------------------------------------


def test_one_attempt_in_many_threads_is_charged_once(store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    errors: list[BaseException] = []

    def charge_all() -> None:
        try:
            for step in range(1, 31):
                assert store.attempts.charge(attempt, FIRST, step) >= step
        except BaseException as error:
            errors.append(error)

    run_together([threading.Thread(target=charge_all) for _ in range(4)])
    assert errors == []
    assert charged(store) == 30 == sum_over_branches(store)


GREEDY = """
import secrets, sys
import sweeps.database.attempts
from sweeps.errors import FencedError, OverspentError
from sweeps.home import Home
from sweeps.database.store import open_store
from trainer.mechanism.branch import Branch

sweeps.database.attempts.MAX_LOST = 10**6  # they take the trial from one another
attempts = open_store(Home.from_environment()).attempts
gained, spent = 0, False
print("ready", flush=True)
sys.stdin.readline()
while not spent:
    try:
        attempt = attempts.begin("s-1-000")
        branch = Branch(secrets.token_hex(8), 0)
        for step in range(1, 8):
            attempts.charge(attempt, branch, step)
            gained += 1
    except FencedError:
        pass
    except OverspentError:
        spent = True
print(gained, flush=True)
"""


@pytest.mark.slow
def test_racing_processes_never_exceed_the_plan(environment: dict[str, str], store: Store) -> None:
    processes = [child(environment, GREEDY) for _ in range(3)]
    assert [line_of(process) for process in processes] == ["ready"] * 3
    results = [process.communicate("go\n", timeout=PROCESS_SECS)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    # Each charge that returned gained one step, and is in the sum: none was lost.
    assert sum(int(result) for result in results) == PLAN
    assert charged(store) == PLAN == sum_over_branches(store)


VICTIM = """
import json, time
from sweeps.home import Home
from sweeps.database.store import open_store
from trainer.mechanism.branch import Branch

attempts = open_store(Home.from_environment()).attempts
attempt = attempts.begin("s-1-000")
branch = Branch("0000000000000001", 0)
step = 0
while True:
    step += 1
    print(json.dumps([step, attempts.charge(attempt, branch, step)]), flush=True)
    if step == 20:
        time.sleep(600)
"""


@pytest.mark.slow
def test_a_charge_that_returned_survives_kill_9(environment: dict[str, str], store: Store) -> None:
    process = child(environment, VICTIM)
    seen = [json.loads(line_of(process)) for _ in range(20)]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PROCESS_SECS)
    assert process.returncode == -signal.SIGKILL
    assert seen[-1] == [20, 20]
    assert charged(store) == 20
    # Its successor goes on from there, and nothing it left behind is locked.
    again = store.attempts.begin(TRIAL)
    assert store.attempts.charge(again, FIRST, 25) == 25


IN_THE_MIDDLE = """
import os, signal
from sweeps.database import rows
from sweeps.home import Home
from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from trainer.mechanism.branch import Branch

attempts = open_store(Home.from_environment()).attempts
attempt = attempts.begin("s-1-000")
attempts.charge(attempt, Branch("0000000000000001", 0), 20)
print("charged", flush=True)
rows.end_attempt = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
attempts.report(attempt, "0000000000000001", 20, {"eval_accuracy": 1.0}, end=TrialState.COMPLETED)
"""


@pytest.mark.slow
def test_a_process_killed_in_the_middle_of_a_transaction_changed_nothing(
    environment: dict[str, str], store: Store
) -> None:
    process = child(environment, IN_THE_MIDDLE)
    assert line_of(process) == "charged"
    process.communicate(timeout=PROCESS_SECS)
    assert process.returncode == -signal.SIGKILL
    assert (state_of(store), charged(store), store.reports("s-1")) == ("RUNNING", 20, [])
    assert len(kinds(store)) == 3
    again = store.attempts.begin(TRIAL)
    go_to(store, again, 20, end=TrialState.COMPLETED)
    assert kinds(store)[3:] == [("metrics", TRIAL), ("trial_end", TRIAL)]
    assert store.ledger.verify().ok
