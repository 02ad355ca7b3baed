"""Who waits at a rung for whom, and who is there once everybody has come."""

import dataclasses
from typing import Any

import pytest
import sqlalchemy as sa

from sweeps.database import rows
from sweeps.database.forking import NewFork, RefusedFork
from sweeps.database.gatherings import Gathering
from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.errors import StoreError
from tests.sweeps.database.small_sweep import (
    PLAN,
    SWEEP,
    a_branch,
    a_full_trial,
    a_sweep,
    a_trial,
    everything,
    go_to,
    kinds,
    privacy_of,
    row_of,
    run_to,
)

RUNG = 10
TWO_TRIALS = 4.0
FORK = "s-1-0003"
TRIALS = [f"s-1-00{number}" for number in range(4)]
FIRST, SECOND, THIRD, FOURTH = TRIALS


@pytest.fixture
def four(empty_store: Store) -> Store:
    empty_store.create_sweep(a_sweep(), [a_trial(number) for number in range(4)])
    return empty_store


def everybody(_: int) -> range:
    return range(4)


def pairs(number: int) -> range:
    return range(number - number % 2, number - number % 2 + 2)


def comes(store: Store, trial_id: str, accuracy: float = 0.5, rung: int = RUNG) -> None:
    """Reports at a rung, and waits there."""
    run_to(store, rung, trial_id, accuracy=accuracy)
    store.rungs.decide(trial_id, [rung], lambda *_: False, may_wait=True)
    assert store.rungs.set_aside(trial_id)


def there(found: list[Gathering]) -> list[tuple[int, list[str]]]:
    return [(each.rung, [trial.trial_id for trial in each.there]) for each in found]


def test_a_group_has_gathered_once_all_of_it_wait(four: Store) -> None:
    for trial_id in (FIRST, THIRD):
        comes(four, trial_id)
        assert four.gatherings.found(SWEEP, pairs) == []
    attempt = run_to(four, RUNG, SECOND, accuracy=float("nan"))
    four.rungs.decide(SECOND, [RUNG], lambda *_: False, may_wait=True)
    assert four.gatherings.found(SWEEP, pairs) == [], "its worker has yet to write its checkpoint"
    four.attempts.wait(attempt)
    (gathering,) = four.gatherings.found(SWEEP, pairs)
    first, second = gathering.there
    assert (first.trial_id, first.step, first.utility, first.waits) == (FIRST, RUNG, 0.5, True)
    assert (second.number, second.utility, second.waits) == (1, float("-inf"), True)
    comes(four, FOURTH)
    assert there(four.gatherings.found(SWEEP, pairs)) == [
        (RUNG, [FIRST, SECOND]),
        (RUNG, [THIRD, FOURTH]),
    ]
    assert there(four.gatherings.found(SWEEP, everybody)) == [(RUNG, TRIALS)]


@pytest.mark.parametrize("state", [TrialState.FAILED, TrialState.CANCELLED])
def test_nobody_waits_for_one_that_has_ended(four: Store, state: TrialState) -> None:
    for trial_id in TRIALS[:3]:
        comes(four, trial_id)
    four.attempts.begin(FOURTH)
    assert four.gatherings.found(SWEEP, everybody) == []
    four.end_trial(FOURTH, state)
    assert there(four.gatherings.found(SWEEP, everybody)) == [(RUNG, TRIALS[:3])]
    four.end_trial(THIRD, TrialState.CANCELLED)
    assert there(four.gatherings.found(SWEEP, everybody)) == [(RUNG, TRIALS[:2])]


def test_a_group_that_is_not_full_gathers_once_no_more_come(four: Store) -> None:
    for trial_id in TRIALS:
        comes(four, trial_id)

    def five(_: int) -> range:
        return range(5)

    assert four.gatherings.found(SWEEP, five, more_to_come=True) == []
    assert there(four.gatherings.found(SWEEP, five)) == [(RUNG, TRIALS)]
    four.add_trials(SWEEP, [a_trial(4, TrialState.REJECTED)], budget=None, team="")
    assert there(four.gatherings.found(SWEEP, five, more_to_come=True)) == [(RUNG, TRIALS)]


