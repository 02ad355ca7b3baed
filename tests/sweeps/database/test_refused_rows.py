"""Trials that a budget refused are admitted once others have given steps back, in one piece."""

import dataclasses
import signal
import threading

import pytest

from accounting.policies import Policy
from accounting.renyi import step_rdp
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store
from sweeps.errors import StoreError
from tests.sweeps.database.small_sweep import (
    MECHANISM,
    ORDER,
    PLAN,
    PROCESS_SECS,
    SWEEP,
    a_full_trial,
    a_trial,
    child,
    everything,
    go_to,
    kinds,
    line_of,
    row_of,
    run_together,
    state_of,
    sweep_holding,
)

FIRST, SECOND, THIRD, DEAR = (f"{SWEEP}-{number:03}" for number in range(4))


def submit(store: Store, trials: float = 1.5) -> None:
    """Three trials, of which the first is admitted, and one that is refused by itself."""
    dear = dataclasses.replace(a_trial(3, TrialState.REJECTED), trial_id=DEAR)
    store.create_sweep(sweep_holding(trials), [*map(a_full_trial, range(3)), dear])
    states = {row.trial_id: row.state for row in store.trials(SWEEP)}
    assert states == {FIRST: "ADMITTED", SECOND: "REJECTED", THIRD: "REJECTED", DEAR: "REJECTED"}


def prune(store: Store, trial_id: str, step: int) -> None:
    attempt = store.attempts.begin(trial_id)
    if step:
        go_to(store, attempt, step)
    store.end_trial(trial_id, TrialState.PRUNED, "why")


def verified(store: Store) -> bool:
    return store.ledger.verify().ok


def test_what_is_given_back_admits_the_first_that_fits(empty_store: Store) -> None:
    store = empty_store
    submit(store)
    before = row_of(store, SECOND)
    assert before.reason
    assert before.needed_rdp == pytest.approx(PLAN * step_rdp(MECHANISM.step, ORDER))
    assert row_of(store, DEAR).needed_rdp is None
    assert store.refused.is_any(SWEEP)
    assert store.refused.fitting(SWEEP) is None
    prune(store, FIRST, 40)
    assert store.refused.fitting(SWEEP) == SECOND
    assert store.refused.admit(SWEEP) == [SECOND]
    row = row_of(store, SECOND)
    assert (row.state, row.reason, row.needed_rdp) == ("ADMITTED", "", None)
    assert [each.trial_id for each in store.runnable(SWEEP)] == [SECOND]
    assert kinds(store)[-1] == ("trial_start", SECOND)
    config = store.attempts.assignment(SECOND).config
    assert config == a_full_trial(1).trial_config
    go_to(store, store.attempts.begin(SECOND), PLAN, end=TrialState.COMPLETED)
    # 140 of 150 steps are spent: the third does not fit, and the one that is too dear never does.
    assert not store.refused.admit(SWEEP)
    assert [state_of(store, name) for name in (THIRD, DEAR)] == ["REJECTED"] * 2
    assert verified(store)


def test_repeats_are_admitted_together_once_there_is_room_for_all(empty_store: Store) -> None:
    store = empty_store
    store.create_sweep(sweep_holding(2.5), [a_full_trial(0), a_full_trial(1)])
    twice = [a_full_trial(2), a_full_trial(3)]
    assert store.add_trials(SWEEP, twice, budget=None, team="") == []
    one, other = (row for row in store.trials(SWEEP) if row.state == TrialState.REJECTED)
    assert other.repeat_of == one.trial_id
    assert one.needed_rdp == pytest.approx(2 * PLAN * step_rdp(MECHANISM.step, ORDER))
    assert other.needed_rdp is None
    prune(store, FIRST, 0)
    assert not store.refused.admit(SWEEP), "there is room for one of them"
    prune(store, SECOND, 0)
    assert store.refused.admit(SWEEP) == [one.trial_id, other.trial_id]
    assert {row.trial_id for row in store.runnable(SWEEP)} == {one.trial_id, other.trial_id}
    assert all(state_of(store, row.trial_id) == "ADMITTED" for row in (one, other))
    assert verified(store)


