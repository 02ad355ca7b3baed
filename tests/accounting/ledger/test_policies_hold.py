"""What a ledger admits never exceeds its budget, whatever is asked of it and in whatever order.

The judge is another: the accounting library's Rényi divergences at whole orders, where they are
exact, the trapezoidal rule between them, and the closed form of the Gaussian mechanism.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accounting import (
    BandedMatrixFactorizationMechanism,
    BudgetExceeded,
    BudgetTerms,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Ledger,
    Mechanism,
    Reservation,
    Selection,
    default_rdp_order,
    selection_epsilon,
)
from accounting.renyi import step_rdp

ROUNDING = 1 + 1e-6
TIGHT = 0.99
"""A refusal must be for more than this part of the budget."""

numbers = itertools.count()
deltas = st.sampled_from([1e-3, 1e-5, 1e-7])
epsilons = st.floats(-0.5, 1.3).map(lambda power: 10**power)


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    """One for all budgets, whose journal must be sound in the end."""
    ledger = Ledger("sqlite://")
    yield ledger
    assert ledger.verify().ok
    ledger.close()


def new_budget(ledger: Ledger, **terms: Any) -> str:
    name = f"budget-{next(numbers)}"
    ledger.create_budget(name, dataset="d", dataset_fingerprint="f", **terms)
    return name


@st.composite
def steps(draw: st.DrawFn) -> Mechanism:
    """A mechanism whose number of iterations is still to be chosen."""
    noise = 10 ** draw(st.floats(-0.3, 1))
    sampling_prob = draw(st.just(1.0) | st.floats(-3, -0.01).map(lambda power: 10**power))
    bands = draw(st.sampled_from([None, None, 1, 3, 10]))
    shared: dict[str, Any] = {
        "noise_multiplier": noise,
        "sampling_prob": sampling_prob,
        "iterations": 1,
        "neighboring_relation": "zero_out",
    }
    if bands is None:
        return DpSgdMechanism(**shared)
    return BandedMatrixFactorizationMechanism(bands=bands, **shared)


def repetitions(mechanism: Mechanism, iterations: int) -> int:
    """How often Gaussian noise is drawn for one person, in the judge's own words."""
    return math.ceil(iterations / getattr(mechanism, "bands", 1))


@functools.cache
def library_rdp(noise: float, sampling_prob: float, order: float) -> float:
    if sampling_prob == 1:
        return order / (2 * noise**2)
    accountant = RdpAccountant([order])
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian))
    return float(vars(accountant)["_rdp"][0])


@functools.cache
def rdp_by_trapezoids(noise: float, sampling_prob: float, order: float) -> float:
    """The larger divergence of both directions, from the definition."""
    if sampling_prob == 1:
        return order / (2 * noise**2)
    z = np.arange(-14 * noise, 14 * noise + 2 * order, noise / 100)
    log_weight = -((z / noise) ** 2) / 2 - math.log(100 * math.sqrt(2 * math.pi))
    excess = sampling_prob * np.expm1((2 * z - 1) / (2 * noise**2))
    moments = []
    for power in (order, 1 - order):  # the mean of (1 + x)^power, where that of x is zero
        exponent = power * np.log1p(excess)
        near = exponent < 1
        rest = np.expm1(exponent, where=near, out=np.full_like(z, -1)) - power * excess
        far = float(np.logaddexp.reduce(np.where(near, -np.inf, log_weight + exponent)))
        rest = float(np.sum(np.exp(log_weight) * rest))
        moments.append(math.log1p(rest + math.exp(far)) if far < 30 else far)
    return max(moments) / (order - 1)


class Play:
    """Moves on one budget, and what they have taken in the eyes of the judge."""

    def __init__(self, ledger: Ledger, name: str, pool: list[Mechanism]) -> None:
        self.ledger, self.name, self.pool = ledger, name, pool
        self.reserved: dict[str, Mechanism] = {}
        self.teams: dict[str, str] = {}
        self.charged: dict[str, int] = {}
        self.settled: set[str] = set()

    def reserve(self, mechanism: Mechanism, team: str = "") -> Reservation | BudgetExceeded:
        request_id = f"{self.name}-{len(self.teams)}"
        self.teams[request_id] = team
        try:
            answer = self.ledger.reserve(self.name, mechanism, request_id=request_id, team=team)
        except BudgetExceeded as refusal:
            return refusal
        self.reserved[request_id], self.charged[request_id] = mechanism, 0
        return answer

    def pick(self, index: int) -> str | None:
        running = [name for name in self.reserved if name not in self.settled]
        return running[index % len(running)] if running else None

    def charge(self, index: int, part: float) -> None:
        request_id = self.pick(index)
        if request_id is not None:
            iterations = math.ceil(self.reserved[request_id].iterations * part)
            self.ledger.charge(request_id, iterations)
            self.charged[request_id] = max(self.charged[request_id], iterations)

    def settle(self, index: int) -> None:
        request_id = self.pick(index)
        if request_id is not None:
            self.ledger.settle(request_id)
            self.settled.add(request_id)

    def counts(self, *, charged: bool = False, team: str | None = None) -> list[Any]:
        """Mechanisms and how often each is repeated: what is taken, or charged."""
        return [
            (
                mechanism,
                repetitions(
                    mechanism,
                    self.charged[name]
                    if charged or name in self.settled
                    else mechanism.iterations,
                ),
            )
            for name, mechanism in self.reserved.items()
            if team in (None, self.teams[name])
        ]


