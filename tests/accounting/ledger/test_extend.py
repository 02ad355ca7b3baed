"""A reservation that is extended is one that was asked for whole; what a fork pays for."""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    Account,
    BandedMatrixFactorizationMechanism,
    BudgetExceeded,
    BudgetTerms,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Ledger,
    LedgerError,
    Mechanism,
    Request,
    Reservation,
    Selection,
    epsilon,
    epsilon_of_list,
)
from accounting.account import Claim
from accounting.database.connection import reading
from accounting.ledger.tables import tallies
from accounting.mechanism import step_key
from accounting.renyi import epsilon_of_rdp, step_rdp

DELTA, ORDER = 1e-5, 6.0
POLICIES = ["per_trial", "open", "declared"]

numbers = itertools.count()


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    """One for all budgets, whose journal must be sound in the end."""
    ledger = Ledger("sqlite://")
    yield ledger
    found = ledger.verify()
    assert found.ok, found.problems
    ledger.close()


def new_budget(ledger: Ledger, policy: Any = "open", epsilon: float = 4.0) -> str:
    name = f"budget-{next(numbers)}"
    ledger.create_budget(
        name,
        dataset="d",
        dataset_fingerprint="f",
        epsilon=epsilon,
        delta=DELTA,
        policy=policy,
        rdp_order=ORDER if policy == "open" else None,
    )
    return name


def trial(iterations: int = 100, bands: int | None = None, noise: float = 20.0) -> Mechanism:
    """Without sampling, so that what it costs has a closed form and is quick."""
    shared: dict[str, Any] = {
        "noise_multiplier": noise,
        "sampling_prob": 1.0,
        "iterations": iterations,
        "neighboring_relation": "zero_out",
    }
    if bands is None:
        return DpSgdMechanism(**shared)
    return BandedMatrixFactorizationMechanism(bands=bands, **shared)


def affords(policy: str, repetitions: int) -> float:
    """A budget that holds so many steps, all together or by `per_trial` each trial's."""
    if policy == "open":
        return epsilon_of_rdp(repetitions * step_rdp(trial().step, ORDER), DELTA, ORDER) + 1e-9
    return epsilon(trial(repetitions), delta=DELTA)


def tallies_of(ledger: Ledger, budget: str) -> dict[str, tuple[int, int]]:
    query = sa.select(tallies).where(tallies.c.budget == budget)
    with reading(ledger.engine) as connection:
        rows = connection.execute(query).all()
    return {f"{row.team}|{row.step_key}": (row.committed, row.charged) for row in rows}


def refused(operation: Callable[[], Any]) -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as caught:
        operation()
    return caught.value


# -- as if it had never stopped --------------------------------------------------------------


@pytest.mark.parametrize("bands", [None, 7])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_trial_that_is_pruned_and_taken_up_again_is_one_that_ran_through(
    ledger: Ledger, policy: str, bands: int | None
) -> None:
    through, pruned = (new_budget(ledger, policy) for _ in range(2))
    for name in (through, pruned):
        ledger.reserve(name, trial(100, bands), request_id=f"{name}-r")
        ledger.charge(f"{name}-r", 30)
    ledger.settle(f"{pruned}-r")
    assert ledger.extend(f"{pruned}-r", 100).state == "open"
    for finish in (ledger.status, lambda name: ledger.settle(f"{name}-r")):
        assert ledger.status(pruned).level == ledger.status(through).level
        assert tallies_of(ledger, pruned) == tallies_of(ledger, through)
        one, other = (ledger.reservation(f"{name}-r") for name in (through, pruned))
        assert (one.mechanism, one.state, one.reserved) == (
            other.mechanism,
            other.state,
            other.reserved,
        )
        assert (one.charged, one.committed) == (other.charged, other.committed)
        if policy == "per_trial":
            assert one.verdict.epsilon == other.verdict.epsilon
        for name in (through, pruned):
            ledger.charge(f"{name}-r", 100)
            finish(name)


