"""Lists that are fixed beforehand, and single trials: the decision at the edge of the budget.

The judge composes privacy losses itself, on a grid so fine that rounding all of them down and all
of them up encloses the true epsilon within a thousandth.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from scipy.special import ndtr

from accounting import (
    BudgetExceeded,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Ledger,
    Mechanism,
    Request,
    Selection,
    TruncatedDpSgdMechanism,
)
from accounting.accountants import epsilon_of_list

DELTA = 1e-5
NEAR = (0.97, 0.985, 0.995, 0.999, 1.001, 1.005, 1.011, 1.03)
"""Budgets, as multiples of the true cost."""

Kinds = Sequence[tuple[float, float, int]]
"""Noise multiplier, sampling probability and number of steps, of each kind."""

numbers = itertools.count()


@pytest.fixture(scope="module")
def ledger() -> Iterator[Ledger]:
    ledger = Ledger("sqlite://")
    yield ledger
    assert ledger.verify().ok
    ledger.close()


def new_budget(ledger: Ledger, policy: str = "declared", epsilon: float = 1.0) -> str:
    name = f"budget-{next(numbers)}"
    ledger.create_budget(
        name,
        dataset="d",
        dataset_fingerprint="f",
        epsilon=epsilon,
        delta=DELTA,
        policy=policy,  # pyright: ignore[reportArgumentType]
    )
    return name


def dp_sgd(noise: float, sampling_prob: float, iterations: int) -> Mechanism:
    return DpSgdMechanism(
        noise_multiplier=noise,
        sampling_prob=sampling_prob,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


# -- the judge -------------------------------------------------------------------------------


def masses(noise: float, q: float, edges: np.ndarray, *, removed: bool) -> np.ndarray:
    """Probabilities that the privacy loss of one step lies between neighbouring edges."""

    def above(z: np.ndarray) -> np.ndarray:
        return (1 - q) * ndtr(-z / noise) + q * ndtr((1 - z) / noise)

    with np.errstate(divide="ignore", invalid="ignore"):
        losses = edges if removed else -edges
        z = 0.5 + noise**2 * np.log((np.expm1(losses) + q) / q)
        z[np.isnan(z)] = -np.inf  # no outcome has so small a loss
    return -np.diff(above(z) if removed else ndtr(z / noise))


def enclosed(kinds: Kinds, delta: float = DELTA) -> tuple[float, float]:
    """The true epsilon of steps composed: a lower and an upper bound."""
    about = epsilon_of_list({dp_sgd(*kind).step: kind[2] for kind in kinds}, delta=delta)
    width = about * 1e-3 / sum(count for _, _, count in kinds)
    half = 2 ** math.ceil(math.log2((4 * about + 1) / width))
    edges = width * np.arange(-half, half + 1)
    lows, highs = [], []
    for removed in (True, False):
        for up, found in ((0, lows), (1, highs)):
            spectrum = np.ones(half + 1, complex)
            for noise, sampling_prob, count in kinds:
                one = masses(noise, sampling_prob, edges, removed=removed)
                one = np.roll(one, up - half)  # the loss 0 comes first, the negative ones last
                spectrum *= np.fft.rfft(one) ** count
            composed = np.roll(np.fft.irfft(spectrum, 2 * half), half)
            lost = max(0.0, 1 - float(composed.sum())) if up else 0.0
            found.append(least_epsilon(edges[:-1], composed, delta - lost))
    return max(lows), max(highs)


def least_epsilon(losses: np.ndarray, composed: np.ndarray, delta: float) -> float:
    low, high = 0.0, float(losses[-1])
    for _ in range(40):
        middle = (low + high) / 2
        start = int(np.searchsorted(losses, middle))
        excess = float(np.dot(composed[start:], -np.expm1(middle - losses[start:])))
        low, high = (middle, high) if excess > delta else (low, middle)
    return high


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (5.0, 30)])
def test_the_judge_encloses_the_closed_form(noise: float, count: int) -> None:
    low, high = enclosed([(noise, 1.0, count)])
    exact = dp_accounting.get_epsilon_gaussian(noise / math.sqrt(count), DELTA)
    assert low <= exact <= high <= low * 1.002


def test_the_judge_encloses_the_librarys_own() -> None:
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(2.0))
    accountant.compose(event, 20)
    low, high = enclosed([(2.0, 0.2, 20)])
    assert low <= accountant.get_epsilon(DELTA) <= high * 1.0005
    assert high <= low * 1.002


# -- declared and per_trial ------------------------------------------------------------------

LISTS: list[Kinds] = [
    [(1.0, 0.01, 40), (0.7, 0.005, 20)],
    [(1.0, 0.1, 10), (2.0, 0.3, 20), (4.0, 1.0, 5)],
    [(3.0, 0.05, 60), (3.0, 0.5, 30)],
    [(0.6, 0.02, 5), (8.0, 0.9, 40)],
    [(1.5, 0.002, 8), (0.9, 0.002, 8)],
    [(20.0, 0.4, 100), (0.8, 0.01, 10)],
    [(1.2, 0.2, 1), (1.3, 0.25, 2), (1.4, 0.3, 3), (1.5, 0.35, 4)],
]


@functools.cache
def truth(kinds: tuple[tuple[float, float, int], ...]) -> tuple[float, float]:
    return enclosed(kinds)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", LISTS, ids=str)
def test_a_declared_list_is_admitted_where_it_fits_and_nowhere_else(
    ledger: Ledger, kinds: Kinds
) -> None:
    low, high = truth(tuple(kinds))
    for near in NEAR:
        epsilon = high * near
        name = new_budget(ledger, epsilon=epsilon)
        answers = []
        for noise, sampling_prob, count in kinds:
            try:
                ledger.reserve(
                    name,
                    dp_sgd(noise, sampling_prob, count),
                    request_id=f"{name}-{len(answers)}",
                )
                answers.append(True)
            except BudgetExceeded:
                answers.append(False)
        assert answers[:-1] == [True] * (len(kinds) - 1)
        assert low <= epsilon or not answers[-1]
        assert answers[-1] or high >= epsilon * 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [(1.0, 0.01, 50), (0.5, 0.1, 3), (2.0, 0.5, 20), (10.0, 0.99, 60), (0.8, 0.001, 10)],
    ids=str,
)
def test_a_trial_by_itself_is_admitted_where_it_fits_and_nowhere_else(
    ledger: Ledger, kind: tuple[float, float, int]
) -> None:
    low, high = truth((kind,))
    for near in NEAR:
        epsilon = high * near
        name = new_budget(ledger, "per_trial", epsilon)
        for number in range(2):  # each by itself, so the second gets the same answer
            try:
                ledger.reserve(name, dp_sgd(*kind), request_id=f"{name}-{number}")
            except BudgetExceeded:
                assert high >= epsilon * 0.99
            else:
                assert low <= epsilon


@pytest.mark.slow
@pytest.mark.parametrize("stddevs", [4, 6])
def test_truncated_trials_cost_what_the_library_says(ledger: Ledger, stddevs: int) -> None:
    num_examples, sampling_prob = 1000, 0.1
    cap = math.ceil(num_examples * sampling_prob + stddevs * math.sqrt(90))
    mechanism = TruncatedDpSgdMechanism(
        noise_multiplier=1.0,
        sampling_prob=sampling_prob,
        iterations=20,
        num_examples=num_examples,
        truncated_batch_size=cap,
    )
    library = dp_accounting.pld.PLDAccountant(
        dp_accounting.NeighboringRelation.REPLACE_SPECIAL, value_discretization_interval=1e-4
    )
    library.compose(mechanism.dp_event())
    upper = library.get_epsilon(DELTA)  # rounds up: at most a thousandth above the truth
    for near in NEAR:
        for policy in ("per_trial", "declared"):
            name = new_budget(ledger, policy, upper * near)
            try:
                ledger.reserve(name, mechanism, request_id=name)
            except BudgetExceeded:
                assert near <= 1 / 0.99
            else:
                assert near >= 0.998


# -- when a list closes ----------------------------------------------------------------------

SMALL = dp_sgd(5.0, 0.1, 10)


def selected(iterations: int) -> Selection:
    return Selection(candidates=(SMALL.after(iterations),), distribution="geometric", mean=3)


@pytest.mark.parametrize("policy", ["declared", "private_selection"])
def test_a_list_closes_at_the_first_charge(ledger: Ledger, policy: str) -> None:
    name = new_budget(ledger, policy, epsilon=3.0)
    one = SMALL if policy == "declared" else selected(10)
    for number in range(3):
        ledger.reserve(name, one, request_id=f"{name}-{number}")
    three = ledger.status(name).level.reserved
    assert ledger.settle(f"{name}-2").state == "released"
    two = ledger.status(name).level.reserved
    assert 0 < two < three
    ledger.reserve(name, one, request_id=f"{name}-3")
    assert ledger.status(name).level.reserved == pytest.approx(three, rel=1e-12)
    assert not ledger.status(name).closed_list

    ledger.charge(f"{name}-0", 1)
    assert ledger.status(name).closed_list
    assert ledger.status(name).level.spent == pytest.approx(three, rel=1e-12)
    assert ledger.settle(f"{name}-1").state == "closed"
    assert ledger.settle(f"{name}-0").state == "closed"
    assert ledger.status(name).level.spent == pytest.approx(three, rel=1e-12)
    with pytest.raises(BudgetExceeded, match="list was closed"):
        ledger.reserve(name, one, request_id=f"{name}-4")
    assert ledger.charge(f"{name}-3", 1).charged == 1


def test_each_team_closes_a_list_of_its_own(ledger: Ledger) -> None:
    name = new_budget(ledger, epsilon=3.0)
    ledger.grant(name, "a", 0.5)
    ledger.grant(name, "b", 0.5)
    ledger.reserve(name, SMALL, request_id=f"{name}-a", team="a")
    ledger.charge(f"{name}-a", 1)
    with pytest.raises(BudgetExceeded, match="list was closed"):
        ledger.reserve(name, SMALL, request_id=f"{name}-a2", team="a")
    ledger.reserve(name, SMALL, request_id=f"{name}-b", team="b")
    assert ledger.settle(f"{name}-b").state == "released"
    # A share that moved now would have moved in the light of results.
    for share in (0.4, 0.0):
        with pytest.raises(InvalidPrivacyParameter, match="list is closed"):
            ledger.grant(name, "a", share)
    assert ledger.grant(name, "a", 0.5).shares == {"a": 0.5, "b": 0.5}
    assert ledger.grant(name, "b", 0.3).shares == {"a": 0.5, "b": 0.3}


def test_a_list_made_together_is_admitted_or_refused_as_a_whole(ledger: Ledger) -> None:
    cost = epsilon_of_list({SMALL.step: 35}, delta=DELTA)
    name = new_budget(ledger, epsilon=cost)

    def together(prefix: str, count: int) -> list[str]:
        requests = [
            Request(request_id=f"{name}-{prefix}{number}", mechanism=SMALL)
            for number in range(count)
        ]
        return [answer.state for answer in ledger.reserve_together(name, requests)]

    assert together("too-many", 4) == ["refused"] * 4
    assert ledger.status(name).level.reserved == 0
    assert together("enough", 3) == ["open"] * 3


@pytest.mark.parametrize(
    ("policy", "wrong"),
    [
        ("open", selected(1)),
        ("declared", selected(1)),
        ("per_trial", selected(1)),
        ("private_selection", SMALL),
    ],
)
def test_each_policy_takes_one_sort_of_request(
    ledger: Ledger, policy: str, wrong: Mechanism | Selection
) -> None:
    name = new_budget(ledger, policy)
    with pytest.raises(InvalidPrivacyParameter, match="under"):
        ledger.reserve(name, wrong, request_id=name)
    assert ledger.reservation_ids(name) == []


def test_a_trial_by_itself_divides_nothing_and_gives_nothing_back(ledger: Ledger) -> None:
    name = new_budget(ledger, "per_trial", epsilon=3.0)
    with pytest.raises(InvalidPrivacyParameter, match="per_trial"):
        ledger.grant(name, "a", 0.5)
    ledger.reserve(name, SMALL, request_id=name)
    ledger.charge(name, 10)
    level = ledger.status(name).level
    assert (level.spent, level.reserved) == (0, 0)
    assert level.together == pytest.approx(
        epsilon_of_list({SMALL.step: 10}, delta=DELTA), rel=1e-12
    )