def rdp_of(counts: list[Any], order: float, judge: Any) -> float:
    return math.fsum(
        count * judge(mechanism.noise_multiplier, mechanism.sampling_prob, order)
        for mechanism, count in counts
    )


def epsilon_of(counts: list[Any], order: float, delta: float, judge: Any = library_rdp) -> float:
    rdp = rdp_of(counts, order, judge)
    return rdp_privacy_accountant.compute_epsilon([order], [rdp], delta)[0] if rdp else 0.0


moves = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "reserve", "charge", "settle"]),
        st.integers(0, 100),
        st.floats(-2, 0.3),
        st.floats(0, 1),
    ),
    min_size=4,
    max_size=14,
)


def asked(terms: BudgetTerms, mechanism: Mechanism, power: float, taken: float = 0.0) -> Mechanism:
    """So many iterations as take 10^power of a budget; from 1 on, about what is left of it."""
    part = 10**power
    if power > 0 and taken > 0:
        part = max(0.0, 0.972 + power / 5 - taken / terms.rdp_limit)
    most = terms.rdp_limit / step_rdp(mechanism.step, terms.order)
    bands = getattr(mechanism, "bands", 1)
    return mechanism.after(min(max(1, round(most * part * bands)), 10**10))


def play_open(ledger: Ledger, terms: BudgetTerms, pool: list[Mechanism], plan: Any, judge: Any):
    name = new_budget(
        ledger,
        epsilon=terms.epsilon,
        delta=terms.delta,
        policy="open",
        rdp_order=terms.rdp_order,
    )
    order = terms.order
    play = Play(ledger, name, pool)
    for move, index, power, part in plan:
        if move == "charge":
            play.charge(index, part)
        elif move == "settle":
            play.settle(index)
        else:
            taken = rdp_of(play.counts(), order, judge)
            request = asked(terms, pool[index % len(pool)], power, taken)
            more = [(request, repetitions(request, request.iterations))]
            would_be = epsilon_of([*play.counts(), *more], order, terms.delta, judge)
            if isinstance(play.reserve(request), Reservation):
                assert would_be <= terms.epsilon * ROUNDING
            else:
                assert would_be > terms.epsilon * TIGHT
    level = ledger.status(name).level
    taken = rdp_of(play.counts(), order, judge)
    spent = rdp_of(play.counts(charged=True), order, judge)
    assert level.spent == pytest.approx(spent, rel=1e-6)
    assert level.spent + level.reserved == pytest.approx(taken, rel=1e-6)
    assert level.epsilon <= terms.epsilon


@pytest.mark.slow
@settings(max_examples=600)
@given(
    epsilon=epsilons,
    delta=deltas,
    shift=st.integers(-1, 3),
    pool=st.lists(steps(), min_size=1, max_size=3),
    plan=moves,
)
def test_open_admits_nothing_over_budget_and_refuses_only_what_is(
    ledger: Ledger, epsilon: float, delta: float, shift: int, pool: list[Mechanism], plan: Any
) -> None:
    order = float(max(2, round(default_rdp_order(epsilon, delta)) + shift))
    try:
        terms = BudgetTerms(epsilon=epsilon, delta=delta, policy="open", rdp_order=order)
    except InvalidPrivacyParameter:
        assume(False)  # nothing fits at that order
        raise
    play_open(ledger, terms, pool, plan, library_rdp)


