"""Who waits at a rung for whom, and who is there once everybody has come."""

import pytest

from sweeps.database.gatherings import Gathering
from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.errors import StoreError
from tests.sweeps.database.small_sweep import (
    SWEEP,
    a_sweep,
    a_trial,
    go_to,
    kinds,
    row_of,
    run_to,
)

RUNG = 10
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
    four.add_trial(SWEEP, a_trial(4, TrialState.REJECTED), budget=None, team="")
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
