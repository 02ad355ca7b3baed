"""Branches of noise hold the charge: a step is paid once by each branch that takes it."""

import contextlib
import random

import pytest
import sqlalchemy as sa

from sweeps.database.store import Store
from sweeps.database.tables import branches, reading
from sweeps.errors import OverspentError, StoreError
from tests.sweeps.database.small_sweep import (
    FIRST,
    METRICS,
    PLAN,
    ROOMY,
    TRIAL,
    a_branch,
    a_full_trial,
    a_sweep,
    a_trial,
    charged,
    everything,
    kinds,
    ledger_charge,
    row_of,
    sum_over_branches,
)
from trainer.mechanism.branch import Branch


def branch_rows(store: Store) -> list[tuple[int, int, int]]:
    """The number, the first step and the furthest step of each branch."""
    query = sa.select(branches.c.number, branches.c.start_step, branches.c.charged_step)
    with reading(store.ledger.engine) as connection:
        return [tuple(row) for row in connection.execute(query.order_by(branches.c.number))]


# -- who pays --------------------------------------------------------------------------------


def test_a_later_attempt_repeats_a_branchs_steps_for_free(store: Store) -> None:
    first = store.attempts.begin(TRIAL)
    store.attempts.charge(first, FIRST, 40)
    second = store.attempts.begin(TRIAL)
    steps = (10, 30, 40, 41, 55)
    totals = [store.attempts.charge(second, FIRST, step) for step in steps]
    assert totals == [40, 40, 40, 41, 55]
    assert branch_rows(store) == [(1, 0, 55)]
    assert charged(store) == ledger_charge(store) == 55


def test_a_new_branch_pays_for_the_steps_it_repeats(store: Store) -> None:
    store.attempts.charge(store.attempts.begin(TRIAL), FIRST, 40)
    second = store.attempts.begin(TRIAL)
    again = a_branch(2, start_step=30)
    assert store.attempts.charge(second, again, 30) == 40
    assert store.attempts.charge(second, again, 45) == 55
    assert branch_rows(store) == [(1, 0, 40), (2, 30, 45)]


def test_one_branch_after_another_may_be_gone_on_with(store: Store) -> None:
    other = a_branch(2, start_step=10)
    for branch, step, total in (
        (FIRST, 20, 20),
        (other, 30, 40),
        (FIRST, 25, 45),
        (other, 31, 46),
    ):
        attempt = store.attempts.begin(TRIAL)
        assert store.attempts.charge(attempt, branch, step) == total
    assert charged(store) == 46 == sum_over_branches(store)