@pytest.mark.slow
@settings(max_examples=80)
@given(
    epsilon=epsilons,
    delta=deltas,
    pool=st.lists(steps(), min_size=1, max_size=3),
    plan=moves,
)
def test_open_holds_at_orders_between_the_whole_ones(
    ledger: Ledger, epsilon: float, delta: float, pool: list[Mechanism], plan: Any
) -> None:
    terms = BudgetTerms(epsilon=epsilon, delta=delta, policy="open")
    play_open(ledger, terms, pool, plan, rdp_by_trapezoids)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    epsilon=epsilons,
    shares=st.lists(st.floats(0.05, 1), min_size=2, max_size=3),
    pool=st.lists(steps(), min_size=1, max_size=2),
    plan=moves,
)
def test_teams_stay_within_their_shares_and_their_shares_stay_theirs(
    ledger: Ledger, epsilon: float, shares: list[float], pool: list[Mechanism], plan: Any
) -> None:
    order = float(max(2, math.ceil(default_rdp_order(epsilon, 1e-5))))
    terms = BudgetTerms(epsilon=epsilon, delta=1e-5, policy="open", rdp_order=order)
    name = new_budget(ledger, epsilon=epsilon, delta=1e-5, policy="open", rdp_order=order)
    shares = [share / sum(shares) - 1e-6 for share in shares]
    for number, share in enumerate(shares):
        ledger.grant(name, f"team-{number}", share)
    play = Play(ledger, name, pool)
    for move, index, power, part in plan:
        if move == "charge":
            play.charge(index, part)
        elif move == "settle":
            play.settle(index)
        else:
            number = index % len(shares)
            team, limit = f"team-{number}", terms.rdp_limit * shares[number]
            request = asked(terms, pool[index % len(pool)], power)
            more = [(request, repetitions(request, request.iterations))]
            would_be = rdp_of([*play.counts(team=team), *more], order, library_rdp)
            if isinstance(play.reserve(request, team), Reservation):
                assert would_be <= (limit + terms.rdp_limit * 1e-6) * ROUNDING
            else:
                assert would_be > limit * TIGHT
    assert epsilon_of(play.counts(), order, 1e-5) <= epsilon * ROUNDING


def exact_epsilon(counts: list[Any], delta: float) -> float:
    """Of unsampled Gaussians together, which are one Gaussian."""
    inverse = math.fsum(count / mechanism.noise_multiplier**2 for mechanism, count in counts)
    return dp_accounting.get_epsilon_gaussian(inverse**-0.5, delta) if inverse else 0.0


@pytest.mark.slow
@settings(max_examples=250)
@given(
    trials=st.lists(
        st.tuples(st.floats(-0.3, 1.3).map(lambda power: 10**power), st.integers(1, 50)),
        min_size=2,
        max_size=8,
    ),
    delta=deltas,
    near=st.floats(0.97, 1.03),
    share=st.sampled_from([None, 0.25, 0.5]),
    released=st.sets(st.integers(0, 7)),
)
def test_declared_lists_of_gaussians_cost_what_the_closed_form_says(
    ledger: Ledger,
    trials: list[tuple[float, int]],
    delta: float,
    near: float,
    share: float | None,
    released: set[int],
) -> None:
    pool: list[Mechanism] = [
        DpSgdMechanism.full_batch(
            noise_multiplier=noise, iterations=count, neighboring_relation="zero_out"
        )
        for noise, count in trials
    ]
    part, team = (1.0, "") if share is None else (share, "theirs")
    kept = [(one, one.iterations) for one in pool[: (len(pool) + 1) // 2]]
    limit = exact_epsilon(kept, delta * part) * near  # so the last of them just fits, or not
    name = new_budget(ledger, epsilon=limit / part, delta=delta, policy="declared")
    if share is not None:
        ledger.grant(name, team, share)
        ledger.grant(name, "others", 1 - share)
    play = Play(ledger, name, pool)
    for number, mechanism in enumerate(pool):
        more = [(mechanism, mechanism.iterations)]
        would_be = exact_epsilon([*play.counts(), *more], delta * part)
        if isinstance(play.reserve(mechanism, team), Reservation):
            assert would_be <= limit * ROUNDING
            if number in released:
                play.settle(len(play.reserved) - len(play.settled) - 1)
        else:
            assert would_be > limit * TIGHT
    level = ledger.status(name).level
    assert level.spent == 0
    assert level.reserved == pytest.approx(exact_epsilon(play.counts(), delta * part), rel=1e-6)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    selections=st.lists(
        st.builds(
            Selection,
            candidates=st.lists(
                steps().map(lambda one: one.after(20)), min_size=1, max_size=3
            ).map(tuple),
            distribution=st.sampled_from(["geometric", "poisson", "logarithmic"]),
            mean=st.floats(1, 50),
        ),
        min_size=1,
        max_size=3,
    ),
    near=st.floats(0.97, 1.03),
)
def test_private_selection_costs_what_its_list_of_selections_costs(
    ledger: Ledger, selections: list[Selection], near: float
) -> None:
    limit = selection_epsilon(selections[: (len(selections) + 1) // 2], delta=1e-5) * near
    name = new_budget(ledger, epsilon=limit, delta=1e-5, policy="private_selection")
    taken: list[Selection] = []
    for number, selection in enumerate(selections):
        cost = selection_epsilon([*taken, selection], delta=1e-5)
        try:
            answer = ledger.reserve(name, selection, request_id=f"{name}-{number}")
        except BudgetExceeded:
            assert cost > limit / ROUNDING
        else:
            assert cost <= limit * ROUNDING
            assert answer.verdict.epsilon == pytest.approx(cost, rel=1e-12)
            taken.append(selection)
    before = selection_epsilon(taken, delta=1e-5) if taken else 0.0
    assert ledger.status(name).level.reserved == pytest.approx(before, rel=1e-12)