@pytest.mark.parametrize("bands", [None, 7])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_trial_that_grows_before_it_runs_is_one_that_was_asked_for_whole(
    ledger: Ledger, policy: str, bands: int | None
) -> None:
    whole, grown = (new_budget(ledger, policy) for _ in range(2))
    ledger.reserve(whole, trial(100, bands), request_id=f"{whole}-r")
    ledger.reserve(grown, trial(30, bands), request_id=f"{grown}-r")
    ledger.extend(f"{grown}-r", 64)
    after = ledger.extend(f"{grown}-r", 100)
    assert after.mechanism == trial(100, bands)
    assert after.request.mechanism == trial(30, bands)
    assert after.verdict.epsilon == pytest.approx(
        ledger.reservation(f"{whole}-r").verdict.epsilon, rel=1e-12
    )
    assert ledger.status(grown).level == ledger.status(whole).level
    assert tallies_of(ledger, grown) == tallies_of(ledger, whole)
    for name in (whole, grown):
        ledger.charge(f"{name}-r", 40)
        ledger.settle(f"{name}-r")
    assert tallies_of(ledger, grown) == tallies_of(ledger, whole)


# -- what each policy says -------------------------------------------------------------------


def test_by_itself_a_trial_is_decided_on_as_a_whole(ledger: Ledger) -> None:
    name = new_budget(ledger, "per_trial", affords("per_trial", 150))
    ledger.reserve(name, trial(100), request_id=name)
    ledger.charge(name, 100)
    ledger.settle(name)
    after = ledger.extend(name, 150)
    assert after.verdict.epsilon == epsilon(trial(150), delta=DELTA)
    error = refused(lambda: ledger.extend(name, 151))
    assert error.requested == epsilon(trial(151), delta=DELTA)
    assert "exceeds the budget" in error.reason
    assert ledger.reservation(name) == after


def test_under_open_what_was_given_back_is_taken_again_if_it_is_still_there(
    ledger: Ledger,
) -> None:
    name = new_budget(ledger, "open", affords("open", 150))
    ledger.reserve(name, trial(100), request_id=f"{name}-a")
    ledger.charge(f"{name}-a", 30)
    closed = ledger.settle(f"{name}-a")
    ledger.reserve(name, trial(70), request_id=f"{name}-b")
    error = refused(lambda: ledger.extend(f"{name}-a", 100))
    assert "more of Rényi divergence" in error.reason
    assert "iterations <= 80 would fit" in error.reason
    assert error.requested == pytest.approx(70 * step_rdp(trial().step, ORDER), rel=1e-12)
    assert ledger.reservation(f"{name}-a") == closed
    assert ledger.extend(f"{name}-a", 80).reserved == 80
    with pytest.raises(BudgetExceeded, match="81 iterations are more than the 80 reserved"):
        ledger.charge(f"{name}-a", 81)
    assert ledger.charge(f"{name}-a", 80).charged == 80


def test_a_declared_trial_goes_on_up_to_what_was_declared_and_no_further(ledger: Ledger) -> None:
    name = new_budget(ledger, "declared", affords("declared", 200))
    for one in "ab":
        ledger.reserve(name, trial(80), request_id=f"{name}-{one}")
    ledger.extend(f"{name}-b", 100)
    refused(lambda: ledger.extend(f"{name}-b", 121))
    ledger.charge(f"{name}-a", 30)
    for one in "ab":  # of b nothing ran; of a list that was begun it counts all the same
        assert ledger.settle(f"{name}-{one}").state == "closed"
    level, counted = ledger.status(name).level, tallies_of(ledger, name)
    for one, most in (("a", 80), ("b", 100)):
        assert ledger.extend(f"{name}-{one}", 50).reserved == 50
        assert ledger.settle(f"{name}-{one}").state == "closed"
        assert ledger.extend(f"{name}-{one}", 60).verdict.requested == 0
        before = ledger.extend(f"{name}-{one}", most)
        assert before.reserved == most
        error = refused(lambda o=one, m=most: ledger.extend(f"{name}-{o}", m + 1))
        assert "list was closed" in error.reason
        assert ledger.reservation(f"{name}-{one}") == before
    assert ledger.status(name).level == level
    assert tallies_of(ledger, name) == {key: (180, 30) for key in counted}


