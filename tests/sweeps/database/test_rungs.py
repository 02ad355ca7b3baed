"""A scheduler's decisions are rows: each is made once, from one report, and outlives its maker."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from sweeps.database.states import TrialState
from sweeps.database.store import Store, open_store
from sweeps.database.tables import reading, rungs, trials, writing
from sweeps.errors import HaltedError, StoreError
from sweeps.home import Home
from sweeps.search import asha, median
from tests.sweeps.database.small_sweep import (
    FIRST,
    METRICS,
    PLAN,
    TRIAL,
    a_branch,
    a_sweep,
    a_trial,
    everything,
    go_to,
    kinds,
    row_of,
    run_to,
    state_of,
)

OTHER = "s-1-001"
RUNGS = [10, 20, 40]


def best_half(utility: float, others: Sequence[float]) -> bool:
    return asha.goes_on(utility, others, 2)


def never(utility: float, others: Sequence[float]) -> bool:
    raise AssertionError("it was decided before")


def decided(store: Store, trial_id: str = TRIAL) -> list[tuple[Any, ...]]:
    """The rung, the step, the utility and the decision, by rung."""
    query = sa.select(rungs.c.rung, rungs.c.step, rungs.c.utility, rungs.c.goes_on)
    query = query.where(rungs.c.trial_id == trial_id).order_by(rungs.c.rung)
    with reading(store.ledger.engine) as connection:
        return [tuple(row) for row in connection.execute(query)]


def test_the_first_to_come_goes_on(store: Store) -> None:
    run_to(store, 10, accuracy=0.1)
    assert store.rungs.decide(TRIAL, RUNGS, best_half) is TrialState.RUNNING
    assert decided(store) == [(10, 10, 0.1, True)]


def test_before_its_first_rung_nothing_is_decided(engine: sa.Engine, store: Store) -> None:
    run_to(store, 9)
    before = everything(engine)
    assert store.rungs.decide(TRIAL, RUNGS, never) is TrialState.RUNNING
    assert everything(engine) == before


def test_a_decision_is_made_once(engine: sa.Engine, store: Store) -> None:
    attempt = run_to(store, 10, accuracy=0.1)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    run_to(store, 10, OTHER, accuracy=0.9)
    go_to(store, attempt, 15, accuracy=0.0)
    before = everything(engine)
    assert store.rungs.decide(TRIAL, RUNGS, never) is TrialState.RUNNING
    assert everything(engine) == before


def test_who_is_behind_is_pruned_and_settled_at_once(store: Store) -> None:
    run_to(store, 10, accuracy=0.9)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    run_to(store, 12, OTHER, accuracy=0.2)
    assert store.rungs.decide(OTHER, RUNGS, best_half) is TrialState.PRUNED
    row = row_of(store, OTHER)
    assert row.state == "PRUNED"
    assert row.reason == (
        "eval_accuracy 0.2000 at step 12 was not among the best of those that had reached step 10"
    )
    reservation = store.ledger.reservation(OTHER)
    assert (reservation.state, reservation.charged, reservation.committed) == ("closed", 12, 12)
    assert decided(store, OTHER) == [(10, 12, 0.2, False)]
    assert kinds(store)[-1] == ("trial_end", OTHER)
    assert store.rungs.decide(OTHER, RUNGS, never) is TrialState.PRUNED


def test_a_decision_that_is_cut_off_is_not_made(
    engine: sa.Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to(store, 10, accuracy=0.9)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    run_to(store, 10, OTHER, accuracy=0.2)
    before = everything(engine)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr("sweeps.database.rows.tell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.rungs.decide(OTHER, RUNGS, best_half)
    assert everything(engine) == before
    assert store.rungs.decide(OTHER, RUNGS, best_half) is TrialState.PRUNED


def test_a_missed_decision_is_made_later_from_the_same_report(store: Store) -> None:
    attempt = run_to(store, 10, accuracy=0.9)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    go_to(store, attempt, 20, accuracy=0.95)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    # The scheduler was away while this trial reported three times.
    late = run_to(store, 9, OTHER, accuracy=0.0)
    for step, accuracy in ((12, 0.91), (18, 0.2), (25, 0.1)):
        go_to(store, late, step, accuracy=accuracy)
    assert store.rungs.decide(OTHER, RUNGS, best_half) is TrialState.PRUNED
    assert decided(store, OTHER) == [(10, 12, 0.91, True), (20, 25, 0.1, False)]


def test_one_report_may_be_beyond_several_rungs(store: Store) -> None:
    run_to(store, 50, accuracy=0.4)
    assert store.rungs.decide(TRIAL, [40, 10, 20], best_half) is TrialState.RUNNING
    assert decided(store) == [(rung, 50, 0.4, True) for rung in RUNGS]


def test_a_branch_that_comes_to_a_rung_again_changes_nothing(store: Store) -> None:
    run_to(store, 10, accuracy=0.9)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    run_to(store, 10, accuracy=0.1, branch=a_branch(2))
    assert store.rungs.decide(TRIAL, RUNGS, never) is TrialState.RUNNING
    assert decided(store) == [(10, 10, 0.9, True)]


def test_an_exempt_trial_is_never_pruned_nor_compared_with(store: Store) -> None:
    with writing(store.ledger.engine) as connection:
        change = trials.update().where(trials.c.trial_id == TRIAL)
        connection.execute(change.values(exempt=True))
    attempt = run_to(store, 10, accuracy=0.0)
    go_to(store, attempt, 40, accuracy=0.0)
    assert store.rungs.decide(TRIAL, RUNGS, never) is TrialState.RUNNING
    assert decided(store) == []


def test_a_utility_that_is_not_finite_is_the_worst_and_nobodys_measure(store: Store) -> None:
    run_to(store, 10, accuracy=float("nan"))
    assert store.rungs.decide(TRIAL, RUNGS, best_half) is TrialState.RUNNING
    assert decided(store) == [(10, 10, None, True)]
    run_to(store, 10, OTHER, accuracy=0.1)
    seen: list[Sequence[float]] = []
    store.rungs.decide(OTHER, RUNGS, lambda _, others: not seen.append(others))
    assert seen == [[]]
    store.rungs.decide(OTHER, RUNGS, never)


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.CANCELLED])
def test_of_a_trial_that_has_ended_nothing_is_decided(
    engine: sa.Engine, store: Store, state: TrialState
) -> None:
    run_to(store, 10)
    store.end_trial(TRIAL, state)
    before = everything(engine)
    assert store.rungs.decide(TRIAL, RUNGS, never) is state
    assert everything(engine) == before


def test_a_trial_that_nobody_knows_is_named(store: Store) -> None:
    with pytest.raises(StoreError, match="'nope'"):
        store.rungs.decide("nope", RUNGS, never)


@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_whose_scheduler_dies_is_pruned_as_ray_would(
    empty_store: Store, home: Home, seed: int
) -> None:
    """Trials that report at every rung in any order; the scheduler is replaced now and then."""
    rng, number_of_trials = random.Random(seed), 8
    empty_store.create_sweep(a_sweep(), [a_trial(number) for number in range(number_of_trials)])
    scheduler = AsyncHyperBandScheduler(
        metric="m", mode="max", max_t=PLAN, grace_period=10, reduction_factor=2
    )
    (bracket,) = scheduler._brackets
    milestones = asha.milestones(10, PLAN, 2)
    assert milestones == [10, 20, 40, 80]
    waiting = {
        row.trial_id: (empty_store.attempts.begin(row.trial_id), list(milestones))
        for row in empty_store.trials("s-1")
    }
    store, ends = empty_store, set()
    while waiting:
        trial_id = rng.choice([*waiting])
        attempt, steps = waiting[trial_id]
        step, accuracy = steps.pop(0), rng.random()
        go_to(store, attempt, step, accuracy=accuracy)
        if rng.random() < 0.3:
            store = open_store(home)
        state = store.rungs.decide(trial_id, milestones, best_half)
        trial: Any = SimpleNamespace(trial_id=trial_id)
        theirs = bracket.on_result(trial, step, accuracy)
        assert (state is TrialState.PRUNED) == (theirs == TrialScheduler.STOP)
        if state is TrialState.PRUNED or not steps:
            ends.add(state)
            del waiting[trial_id]
        if store is not empty_store:
            store.ledger.close()
            store = empty_store
    assert ends == {TrialState.PRUNED, TrialState.RUNNING}


def test_a_completed_trial_stays_in_the_comparison(store: Store) -> None:
    attempt = run_to(store, 10, accuracy=0.9)
    store.rungs.decide(TRIAL, RUNGS, best_half)
    store.attempts.charge(attempt, FIRST, PLAN)
    store.attempts.report(attempt, FIRST.branch_id, PLAN, METRICS, end=TrialState.COMPLETED)
    run_to(store, 10, OTHER, accuracy=0.2)
    assert store.rungs.decide(OTHER, RUNGS, best_half) is TrialState.PRUNED
    assert state_of(store) == "COMPLETED"


# -- at every report -------------------------------------------------------------------------


def as_good_as_half(best: float, means: Sequence[float]) -> bool:
    return median.goes_on(best, means, 1)


def test_at_every_report_a_trial_is_compared_with_the_means_of_the_others(store: Store) -> None:
    attempt = run_to(store, 10, accuracy=0.25)
    for step, accuracy in ((20, 0.5), (30, 1.0), (40, 0.0)):
        go_to(store, attempt, step, accuracy=accuracy)
    assert store.rungs.decide_by_means(TRIAL, 20, as_good_as_half) is TrialState.RUNNING
    assert decided(store) == [(20, 20, 0.5, True), (30, 30, 1.0, True), (40, 40, 1.0, True)]
    other = run_to(store, 10, OTHER, accuracy=0.625)
    go_to(store, other, 20, accuracy=0.0)
    # Its best is from before the grace period; the other's mean is not.
    assert store.rungs.decide_by_means(OTHER, 20, as_good_as_half) is TrialState.RUNNING
    go_to(store, other, 30, accuracy=0.5)
    assert store.rungs.decide_by_means(OTHER, 20, as_good_as_half) is TrialState.PRUNED
    assert decided(store, OTHER) == [(20, 20, 0.625, True), (30, 30, 0.625, False)]
    assert row_of(store, OTHER).reason == (
        "the best eval_accuracy up to step 30, 0.6250, was below the median of the 1 other "
        "trials' means up to there, 0.7500"
    )
    assert store.ledger.reservation(OTHER).committed == 30
    assert store.rungs.decide_by_means(OTHER, 20, never) is TrialState.PRUNED
    assert store.rungs.decide_by_means(TRIAL, 20, never) is TrialState.RUNNING


def test_whose_means_count_at_a_report(empty_store: Store) -> None:
    empty_store.create_sweep(a_sweep(), [a_trial(number) for number in range(6)])
    behind, broken, asked_for, again, ended, last = (f"s-1-00{n}" for n in range(6))
    run_to(empty_store, 10, behind, accuracy=0.125)
    attempt = run_to(empty_store, 10, broken, accuracy=float("nan"))
    go_to(empty_store, attempt, 20, accuracy=0.25)
    run_to(empty_store, 20, asked_for, accuracy=0.375)
    with writing(empty_store.ledger.engine) as connection:
        change = trials.update().where(trials.c.trial_id == asked_for)
        connection.execute(change.values(exempt=True))
    run_to(empty_store, 20, again, accuracy=0.5)
    run_to(empty_store, 20, again, accuracy=1.0, branch=a_branch(2))
    run_to(empty_store, 30, ended, accuracy=0.75)
    empty_store.end_trial(ended, TrialState.CANCELLED)
    run_to(empty_store, 20, last, accuracy=float("nan"))
    seen: list[tuple[float, list[float]]] = []
    empty_store.rungs.decide_by_means(
        last, 10, lambda best, means: not seen.append((best, sorted(means)))
    )
    # Of who has no report in between nothing is known but that it came further.
    assert seen == [(float("-inf"), [0.5])]
    empty_store.rungs.decide_by_means(again, 10, lambda best, _: not seen.append((best, [])))
    assert seen[1:] == [(0.5, [])]
    assert empty_store.rungs.decide_by_means(asked_for, 10, never) is TrialState.RUNNING


def test_a_decision_that_was_missed_is_made_of_a_trial_that_somebody_set_aside(
    store: Store,
) -> None:
    run_to(store, 10, accuracy=0.9)
    attempt = run_to(store, 10, OTHER, accuracy=0.2)
    store.attempts.pause(attempt)
    assert store.rungs.decide(TRIAL, RUNGS, best_half) is TrialState.RUNNING
    assert store.rungs.decide(OTHER, RUNGS, best_half) is TrialState.PRUNED
    assert store.ledger.reservation(OTHER).committed == 10


# -- waiting at a rung -----------------------------------------------------------------------


def best_half_waits(utility: float, others: Sequence[float]) -> bool:
    return len(others) in halves([*others, utility])


def halves(utilities: Sequence[float]) -> list[int]:
    return asha.best(utilities, 2)


def decide(store: Store, trial_id: str) -> TrialState:
    return store.rungs.decide(trial_id, RUNGS, best_half_waits, may_wait=True)


def waiting(store: Store) -> list[str]:
    return [row.trial_id for row in store.rungs.waiting("s-1")]


def test_who_is_not_among_the_best_is_set_aside_by_its_worker_until_it_is(store: Store) -> None:
    attempt = run_to(store, 10, accuracy=0.5)
    assert decide(store, TRIAL) is TrialState.RUNNING
    assert decided(store) == [(10, 10, 0.5, False)]
    assert store.attempts.is_to_wait(attempt)
    assert waiting(store) == [], "its worker has yet to write its checkpoint"
    store.attempts.checkpoint(attempt, 10, "/somewhere")
    store.attempts.wait(attempt)
    row = row_of(store)
    assert (row.state, row.charged_iterations) == ("PAUSED", 10)
    assert (
        row.reason
        == "waits at step 10 until others have come there and it is among the best of them"
    )
    assert store.ledger.reservation(TRIAL).state == "open"
    assert store.sweep("s-1").wish == "", "the sweep goes on"
    assert waiting(store) == [TRIAL]
    assert [row.trial_id for row in store.runnable("s-1")] == [OTHER]
    with pytest.raises(HaltedError, match="waits at step 10"):
        store.attempts.begin(TRIAL)
    assert store.rungs.promote("s-1", halves) is None

    worse = run_to(store, 10, OTHER, accuracy=0.4)
    decide(store, OTHER)
    store.attempts.wait(worse)
    assert store.rungs.promotable("s-1", halves) == TRIAL
    assert store.rungs.promote("s-1", halves) == TRIAL
    assert store.rungs.promotable("s-1", halves) is None
    assert (waiting(store), row_of(store).reason) == ([OTHER], "")
    # Whoever drives next takes it up first, if its driver died in this moment.
    assert [row.trial_id for row in store.runnable("s-1")] == [TRIAL]
    again = store.attempts.begin(TRIAL)
    go_to(store, again, 20, accuracy=0.6)
    assert decide(store, TRIAL) is TrialState.RUNNING
    assert decided(store) == [(10, 10, 0.5, True), (20, 20, 0.6, False)]


def test_a_worker_that_dies_before_it_has_set_its_trial_aside(store: Store) -> None:
    run_to(store, 10, accuracy=0.5)
    decide(store, TRIAL)
    with pytest.raises(HaltedError, match="waits at step 10"):
        store.attempts.begin(TRIAL)
    assert waiting(store) == [TRIAL]
    run_to(store, 10, OTHER, accuracy=0.6)
    store.rungs.decide(OTHER, RUNGS, lambda *_: False, may_wait=True)
    # Its driver died, and nobody begins it.
    assert store.rungs.set_aside(OTHER)
    assert waiting(store) == [TRIAL, OTHER]


def test_who_is_among_the_best_goes_on_and_nothing_is_decided_twice(store: Store) -> None:
    store.attempts.wait(waits := run_to(store, 10, accuracy=0.5))
    assert not store.attempts.is_to_wait(waits), "nothing was decided"
    decide(store, TRIAL)
    run_to(store, 10, OTHER, accuracy=0.6)
    assert decide(store, OTHER) is TrialState.RUNNING
    assert decided(store, OTHER) == [(10, 10, 0.6, True)]
    assert not store.rungs.set_aside(OTHER)
    for trial_id in (TRIAL, OTHER):
        store.rungs.decide(trial_id, RUNGS, never, may_wait=True)


def test_what_a_person_sets_aside_waits_for_the_person(store: Store) -> None:
    attempt = run_to(store, 5)
    store.attempts.pause(attempt)
    assert waiting(store) == []
    assert [row.trial_id for row in store.runnable("s-1")] == [TRIAL, OTHER]
    assert not store.rungs.set_aside(TRIAL)


def test_a_utility_that_is_not_finite_is_never_promoted(store: Store) -> None:
    store.rungs.decide(TRIAL, [], never)
    for trial_id, accuracy in ((TRIAL, float("nan")), (OTHER, 0.1)):
        run_to(store, 10, trial_id, accuracy=accuracy)
        decide(store, trial_id)
        assert store.rungs.set_aside(trial_id)
    assert store.rungs.promotable("s-1", lambda utilities: range(len(utilities))) == OTHER


@pytest.mark.parametrize(("more", "reserved"), [(None, PLAN), (50, PLAN), (PLAN + 20, PLAN + 20)])
def test_one_that_waits_goes_on_at_a_persons_word(
    roomy: Store, more: int | None, reserved: int
) -> None:
    store = roomy
    for trial_id, accuracy in ((TRIAL, 0.5), (OTHER, 0.6)):
        run_to(store, 10, trial_id, accuracy=accuracy)
        store.rungs.decide(trial_id, RUNGS, lambda *_: False, may_wait=True)
        store.rungs.set_aside(trial_id)
    assert waiting(store) == [TRIAL, OTHER]
    (said,) = store.readmit({TRIAL: more}, dry_run=True)
    assert waiting(store) == [TRIAL, OTHER]
    (decision,) = store.readmit({TRIAL: more})
    assert decision == said
    assert decision.admitted
    iterations = more or PLAN
    assert (decision.state, decision.step, decision.iterations) == ("PAUSED", 10, iterations)
    assert decision.new_iterations == iterations - 10
    row = row_of(store)
    assert (row.state, row.reason, row.exempt) == ("PAUSED", "", True)
    assert row.planned_iterations == store.ledger.reservation(TRIAL).reserved == reserved
    assert waiting(store) == [OTHER]
    assert store.rungs.promotable("s-1", halves) == OTHER, "what it reached still counts"
    assert next(row.trial_id for row in store.runnable("s-1")) == TRIAL
    attempt = store.attempts.begin(TRIAL)
    go_to(store, attempt, 20, accuracy=0.0)
    assert store.rungs.decide(TRIAL, RUNGS, never, may_wait=True) is TrialState.RUNNING
    assert not store.attempts.is_to_wait(attempt)
    go_to(store, attempt, iterations, end=TrialState.COMPLETED)
    assert store.ledger.reservation(TRIAL).committed == iterations
    assert ("trial_resume", TRIAL) not in kinds(store), "for MLflow it had not ended"
    assert store.ledger.verify().ok


def test_one_that_waited_in_vain_is_pruned_and_may_go_on_at_a_persons_word(full: Store) -> None:
    run_to(full, 10)
    decide(full, TRIAL)
    full.rungs.set_aside(TRIAL)
    full.end_trial(TRIAL, TrialState.PRUNED)
    assert full.ledger.reservation(TRIAL).committed == 10
    full.readmit({TRIAL: None})
    assert waiting(full) == []
    assert TRIAL in [row.trial_id for row in full.runnable("s-1")]
    attempt = full.attempts.begin(TRIAL)
    go_to(full, attempt, 20, accuracy=0.0)
    assert full.rungs.decide(TRIAL, RUNGS, never, may_wait=True) is TrialState.RUNNING
    assert not full.attempts.is_to_wait(attempt)