def test_a_branch_cannot_begin_where_nobody_was(engine: sa.Engine, store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    with pytest.raises(StoreError, match="cannot begin at step 1; charged are 0"):
        store.attempts.charge(attempt, a_branch(1, 1), 1)
    store.attempts.charge(attempt, FIRST, 40)
    before = everything(engine)
    with pytest.raises(StoreError, match="cannot begin at step 41; charged are 40"):
        store.attempts.charge(attempt, a_branch(2, 41), 41)
    with pytest.raises(StoreError, match="began at step 0, not 10"):
        store.attempts.charge(attempt, Branch(FIRST.branch_id, 10), 41)
    assert everything(engine) == before
    assert store.attempts.charge(attempt, a_branch(2, 40), 41) == 41


def test_a_branch_reports_a_step_once_and_another_branch_again(store: Store) -> None:
    other = a_branch(2)
    for branch in (FIRST, FIRST, other, other):
        attempt = store.attempts.begin(TRIAL)
        store.attempts.charge(attempt, branch, 10)
        store.attempts.report(attempt, branch.branch_id, 10, METRICS)
    found = [(row.branch, row.step, row.charged_iterations) for row in store.reports("s-1")]
    assert found == [(1, 10, 10), (2, 10, 20)]
    assert kinds(store)[3:] == [("metrics", TRIAL)] * 2


def test_a_branch_is_given_to_the_next_worker_as_it_was(full: Store) -> None:
    known = Branch("ab" * 8, 0, "origin", "program", "vmap", 16, 32)
    later = a_branch(2, start_step=5)
    attempt = full.attempts.begin(TRIAL)
    for branch in (known, later):
        full.attempts.charge(attempt, branch, 10)
    assert full.attempts.assignment(TRIAL).branches == [known, later]


# -- beyond what is reserved -----------------------------------------------------------------


def test_a_new_branch_asks_for_what_it_needs_beyond_the_plan(roomy: Store) -> None:
    before = row_of(roomy)
    roomy.attempts.charge(roomy.attempts.begin(TRIAL), FIRST, 40)
    attempt = roomy.attempts.begin(TRIAL)
    roomy.attempts.charge(attempt, a_branch(2), 0)
    after = row_of(roomy)
    assert roomy.ledger.reservation(TRIAL).reserved == after.planned_iterations == 40 + PLAN
    assert before.planned_epsilon < after.planned_epsilon <= ROOMY
    assert roomy.attempts.charge(attempt, a_branch(2), PLAN) == 40 + PLAN
    with pytest.raises(OverspentError, match=f"more than the {40 + PLAN} reserved"):
        roomy.attempts.charge(attempt, a_branch(2), PLAN + 1)
    assert roomy.ledger.verify().ok


def test_a_branch_that_is_gone_on_with_asks_for_nothing(roomy: Store) -> None:
    for _ in range(2):
        roomy.attempts.charge(roomy.attempts.begin(TRIAL), FIRST, 40)
    assert row_of(roomy).planned_iterations == PLAN


def test_where_the_budget_refuses_a_branch_goes_as_far_as_the_plan(full: Store) -> None:
    full.attempts.charge(full.attempts.begin(TRIAL), FIRST, 40)
    attempt = full.attempts.begin(TRIAL)
    again = a_branch(2)
    assert full.attempts.charge(attempt, again, 30) == 70
    row = row_of(full)
    assert row.planned_iterations == PLAN == full.ledger.reservation(TRIAL).reserved
    assert full.attempts.charge(attempt, again, 60) == PLAN
    with pytest.raises(OverspentError, match=f"more than the {PLAN} reserved"):
        full.attempts.charge(attempt, again, 61)
    assert charged(full) == ledger_charge(full) == PLAN
    refused = [entry.kind for entry, _ in full.ledger.entries()]
    assert refused.count("extension_refused") == 1


# -- correlated noise ------------------------------------------------------------------------


def test_new_keys_never_share_a_group_of_correlated_steps(banded: Store) -> None:
    first = banded.attempts.begin(TRIAL)
    assert banded.attempts.charge(first, FIRST, 13) == 13
    second = banded.attempts.begin(TRIAL)
    # 16 for the first: else this step would be the 14th of 16, the second group and no third.
    assert banded.attempts.charge(second, a_branch(2), 1) == 17
    assert charged(banded) == ledger_charge(banded) == 17
    third = banded.attempts.begin(TRIAL)
    assert banded.attempts.charge(third, a_branch(3, 5), 13) == 32
    fourth = banded.attempts.begin(TRIAL)
    assert banded.attempts.charge(fourth, a_branch(4), 0) == 32, "whole groups stay as they are"
    assert charged(banded) == ledger_charge(banded) == 32
    assert banded.ledger.verify().ok


def test_the_branch_that_runs_is_charged_step_by_step(banded: Store) -> None:
    one, two = FIRST, a_branch(2)
    attempt = banded.attempts.begin(TRIAL)
    asked = [(one, 3), (two, 2), (one, 5), (two, 9), (one, 17)]
    totals = [banded.attempts.charge(attempt, branch, step) for branch, step in asked]
    # Each rounds the other up, and what was charged once is never given back.
    assert totals == [3, 8 + 2, 8 + 5, 8 + 9, 16 + 17]


@pytest.mark.parametrize("seed", range(5))
def test_no_order_of_branches_counts_less_than_was_run(banded: Store, seed: int) -> None:
    rng = random.Random(seed)
    steps: dict[Branch, int] = {}  # that each branch has taken
    attempt = banded.attempts.begin(TRIAL)
    with contextlib.suppress(OverspentError):
        while True:
            if rng.random() < 0.4:
                branch = a_branch(len(steps) + 1)
            else:
                branch = rng.choice([*steps, a_branch(len(steps) + 1)])
            more = rng.randint(1, 7)
            banded.attempts.charge(attempt, branch, steps.get(branch, 0) + more)
            steps[branch] = steps.get(branch, 0) + more
    # A unit joins at most every eighth step of a branch.
    assert len(steps) > 1
    assert -(-ledger_charge(banded) // 8) == sum(-(-taken // 8) for taken in steps.values())


def test_rounding_up_ends_where_the_plan_does(banded: Store) -> None:
    banded.attempts.charge(banded.attempts.begin(TRIAL), FIRST, PLAN - 1)
    again = banded.attempts.begin(TRIAL)
    with pytest.raises(OverspentError):
        banded.attempts.charge(again, a_branch(2), 1)
    assert charged(banded) == ledger_charge(banded) == PLAN - 1
    assert banded.attempts.charge(again, FIRST, PLAN) == PLAN


def test_a_frozen_budget_begins_nothing_anew_that_costs(banded: Store) -> None:
    first = banded.attempts.begin(TRIAL)
    banded.attempts.charge(first, FIRST, 13)
    banded.ledger.freeze("s-1", reason="look first")
    with pytest.raises(OverspentError, match="frozen"):
        banded.attempts.charge(first, a_branch(2), 1)
    assert charged(banded) == ledger_charge(banded) == 13
    assert branch_rows(banded) == [(1, 0, 13)]
    banded.ledger.thaw("s-1")
    assert banded.attempts.charge(first, FIRST, 14) == 14


@pytest.mark.parametrize("bands", [1, None])
def test_independent_noise_is_charged_step_by_step(empty_store: Store, bands: int | None) -> None:
    trial = a_trial(0) if bands is None else a_full_trial(0, bands=bands)
    empty_store.create_sweep(a_sweep(), [trial])
    attempts = empty_store.attempts
    attempts.charge(attempts.begin(TRIAL), FIRST, 13)
    assert attempts.charge(attempts.begin(TRIAL), a_branch(2), 0) == 13
    assert charged(empty_store) == ledger_charge(empty_store) == 13