def test_who_went_on_or_was_pruned_is_still_there_and_does_not_wait(four: Store) -> None:
    for trial_id in TRIALS:
        comes(four, trial_id)
    assert four.gatherings.go_on(FIRST, RUNG)
    assert row_of(four, FIRST).reason == ""
    assert four.gatherings.prune(FOURTH, RUNG, "too bad")
    row = row_of(four, FOURTH)
    assert (row.state, row.reason) == ("PRUNED", "too bad")
    assert four.ledger.reservation(FOURTH).committed == RUNG
    assert kinds(four)[-1] == ("trial_end", FOURTH)
    (gathering,) = four.gatherings.found(SWEEP, everybody)
    assert [trial.waits for trial in gathering.there] == [False, True, True, False]
    # Each of it once, and not for who is somewhere else.
    assert not four.gatherings.go_on(FIRST, RUNG)
    assert not four.gatherings.prune(FIRST, RUNG, "")
    assert not four.gatherings.prune(SECOND, 2 * RUNG, "")
    assert not four.gatherings.go_on(FOURTH, RUNG)
    with pytest.raises(StoreError, match="'nope'"):
        four.gatherings.go_on("nope", RUNG)


def test_the_highest_rung_comes_first_and_nobody_there_is_waited_for_below(four: Store) -> None:
    for trial_id in (FIRST, SECOND):
        comes(four, trial_id)
        four.gatherings.go_on(trial_id, RUNG)
        comes(four, trial_id, rung=2 * RUNG)
    for trial_id in (THIRD, FOURTH):
        comes(four, trial_id)
    assert there(four.gatherings.found(SWEEP, pairs)) == [
        (2 * RUNG, [FIRST, SECOND]),
        (RUNG, [THIRD, FOURTH]),
    ]
    # The upper rung waits for those at the lower one.
    assert there(four.gatherings.found(SWEEP, everybody)) == [(RUNG, TRIALS)]


def test_one_that_runs_at_a_persons_word_is_not_waited_for(full: Store) -> None:
    comes(full, FIRST)
    comes(full, SECOND)
    full.end_trial(THIRD, TrialState.CANCELLED)
    full.gatherings.prune(SECOND, RUNG, "too bad")
    full.readmit({SECOND: None})
    attempt = full.attempts.begin(SECOND)
    go_to(full, attempt, 2 * RUNG)
    (gathering,) = full.gatherings.found(SWEEP, everybody)
    assert [(trial.trial_id, trial.waits) for trial in gathering.there] == [
        (FIRST, True),
        (SECOND, False),
    ]


# -- a fork in a trial's place ---------------------------------------------------------------


def comes_with_a_checkpoint(store: Store, trial_id: str, accuracy: float) -> None:
    attempt = run_to(store, RUNG, trial_id, accuracy=accuracy)
    store.attempts.checkpoint(attempt, RUNG, "/somewhere")
    store.rungs.decide(trial_id, [RUNG], lambda *_: False, may_wait=True)
    store.attempts.wait(attempt)


def a_fork(**changes: Any) -> NewFork:
    """Of the first trial."""
    config = a_full_trial(0).trial_config
    assert config is not None
    return NewFork(
        parent_trial_id=FIRST,
        from_step=None,
        config={"learning_rate": 0.25, "iterations": PLAN},
        trial_config=dataclasses.replace(config, learning_rate=0.25, **changes),
        dataset_fingerprint="print",
        exempt=False,
    )


@pytest.fixture
def gathered(empty_store: Store) -> Store:
    """Two trials that wait, of a budget that is all promised to them."""
    sweep = dataclasses.replace(
        a_sweep(policy="open", epsilon=TWO_TRIALS),
        spec={"privacy": {**privacy_of("open"), "accountant": "rdp"}},
    )
    empty_store.create_sweep(sweep, [a_full_trial(0), a_full_trial(1), a_full_trial(2)])
    assert row_of(empty_store, THIRD).state == "REJECTED", "there is room for no third"
    comes_with_a_checkpoint(empty_store, FIRST, 0.9)
    comes_with_a_checkpoint(empty_store, SECOND, 0.1)
    return empty_store


