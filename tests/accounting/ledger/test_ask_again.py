"""A request that was refused and is asked again is one that is asked first at that moment."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting import (
    BandedMatrixFactorizationMechanism,
    BudgetExceeded,
    DpSgdMechanism,
    Ledger,
    LedgerError,
    Mechanism,
    Request,
    Reservation,
)
from accounting.renyi import epsilon_of_rdp, step_rdp

DELTA, ORDER = 1e-5, 6.0
numbers = itertools.count()


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    """One for all budgets, whose journal must be sound in the end."""
    ledger = Ledger("sqlite://")
    yield ledger
    found = ledger.verify()
    assert found.ok, found.problems
    ledger.close()


def trial(iterations: int = 10, bands: int | None = None) -> Mechanism:
    """Without sampling, so that what it costs has a closed form and is quick."""
    shared: dict[str, Any] = {
        "noise_multiplier": 20.0,
        "sampling_prob": 1.0,
        "iterations": iterations,
        "neighboring_relation": "zero_out",
    }
    if bands is None:
        return DpSgdMechanism(**shared)
    return BandedMatrixFactorizationMechanism(bands=bands, **shared)


def new_budget(ledger: Ledger, steps: int, policy: Any = "open", name: str = "") -> str:
    """A budget that holds so many steps."""
    name = name or f"budget-{next(numbers)}"
    rdp = steps * step_rdp(trial().step, ORDER)
    ledger.create_budget(
        name,
        dataset="d",
        dataset_fingerprint="f",
        epsilon=epsilon_of_rdp(rdp, DELTA, ORDER) + 1e-9,
        delta=DELTA,
        policy=policy,
        rdp_order=ORDER if policy == "open" else None,
    )
    return name


def ask(ledger: Ledger, budget: str, request_id: str, mechanism: Mechanism, **more: Any) -> str:
    try:
        return ledger.reserve(budget, mechanism, request_id=request_id, **more).state
    except BudgetExceeded:
        return "refused"


def ask_again(ledger: Ledger, request_id: str) -> str:
    try:
        return ledger.ask_again(request_id).state
    except BudgetExceeded:
        return "refused"


def taken(ledger: Ledger, budget: str) -> float:
    level = ledger.status(budget).level
    return level.spent + level.reserved


@given(
    before=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.booleans()), max_size=4),
    wanted=st.integers(1, 150),
    bands=st.sampled_from([None, 7]),
    meanwhile=st.integers(0, 60),
)
def test_asked_again_is_asked_first_at_that_moment(
    ledger: Ledger,
    before: list[tuple[int, int, bool]],
    wanted: int,
    bands: int | None,
    meanwhile: int,
) -> None:
    """Two budgets with the same past, but that one of them refused the request early on."""
    late, first = (new_budget(ledger, 100) for _ in range(2))
    for name in (late, first):
        assert ask(ledger, name, f"{name}-filler", trial(100)) == "open"
    assert ask(ledger, late, f"{late}-r", trial(wanted, bands)) == "refused"
    for name in (late, first):
        ledger.charge(f"{name}-filler", meanwhile)
        ledger.settle(f"{name}-filler")
        for number, (size, charged, settled) in enumerate(before):
            if ask(ledger, name, f"{name}-{number}", trial(size)) == "open":
                ledger.charge(f"{name}-{number}", min(charged, size))
                if settled:
                    ledger.settle(f"{name}-{number}")
    assert ask_again(ledger, f"{late}-r") == ask(ledger, first, f"{first}-r", trial(wanted, bands))
    one, other = (ledger.reservation(f"{name}-r") for name in (late, first))
    assert one.verdict == other.verdict
    assert (one.state, one.reserved, one.charged, one.committed, one.mechanism) == (
        other.state,
        other.reserved,
        other.charged,
        other.committed,
        other.mechanism,
    )
    assert ledger.status(late).level == ledger.status(first).level
    kind = "reserved_later" if one.state == "open" else "refused_again"
    entries = [entry for entry, _ in ledger.entries(late)]
    about = [entry.kind for entry in entries if entry.facts.get("request_id") == f"{late}-r"]
    assert about == ["refused", kind], "the refusal stays beside it"
    if one.state == "open":  # and runs like any other
        for name in (late, first):
            ledger.charge(f"{name}-r", 1)
            ledger.settle(f"{name}-r")
        assert ledger.status(late).level == ledger.status(first).level


def test_only_to_ask_again_is_a_new_decision(ledger: Ledger) -> None:
    budget = new_budget(ledger, 10)
    ask(ledger, budget, f"{budget}-filler", trial(10))
    assert ask(ledger, budget, f"{budget}-r", trial(10)) == "refused"
    ledger.settle(f"{budget}-filler")
    head = ledger.head()
    assert ask(ledger, budget, f"{budget}-r", trial(10)) == "refused"
    assert ledger.head() == head, "a message that comes twice gets the answer that there is"
    admitted = ledger.ask_again(f"{budget}-r")
    head = ledger.head()
    assert ledger.ask_again(f"{budget}-r") == admitted
    assert ledger.reserve(budget, trial(10), request_id=f"{budget}-r") == admitted
    assert ledger.head() == head
    ledger.charge(f"{budget}-r", 3)
    settled = ledger.settle(f"{budget}-r")
    assert ledger.ask_again(f"{budget}-r") == settled
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.ask_again(f"{budget}-nobody")


def test_a_frozen_budget_refuses_again_and_counts_nothing(ledger: Ledger) -> None:
    budget = new_budget(ledger, 10)
    ledger.freeze(budget)
    assert ask(ledger, budget, f"{budget}-r", trial(10)) == "refused"
    with pytest.raises(BudgetExceeded, match="the budget is frozen"):
        ledger.ask_again(f"{budget}-r")
    assert ledger.account(budget).free_rdp() == taken(ledger, budget) == 0
    ledger.thaw(budget)
    assert ledger.ask_again(f"{budget}-r").state == "open"


@pytest.mark.parametrize("policy", ["per_trial", "declared"])
def test_where_a_refusal_is_for_good_nothing_is_asked_again(ledger: Ledger, policy: str) -> None:
    budget = new_budget(ledger, 10, policy)
    assert ask(ledger, budget, f"{budget}-r", trial(10**6)) == "refused"
    refused = ledger.reservation(f"{budget}-r")
    assert not refused.may_be_asked_again
    head = ledger.head()
    with pytest.raises(LedgerError, match="allowed under the policy 'open', and this is"):
        ledger.ask_again(f"{budget}-r")
    assert (ledger.head(), ledger.reservation(f"{budget}-r")) == (head, refused)


def test_a_team_is_asked_again_within_its_own_share(ledger: Ledger) -> None:
    budget = new_budget(ledger, 100)
    ledger.grant(budget, "a", 0.2)
    ledger.grant(budget, "b", 0.5)
    assert ask(ledger, budget, f"{budget}-r", trial(30), team="a") == "refused"
    assert ask_again(ledger, f"{budget}-r") == "refused", "what others have free is not its"
    one = step_rdp(trial().step, ORDER)
    account = ledger.account(budget)
    assert account.free_rdp("a") == pytest.approx(20 * one)
    assert account.free_rdp("b") == pytest.approx(50 * one)
    assert account.free_rdp("nobody") == 0
    ledger.grant(budget, "a", 0.4)
    assert ask_again(ledger, f"{budget}-r") == "open"
    assert ledger.account(budget).free_rdp("a") == pytest.approx(10 * one)


def test_in_one_transaction_each_sees_what_the_others_took(ledger: Ledger) -> None:
    budget = new_budget(ledger, 10)
    with ledger.transaction() as transaction:
        names = [f"{budget}-{number}" for number in range(4)]
        answers = transaction.reserve(
            budget, [Request(request_id=name, mechanism=trial(6)) for name in names]
        )
        assert [answer.state for answer in answers] == ["open"] + ["refused"] * 3
        again: list[Reservation] = [transaction.ask_again(name) for name in names]
        assert [answer.state for answer in again] == ["open"] + ["refused"] * 3
        transaction.settle(names[0])
        again = [transaction.ask_again(name) for name in names[1:]]
        assert [answer.state for answer in again] == ["open", "refused", "refused"]
        transaction.charge(names[1], 6)
    one = step_rdp(trial().step, ORDER)
    assert taken(ledger, budget) == pytest.approx(6 * one, rel=1e-9)
    assert ledger.verify().ok
