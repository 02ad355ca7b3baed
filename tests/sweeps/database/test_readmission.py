"""Trials that ended go on where the budget allows, for what they had not paid."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import accounting
from accounting.policies import Policy
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import Store
from sweeps.errors import StoreError
from tests.sweeps.database.small_sweep import (
    FIRST,
    PLAN,
    ROOMY,
    TRIAL,
    a_branch,
    a_full_trial,
    a_sweep,
    everything,
    go_to,
    kinds,
    ledger_charge,
    row_of,
    run_to,
    state_of,
)

OTHER = "s-1-001"


def epsilon_of(iterations: int) -> float:
    mechanism = a_full_trial(0).mechanism
    assert isinstance(mechanism, accounting.Mechanism)
    return accounting.epsilon(mechanism.after(iterations), delta=1e-5)


def end(store: Store, state: TrialState, step: int, trial_id: str = TRIAL) -> None:
    """Has a trial end in a state with so many steps paid."""
    attempt = store.attempts.begin(trial_id)
    if state in (TrialState.COMPLETED, TrialState.DIVERGED):
        go_to(store, attempt, step, end=state)
        return
    if step:
        go_to(store, attempt, step)
    store.end_trial(trial_id, state, "why")


def sweep_of(store: Store, policy: Policy, epsilon: float, trials: int = 2) -> None:
    """Records a sweep under a policy."""
    sweep = a_sweep(epsilon=epsilon, policy=policy)
    store.create_sweep(sweep, [a_full_trial(number) for number in range(trials)])
    assert {row.state for row in store.trials("s-1")} == {"ADMITTED"}


def readmit_dry_and_really(store: Store, iterations: Mapping[str, int | None]) -> list[Any]:
    """The decisions, of which a dry run says the same and after which nothing is other."""
    engine = store.ledger.engine
    before, head = everything(engine), store.ledger.head()
    said = store.readmit(iterations, dry_run=True)
    assert everything(engine) == before
    assert store.ledger.head() == head
    done = store.readmit(iterations)
    assert done == said
    assert store.ledger.verify().ok
    return done


@pytest.mark.parametrize("policy", ["per_trial", "open", "declared"])
@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.CANCELLED, TrialState.FAILED])
def test_a_trial_goes_on_to_where_it_was_to_end(
    empty_store: Store, state: TrialState, policy: Policy
) -> None:
    store = empty_store
    sweep_of(store, policy, epsilon=12.0)
    end(store, state, 40)
    (decision,) = readmit_dry_and_really(store, {TRIAL: None})
    assert decision.admitted
    assert (decision.state, decision.step, decision.iterations) == (state, 40, PLAN)
    assert decision.new_iterations == PLAN - 40
    assert decision.epsilon == epsilon_of(40)
    assert decision.epsilon_after == epsilon_of(PLAN)
    row = row_of(store)
    assert (row.state, row.reason, row.exempt) == ("ADMITTED", "", True)
    assert (row.planned_iterations, row.planned_epsilon) == (PLAN, epsilon_of(PLAN))
    assert kinds(store)[-1] == ("trial_resume", TRIAL)
    assert [each.trial_id for each in store.runnable("s-1")] == [TRIAL, OTHER]

    attempt = store.attempts.begin(TRIAL)
    go_to(store, attempt, PLAN, end=TrialState.COMPLETED)
    assert (state_of(store), ledger_charge(store)) == ("COMPLETED", PLAN)


@pytest.mark.parametrize("policy", ["per_trial", "open"])
def test_a_completed_trial_goes_on_with_more(empty_store: Store, policy: Policy) -> None:
    store = empty_store
    sweep_of(store, policy, epsilon=12.0)
    end(store, TrialState.COMPLETED, PLAN)
    (decision,) = readmit_dry_and_really(store, {TRIAL: PLAN + 40})
    assert (decision.step, decision.iterations, decision.new_iterations) == (PLAN, PLAN + 40, 40)
    assert (decision.epsilon, decision.epsilon_after) == (epsilon_of(PLAN), epsilon_of(PLAN + 40))
    assert store.attempts.assignment(TRIAL).config.iterations == PLAN + 40
    assert row_of(store).config["iterations"] == PLAN + 40
    assert store.attempts.charge(store.attempts.begin(TRIAL), FIRST, PLAN + 40) == PLAN + 40


def test_a_declared_list_takes_nothing_more(empty_store: Store) -> None:
    sweep_of(empty_store, "declared", epsilon=12.0)
    end(empty_store, TrialState.COMPLETED, PLAN)
    engine = empty_store.ledger.engine
    before = everything(engine)
    (decision,) = readmit_dry_and_really(empty_store, {TRIAL: PLAN + 1})
    assert not decision.admitted
    assert "the declared list was closed" in decision.refusal
    assert (decision.epsilon, decision.epsilon_after) == (epsilon_of(PLAN), None)
    after = everything(engine)
    refused = set(after.pop("ledger_journal")) - set(before.pop("ledger_journal"))
    assert len(refused) == 1
    assert "extension_refused" in refused.pop()
    assert after == before


def test_one_after_the_other_is_decided_on(empty_store: Store) -> None:
    # An open budget holds two plans, and 50 steps more of one trial, and not of both.
    store = empty_store
    terms = accounting.BudgetTerms(epsilon=4.0, delta=1e-5, policy="open")
    store.create_sweep(
        dataclasses.replace(a_sweep(), terms=terms), [a_full_trial(0), a_full_trial(1)]
    )
    assert [row.state for row in store.trials("s-1")] == ["ADMITTED"] * 2
    for trial_id in (TRIAL, OTHER):
        end(store, TrialState.COMPLETED, PLAN, trial_id)
    room = 0
    while store.readmit({TRIAL: PLAN + room + 1}, dry_run=True)[0].admitted:
        room += 1
    assert room > 1
    both = {TRIAL: PLAN + room, OTHER: PLAN + 1}
    first, second = readmit_dry_and_really(store, both)
    assert (first.admitted, second.admitted) == (True, False)
    assert (state_of(store), state_of(store, OTHER)) == ("ADMITTED", "COMPLETED")


def test_a_refused_trial_stays_as_it_was(full: Store) -> None:
    end(full, TrialState.PRUNED, 40)
    before = row_of(full)
    (decision,) = readmit_dry_and_really(full, {TRIAL: 2 * PLAN})
    assert not decision.admitted
    assert "exceed" in decision.refusal
    assert row_of(full) == before


def test_what_branches_took_again_is_kept_in_the_sum(roomy: Store) -> None:
    run_to(roomy, 40)
    roomy.attempts.charge(roomy.attempts.begin(TRIAL), a_branch(2, 30), 45)
    roomy.end_trial(TRIAL, TrialState.PRUNED)
    (decision,) = readmit_dry_and_really(roomy, {TRIAL: None})
    assert (decision.step, decision.new_iterations) == (45, PLAN - 45)
    assert row_of(roomy).planned_iterations == 55 + PLAN - 45
    assert decision.epsilon_after == epsilon_of(55 + PLAN - 45) <= ROOMY


def test_a_trial_that_never_ran_is_reserved_for_again(full: Store) -> None:
    full.end_trial(TRIAL, TrialState.CANCELLED)
    assert full.ledger.reservation(TRIAL).state == "released"
    (decision,) = readmit_dry_and_really(full, {TRIAL: None})
    assert (decision.step, decision.new_iterations, decision.epsilon) == (0, PLAN, 0.0)
    assert full.ledger.reservation(TRIAL).state == "open"


def test_a_trial_may_go_on_to_a_step_that_it_paid_and_never_showed(full: Store) -> None:
    attempt = full.attempts.begin(TRIAL)
    full.attempts.charge(attempt, FIRST, PLAN)
    full.attempts.fail(attempt, "the disk broke")
    (decision,) = readmit_dry_and_really(full, {TRIAL: None})
    assert (decision.admitted, decision.new_iterations) == (True, 0)
    go_to(full, full.attempts.begin(TRIAL), PLAN, end=TrialState.COMPLETED)
    assert ledger_charge(full) == PLAN


def test_a_readmitted_trial_may_begin_though_the_sweep_was_to_stop(full: Store) -> None:
    end(full, TrialState.PRUNED, 40)
    full.set_wish("s-1", Wish.STOP)
    full.readmit({TRIAL: None}, dry_run=True)
    assert full.wish("s-1") is Wish.STOP
    full.readmit({TRIAL: None})
    assert full.attempts.begin(TRIAL).number == 2


def test_a_trial_of_an_ended_sweep_goes_on(full: Store) -> None:
    end(full, TrialState.PRUNED, 40)
    full.end_sweep("s-1", SweepState.COMPLETED)
    full.readmit({TRIAL: None})
    assert TRIAL in [row.trial_id for row in full.runnable("s-1")]


def _running(store: Store) -> None:
    run_to(store, 10)


@pytest.mark.parametrize(
    ("before", "iterations", "message"),
    [
        (_running, None, "is RUNNING; allowed to go on are PRUNED, PAUSED, CANCELLED, FAILED and"),
        (lambda store: None, None, "is ADMITTED; allowed"),
        (lambda store: end(store, TrialState.DIVERGED, 40), None, "is DIVERGED; allowed"),
        (lambda store: end(store, TrialState.COMPLETED, PLAN), None, "has taken 100 steps"),
        (lambda store: end(store, TrialState.COMPLETED, PLAN), PLAN, "has taken 100 steps"),
        (lambda store: end(store, TrialState.PRUNED, 40), 39, "has taken 40 steps; allowed is"),
    ],
    ids=["running", "admitted", "diverged", "completed", "no more", "less"],
)
def test_what_may_not_go_on_is_said_and_nothing_changes(
    full: Store, before: Callable[[Store], None], iterations: int | None, message: str
) -> None:
    before(full)
    end(full, TrialState.PRUNED, 10, OTHER)
    rows = everything(full.ledger.engine)
    for dry_run in (True, False):
        with pytest.raises(StoreError, match=message):
            full.readmit({OTHER: None, TRIAL: iterations}, dry_run=dry_run)
        assert everything(full.ledger.engine) == rows


def test_a_trial_that_was_rejected_or_is_unknown_may_not_go_on(store: Store) -> None:
    with pytest.raises(StoreError, match="is REJECTED; allowed"):
        store.readmit({"s-1-002": None})
    with pytest.raises(StoreError, match="'nope'"):
        store.readmit({"nope": None})