def test_a_fork_takes_the_place_of_a_trial_and_what_was_promised_to_it(gathered: Store) -> None:
    assert not gathered.fork(a_fork(), dry_run=True).admitted, "there is no room beside it"
    assert gathered.gatherings.replace(SECOND, RUNG, a_fork(), "too bad") == FORK
    pruned, fork = row_of(gathered, SECOND), row_of(gathered, FORK)
    assert (pruned.state, pruned.reason) == (
        "PRUNED",
        "too bad; trial 3 took its place, a fork of trial 0",
    )
    assert gathered.ledger.reservation(SECOND).committed == RUNG
    assert (fork.state, fork.exempt) == ("ADMITTED", False)
    assert (fork.parent_trial_id, fork.parent_step) == (FIRST, RUNG)
    assert (fork.planned_iterations, fork.charged_iterations) == (PLAN - RUNG, 0)
    reservation = gathered.ledger.reservation(FORK)
    assert (reservation.state, reservation.reserved) == ("open", PLAN - RUNG)
    assert kinds(gathered)[-2:] == [("trial_end", SECOND), ("trial_start", FORK)]
    assert gathered.gatherings.replace(SECOND, RUNG, a_fork(), "again") is None
    # It pays for its own steps, on a branch of its own, and waits for the others further on.
    attempt = gathered.attempts.begin(FORK)
    go_to(gathered, attempt, 2 * RUNG, branch=a_branch(7, RUNG))
    assert row_of(gathered, FORK).charged_iterations == RUNG
    (gathering,) = gathered.gatherings.found(SWEEP, everybody)
    assert [(each.trial_id, each.waits) for each in gathering.there] == [
        (FIRST, True),
        (SECOND, False),
    ], "it began at the rung, and did not come there"
    assert gathered.ledger.verify().ok


def test_a_fork_that_is_refused_is_recorded_and_the_trial_goes_on(gathered: Store) -> None:
    before = gathered.ledger.reservation(SECOND)
    new = a_fork(noise_multiplier=0.5)
    assert gathered.gatherings.replace(SECOND, RUNG, new, "too bad") == SECOND
    row, refused = row_of(gathered, SECOND), row_of(gathered, FORK)
    assert (row.state, row.reason) == ("PAUSED", "")
    assert SECOND in [each.trial_id for each in gathered.runnable(SWEEP)]
    assert gathered.ledger.reservation(SECOND) == before
    assert refused.state == "REJECTED"
    assert "would be taken of 4 at delta" in refused.reason
    assert (refused.parent_trial_id, refused.parent_step) == (FIRST, RUNG)
    assert refused.config == new.config
    assert refused.planned_epsilon > TWO_TRIALS
    again = RefusedFork(
        parent_trial_id=FIRST, parent_step=RUNG, config=new.config, epsilon=None, reason="no"
    )
    assert gathered.gatherings.keep(SECOND, RUNG, again) is None, "it does not wait any more"
    # It keeps no checkpoint from being forgotten.
    gathered.gatherings.go_on(FIRST, RUNG)
    attempt = gathered.attempts.begin(FIRST)
    forgotten: list[str] = []
    for step in (2 * RUNG, 3 * RUNG):
        go_to(gathered, attempt, step)
        forgotten += gathered.attempts.checkpoint(attempt, step, f"/elsewhere/{step}")
    assert forgotten == ["/somewhere"]
    assert gathered.ledger.verify().ok


def test_a_trial_makes_room_with_the_fork_or_not_at_all(
    engine: sa.Engine, gathered: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(engine)
    tell = rows.tell

    def cut_off(*arguments: Any) -> None:
        if arguments[3] == "trial_start":
            raise KeyboardInterrupt
        tell(*arguments)

    with monkeypatch.context() as broken:
        broken.setattr("sweeps.database.rows.tell", cut_off)
        with pytest.raises(KeyboardInterrupt):
            gathered.gatherings.replace(SECOND, RUNG, a_fork(), "too bad")
    assert everything(engine) == before
    assert gathered.gatherings.replace(SECOND, RUNG, a_fork(), "too bad") == FORK