def test_before_its_list_is_begun_a_declared_trial_grows_as_the_list_would(
    ledger: Ledger,
) -> None:
    name = new_budget(ledger, "declared", affords("declared", 200))
    for one in "abc":
        ledger.reserve(name, trial(50), request_id=f"{name}-{one}")
    assert ledger.settle(f"{name}-c").state == "released"
    refused(lambda: ledger.extend(f"{name}-a", 151))
    assert ledger.extend(f"{name}-a", 140).committed == 140
    refused(lambda: ledger.extend(f"{name}-c", 11))
    assert ledger.extend(f"{name}-c", 10).state == "open"
    assert ledger.status(name).level.reserved == epsilon(trial(200), delta=DELTA)
    assert ledger.settle(f"{name}-c").state == "released"
    ledger.charge(f"{name}-b", 1)
    error = refused(lambda: ledger.extend(f"{name}-c", 1))  # released: it counts for nothing
    assert "list was closed" in error.reason


def test_a_private_selection_is_never_extended(ledger: Ledger) -> None:
    name = new_budget(ledger, "private_selection")
    selection = Selection(candidates=(trial(1),), distribution="geometric", mean=3)
    ledger.reserve(name, selection, request_id=name)
    before = ledger.reservation(name)
    for iterations in (1, 2):
        assert "one draw" in refused(lambda n=iterations: ledger.extend(name, n)).reason
    assert ledger.reservation(name) == before
    kinds = [entry.kind for entry, _ in ledger.entries(name)]
    assert kinds == ["budget_created", "reserved", *["extension_refused"] * 2]