def test_of_repeats_none_is_admitted_where_somebody_else_took_the_room_for_one(
    empty_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = empty_store
    store.create_sweep(sweep_holding(2.5), [a_full_trial(0)])
    twice = [a_full_trial(1), a_full_trial(2)]
    assert store.add_trials(SWEEP, twice, budget=None, team="") == []
    prune(store, FIRST, 0)
    fitting = store.refused.fitting(SWEEP)
    monkeypatch.setattr(store.refused, "fitting", lambda _sweep: fitting)
    store.ledger.reserve(SWEEP, MECHANISM, request_id="somebody-elses")
    before = everything(store.ledger.engine)
    assert not store.refused.admit(SWEEP)
    assert everything(store.ledger.engine) == before


def test_to_look_in_vain_writes_nothing(empty_store: Store) -> None:
    submit(empty_store)
    before = everything(empty_store.ledger.engine)
    for _ in range(3):
        assert not empty_store.refused.admit(SWEEP)
    assert everything(empty_store.ledger.engine) == before


@pytest.mark.parametrize("policy", ["per_trial", "declared"])
def test_other_policies_refuse_for_good(empty_store: Store, policy: Policy) -> None:
    store = empty_store
    store.create_sweep(sweep_holding(0.5, policy), [a_full_trial(number) for number in range(2)])
    assert {row.state for row in store.trials(SWEEP)} == {"REJECTED"}
    assert all(row.needed_rdp is row.trial_config is None for row in store.trials(SWEEP))
    assert not store.refused.is_any(SWEEP)
    assert not store.refused.admit(SWEEP)


def test_a_budget_that_was_frozen_admits_once_it_is_thawed(empty_store: Store) -> None:
    store = empty_store
    submit(store)
    prune(store, FIRST, 0)
    store.ledger.freeze(SWEEP)
    assert store.refused.fitting(SWEEP) is None
    store.ledger.thaw(SWEEP)
    assert store.refused.admit(SWEEP) == [SECOND]


def test_a_sweep_that_does_not_run_is_asked_nothing(empty_store: Store) -> None:
    store = empty_store
    submit(store)
    prune(store, FIRST, 0)
    store.end_sweep(SWEEP, SweepState.PAUSED)
    before = everything(store.ledger.engine)
    with pytest.raises(StoreError, match="is PAUSED; allowed is a running one"):
        store.refused.admit(SWEEP)
    assert everything(store.ledger.engine) == before


def test_who_is_slower_is_refused_again_with_the_new_reason(
    empty_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = empty_store
    submit(store)
    prune(store, FIRST, 40)
    fitting, before = store.refused.fitting(SWEEP), row_of(store, SECOND).reason
    monkeypatch.setattr(store.refused, "fitting", lambda _sweep: fitting)
    store.ledger.reserve(SWEEP, MECHANISM, request_id="somebody-elses")
    assert not store.refused.admit(SWEEP)
    assert state_of(store, SECOND) == "REJECTED"
    assert row_of(store, SECOND).reason not in ("", before)
    assert [entry.kind for entry, _ in store.ledger.entries()][-1] == "refused_again"
    assert verified(store)


def test_of_many_that_ask_no_more_are_admitted_than_fit(
    empty_store: Store, environment: dict[str, str]
) -> None:
    store = empty_store
    trials = [a_full_trial(number) for number in range(9)]
    store.create_sweep(sweep_holding(3.5), trials)
    admitted = [row.trial_id for row in store.runnable(SWEEP)]
    assert len(admitted) == 3
    for trial_id in admitted:
        prune(store, trial_id, 10)  # 320 of 350 steps are free again: three trials
    got: list[str] = []

    def ask() -> None:
        for _ in range(3):
            got.extend(store.refused.admit(SWEEP))

    code = (
        "import sys; from sweeps.database.store import open_store; from sweeps.home import Home\n"
        "store = open_store(Home.from_environment()); print('ready', flush=True); input()\n"
        f"print(*[name for _ in range(3) for name in store.refused.admit('{SWEEP}')], flush=True)"
    )
    with child(environment, code) as other:
        assert line_of(other) == "ready"
        threads = [threading.Thread(target=ask) for _ in range(2)]
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        run_together(threads)
        got.extend(line_of(other).split())
        other.wait(PROCESS_SECS)
    assert len(got) == len(set(got)) == 3
    assert [row.trial_id for row in store.runnable(SWEEP)] == sorted(got)
    level = store.ledger.status(SWEEP).level
    assert level.spent + level.reserved <= level.limit
    assert verified(store)


@pytest.mark.parametrize("where", ["set_trial", "tell"])
def test_a_driver_that_is_killed_in_between_has_done_all_of_it_or_nothing(
    empty_store: Store, environment: dict[str, str], where: str
) -> None:
    store = empty_store
    submit(store)
    prune(store, FIRST, 40)
    before = everything(store.ledger.engine)
    code = (
        "import os, signal\n"
        "from sweeps.database import rows\n"
        "from sweeps.database.store import open_store\n"
        "from sweeps.home import Home\n"
        f"rows.{where} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"open_store(Home.from_environment()).refused.admit('{SWEEP}')\n"
    )
    with child(environment, code) as killed:
        assert killed.wait(PROCESS_SECS) == -signal.SIGKILL
    assert everything(store.ledger.engine) == before
    assert store.refused.admit(SWEEP) == [SECOND]
    # The next driver finds it among what may run, whether or not the one before handed it out.
    assert [row.trial_id for row in store.runnable(SWEEP)] == [SECOND]
    assert verified(store)