def test_correlated_noise_is_counted_by_whole_groups(ledger: Ledger) -> None:
    name = new_budget(ledger)
    ledger.reserve(name, trial(13, bands=10), request_id=name)
    level = ledger.status(name).level
    assert ledger.extend(name, 20).reserved == 20
    assert ledger.status(name).level == level
    ledger.extend(name, 21)
    one = step_rdp(trial().step, ORDER)
    assert ledger.status(name).level.reserved == pytest.approx(3 * one, rel=1e-12)
    ledger.charge(name, 11)
    ledger.settle(name)
    assert ledger.status(name).level.reserved == 0
    assert ledger.status(name).level.spent == pytest.approx(2 * one, rel=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_full_budget_takes_up_what_adds_nothing(ledger: Ledger, policy: str) -> None:
    name = new_budget(ledger, policy, affords(policy, 5))
    ledger.reserve(name, trial(45, bands=10), request_id=name)
    ledger.charge(name, 42)
    ledger.settle(name)
    assert ledger.extend(name, 50).state == "open"
    refused(lambda: ledger.extend(name, 51))


@pytest.mark.parametrize("policy", ["open", "declared"])
def test_what_adds_nothing_is_admitted_however_the_sum_is_rounded(policy: Any) -> None:
    terms = BudgetTerms(epsilon=affords(policy, 100), delta=DELTA, policy=policy)
    account = Account(terms)
    account.commit(trial(200))  # as if it had been computed with other rounding
    fits = [
        account.decide([Claim(spending=trial(n), committed=200)])[0].admitted for n in (200, 201)
    ]
    assert fits == [True, False]


# -- who may ask, and when -------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["open", "declared"])
def test_a_team_extends_within_its_share(ledger: Ledger, policy: str) -> None:
    name = new_budget(ledger, policy)
    ledger.grant(name, "a", 0.5)
    ledger.grant(name, "b", 0.5)
    ledger.reserve(name, trial(1), request_id=f"{name}-a", team="a")
    ledger.reserve(name, trial(1), request_id=f"{name}-b", team="b")
    fits = ledger.account(name).copies_that_fit(trial(1), "a") + 1
    ledger.extend(f"{name}-a", fits)
    refused(lambda: ledger.extend(f"{name}-a", fits + 1))
    assert ledger.extend(f"{name}-b", fits).team == "b"


def test_who_has_no_share_extends_nothing(ledger: Ledger) -> None:
    name = new_budget(ledger)
    ledger.reserve(name, trial(10), request_id=name)
    ledger.grant(name, "a", 0.5)
    assert "no team is named" in refused(lambda: ledger.extend(name, 11)).reason


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_extended_of_a_budget_that_stands_still(ledger: Ledger, policy: str) -> None:
    name = new_budget(ledger, policy)
    ledger.reserve(name, trial(10), request_id=name)
    before = ledger.extend(name, 20)
    ledger.freeze(name)
    assert "is frozen" in refused(lambda: ledger.extend(name, 21)).reason
    assert ledger.extend(name, 20) == before
    ledger.thaw(name)
    assert ledger.extend(name, 21).reserved == 21
    ledger.retire(name)
    assert "is retired" in refused(lambda: ledger.extend(name, 21)).reason
    assert ledger.reservation(name).state == "released"


def test_what_was_refused_or_never_asked_for_is_not_extended(ledger: Ledger) -> None:
    name = new_budget(ledger, "per_trial", affords("per_trial", 10))
    refused(lambda: ledger.reserve(name, trial(100), request_id=name))
    head = ledger.head()
    with pytest.raises(LedgerError, match="reserve under another request_id"):
        ledger.extend(name, 1)
    with pytest.raises(LedgerError, match="not in the ledger"):
        ledger.extend("unknown", 1)
    assert ledger.head() == head


def test_no_extension_covers_less_than_was_charged(ledger: Ledger) -> None:
    name = new_budget(ledger)
    ledger.reserve(name, trial(10), request_id=name)
    ledger.charge(name, 6)
    for settle in (False, True):
        if settle:
            ledger.settle(name)
        head = ledger.head()
        for bad in (5, 0, -1, 6.0, None, 10**13):
            with pytest.raises(InvalidPrivacyParameter, match="iterations must be"):
                ledger.extend(name, bad)  # pyright: ignore[reportArgumentType]
        assert ledger.head() == head
    assert ledger.extend(name, 6).state == "open"


# -- again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_an_extension_made_again_changes_nothing(ledger: Ledger, policy: str) -> None:
    name = new_budget(ledger, policy)
    first = ledger.reserve(name, trial(10), request_id=name)
    after = ledger.extend(name, 20)
    head = ledger.head()
    for iterations in (20, 15, 1):
        assert ledger.extend(name, iterations) == after
    # What was asked for at first is still what the id stands for.
    assert ledger.reserve(name, trial(10), request_id=name) == after
    assert after.request == first.request
    with pytest.raises(LedgerError, match="was another one"):
        ledger.reserve(name, trial(20), request_id=name)
    assert ledger.head() == head
    refused(lambda: ledger.extend(name, 10**9))
    assert ledger.extend(name, 20) == after
    entry, _ = list(ledger.entries(name))[-1]
    assert entry.kind == "extension_refused"
    assert entry.facts["iterations"] == 10**9
    assert entry.facts["verdict"]["admitted"] is False


def test_moves_in_one_transaction_see_an_extension(ledger: Ledger) -> None:
    name = new_budget(ledger, "open", affords("open", 100))
    ids = [f"{name}-a", f"{name}-b"]
    with ledger.transaction() as transaction:
        transaction.reserve(name, [Request(request_id=i, mechanism=trial(10)) for i in ids])
        first = transaction.extend(ids[0], 90)
        second = transaction.extend(ids[1], 11)
        transaction.charge(ids[0], 20)
        transaction.settle(ids[0])
        third = transaction.extend(ids[1], 80)
        fourth = transaction.extend(ids[0], 21)
    assert not isinstance(first, BudgetExceeded)
    assert isinstance(second, BudgetExceeded)
    assert not isinstance(third, BudgetExceeded)
    assert isinstance(fourth, BudgetExceeded)
    assert second.spent == 0
    assert fourth.spent == pytest.approx(20 * step_rdp(trial().step, ORDER), rel=1e-12)
    assert list(tallies_of(ledger, name).values()) == [(100, 20)]


# -- forks -----------------------------------------------------------------------------------


def run(ledger: Ledger, budget: str, iterations: int, **more: Any) -> str:
    """A trial that was charged and settled."""
    request_id = f"{budget}-{next(numbers)}"
    ledger.reserve(budget, trial(iterations, **more), request_id=request_id)
    ledger.charge(request_id, iterations)
    ledger.settle(request_id)
    return request_id


def test_by_itself_a_fork_pays_for_what_it_goes_on_from(ledger: Ledger) -> None:
    name = new_budget(ledger, "per_trial", affords("per_trial", 150))
    prefix = (trial(60), trial(40, bands=4))
    fork = ledger.reserve(name, trial(80), request_id=f"{name}-f", prefix=prefix)
    assert fork.verdict.epsilon == epsilon(trial(60 + 10 + 80), delta=DELTA)
    error = refused(lambda: ledger.reserve(name, trial(81), request_id=f"{name}-g", prefix=prefix))
    assert error.requested == epsilon(trial(151), delta=DELTA)
    assert "parameters that the trial starts from" in error.reason
    error = refused(lambda: ledger.extend(f"{name}-f", 81))
    assert error.requested == epsilon(trial(151), delta=DELTA)
    louder = trial(20, noise=30.0)
    other = ledger.reserve(name, louder, request_id=f"{name}-h", prefix=prefix[:1])
    assert other.verdict.epsilon == epsilon_of_list(
        {trial().step: 60, louder.step: 20}, delta=DELTA
    )
    assert sum(committed for committed, _ in tallies_of(ledger, name).values()) == 80 + 20


def test_under_open_a_fork_pays_for_its_own_steps_alone(ledger: Ledger) -> None:
    name = new_budget(ledger, "open", affords("open", 150))
    run(ledger, name, 100)
    fork = ledger.reserve(name, trial(50), request_id=name, prefix=(trial(100),))
    assert fork.verdict.requested == pytest.approx(50 * step_rdp(trial().step, ORDER), rel=1e-12)
    ledger.charge(name, 20)
    ledger.settle(name)
    assert ledger.extend(name, 50).request.prefix == (trial(100),)
    refused(lambda: ledger.extend(name, 51))


@pytest.mark.parametrize("policy", ["open", "declared"])
def test_a_fork_of_what_another_budget_paid_for_is_refused(ledger: Ledger, policy: str) -> None:
    name = new_budget(ledger, policy)
    ledger.reserve(name, trial(30), request_id=f"{name}-parent")
    for number, prefix in enumerate(
        [(trial(31),), (trial(20), trial(20)), (trial(1, None, 9.0),)]
    ):
        error = refused(
            lambda n=number, p=prefix: ledger.reserve(
                name, trial(5), request_id=f"{name}-{n}", prefix=p
            )
        )
        assert "does not count in this budget" in error.reason
    if policy == "open":  # what is reserved only has not been spent
        ledger.charge(f"{name}-parent", 20)
        refused(
            lambda: ledger.reserve(name, trial(5), request_id=f"{name}-early", prefix=(trial(21),))
        )
        ledger.charge(f"{name}-parent", 30)
    prefix = (trial(20), trial(10))
    assert ledger.reserve(name, trial(5), request_id=name, prefix=prefix).state == "open"


def test_a_declared_list_takes_forks_until_it_is_begun(ledger: Ledger) -> None:
    name = new_budget(ledger, "declared")
    requests = [
        Request(request_id=f"{name}-fork", mechanism=trial(20), prefix=(trial(30),)),
        Request(request_id=f"{name}-parent", mechanism=trial(30)),
    ]
    assert [a.state for a in ledger.reserve_together(name, requests)] == ["open"] * 2
    assert ledger.status(name).level.reserved == epsilon(trial(50), delta=DELTA)
    ledger.charge(f"{name}-parent", 30)
    error = refused(lambda: ledger.reserve(name, trial(1), request_id=name, prefix=(trial(30),)))
    assert "list was closed" in error.reason
    ledger.charge(f"{name}-fork", 10)
    ledger.settle(f"{name}-fork")
    assert ledger.extend(f"{name}-fork", 20).state == "open"


def test_a_private_selection_goes_on_from_nothing(ledger: Ledger) -> None:
    name = new_budget(ledger, "private_selection")
    selection = Selection(candidates=(trial(1),), distribution="geometric", mean=3)
    error = refused(lambda: ledger.reserve(name, selection, request_id=name, prefix=(trial(1),)))
    assert "no trial goes on from another" in error.reason


def test_what_a_fork_goes_on_from_is_part_of_the_request(ledger: Ledger) -> None:
    name = new_budget(ledger, "per_trial")
    prefix = (trial(30), trial(7, bands=3))
    fork = ledger.reserve(name, trial(20), request_id=name, prefix=prefix)
    assert ledger.reserve(name, trial(20), request_id=name, prefix=prefix) == fork
    assert Ledger(ledger.engine).reservation(name) == fork
    assert fork.request.prefix == prefix
    assert fork.to_json()["prefix"] == [one.to_json() for one in prefix]
    for other in ((), prefix[:1], prefix[::-1], (*prefix, trial(1))):
        with pytest.raises(LedgerError, match="was another one"):
            ledger.reserve(name, trial(20), request_id=name, prefix=other)
    entry, _ = list(ledger.entries(name))[-1]
    assert entry.facts["request"]["prefix"] == [one.to_json() for one in prefix]


@pytest.mark.parametrize("bad", [None, [], [trial()], trial(), (None,), (trial(), 3), "x"])
def test_a_prefix_is_a_tuple_of_mechanisms(bad: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="prefix must be a tuple of Mechanism, got"):
        Request(request_id="r", mechanism=trial(), prefix=bad)


def test_a_prefix_is_of_the_budgets_relation_and_unit(ledger: Ledger) -> None:
    name = new_budget(ledger)
    others: list[dict[str, Any]] = [
        {"neighboring_relation": "add_or_remove_one"},
        {"neighboring_relation": "zero_out", "privacy_unit": "user"},
    ]
    for other in others:
        prefix = DpSgdMechanism(noise_multiplier=20.0, sampling_prob=1.0, iterations=1, **other)
        with pytest.raises(InvalidPrivacyParameter, match="as of the budget"):
            ledger.reserve(name, trial(), request_id=name, prefix=(prefix,))
    assert ledger.reservation_ids(name) == []


def test_an_account_in_memory_decides_as_the_ledger_does(ledger: Ledger) -> None:
    name = new_budget(ledger, "open", affords("open", 100))
    ledger.reserve(name, trial(60), request_id=name)
    account = ledger.account(name)
    claims = [Claim(spending=trial(n), committed=60) for n in (100, 101, 50)]
    asked = [account.decide([claim])[0].admitted for claim in claims]
    assert asked == [True, False, True]
    account.commit(claims[0])
    assert account.tallies[""].committed == collections.Counter({trial().step: 100})


# -- against a model -------------------------------------------------------------------------

NAMES = [f"r{number}" for number in range(4)]
BANDS = {"r0": None, "r1": None, "r2": 7, "r3": 3}
FULL = 200
moves = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "charge", "settle", "extend", "extend"]),
        st.sampled_from(NAMES),
        st.integers(1, 260),
    ),
    min_size=6,
    max_size=25,
)


class Model:
    """What a budget of so many steps holds, in whole steps."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.rows: dict[str, dict[str, Any]] = {}

    def repetitions(self, name: str, iterations: int) -> int:
        return -(-iterations // (BANDS[name] or 1))

    def total(self, field: str) -> int:
        return sum(self.repetitions(name, row[field]) for name, row in self.rows.items())

    @property
    def begun(self) -> bool:
        return any(row["charged"] for row in self.rows.values())

    def fits(self, name: str, iterations: int, committed: int) -> bool:
        if self.policy == "per_trial":
            return self.repetitions(name, iterations) <= FULL
        more = self.repetitions(name, iterations) - self.repetitions(name, committed)
        if more <= 0:
            return True
        closed = self.policy == "declared" and self.begun
        return not closed and self.total("committed") + more <= FULL

    def reserve(self, name: str, iterations: int) -> Any:
        if not self.fits(name, iterations, 0):
            return BudgetExceeded
        state = {"state": "open", "reserved": iterations, "committed": iterations, "charged": 0}
        self.rows[name] = state
        return state

    def charge(self, name: str, iterations: int) -> Any:
        row = self.rows[name]
        if iterations <= row["charged"]:
            return row
        if row["state"] != "open":
            return LedgerError
        if iterations > row["reserved"]:
            return BudgetExceeded
        row["charged"] = iterations
        return row

    def settle(self, name: str, _iterations: int) -> Any:
        row = self.rows[name]
        if row["state"] == "open":
            keeps = self.policy == "declared" and self.begun
            row["state"] = "closed" if row["charged"] or keeps else "released"
            if not keeps:
                row["committed"] = row["charged"]
        return row

    def extend(self, name: str, iterations: int) -> Any:
        row = self.rows[name]
        if iterations < row["charged"]:
            return InvalidPrivacyParameter
        if row["state"] == "open" and iterations <= row["reserved"]:
            return row
        if not self.fits(name, iterations, row["committed"]):
            return BudgetExceeded
        most = max(row["committed"], iterations)
        row |= {"state": "open", "reserved": iterations, "committed": most}
        return row


@pytest.mark.slow
@settings(max_examples=250)
@given(policy=st.sampled_from(POLICIES), plan=moves)
def test_whatever_is_done_in_whatever_order_a_ledger_is_what_the_model_says(
    ledger: Ledger, policy: str, plan: list[tuple[str, str, int]]
) -> None:
    budget = new_budget(ledger, policy, affords(policy, FULL))
    model = Model(policy)
    for number, (move, name, iterations) in enumerate(plan):
        if (move == "reserve") == (name in model.rows):
            continue
        wanted = getattr(model, move)(name, iterations)
        request_id = f"{budget}-{name}"
        if move == "reserve" and wanted is BudgetExceeded:
            request_id += f"-{number}"  # a refusal is for good

        def operation(
            move: str = move, name: str = name, n: int = iterations, request_id: str = request_id
        ) -> Reservation:
            if move == "reserve":
                return ledger.reserve(budget, trial(n, BANDS[name]), request_id=request_id)
            if move == "settle":
                return ledger.settle(request_id)
            return getattr(ledger, move)(request_id, n)

        if isinstance(wanted, type):
            with pytest.raises(wanted):
                operation()
        else:
            answer = operation()
            head = ledger.head()
            assert operation() == answer
            assert ledger.head() == head
        for one, row in model.rows.items():
            held = ledger.reservation(f"{budget}-{one}")
            assert {field: getattr(held, field) for field in row} == row
            assert held.mechanism == trial(row["reserved"], BANDS[one])
    counted = (model.total("committed"), model.total("charged"))
    expected = {f"|{step_key(trial().step)}": counted} if model.rows else {}
    assert tallies_of(ledger, budget) == expected
    level = ledger.status(budget).level
    assert level.epsilon <= affords(policy, FULL)
    assert level.spent + level.reserved <= level.limit
