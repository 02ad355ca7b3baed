import itertools
import math
import pathlib
import subprocess
import sys
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from accounting.errors import AccountingError, InvalidPrivacyParameter
from accounting.mechanism import SampledGaussian, Step, TruncatedSampledGaussian
from accounting.renyi import (
    best_rdp_order,
    default_rdp_order,
    epsilon_of_rdp,
    parts_rdp,
    rdp_limit,
    step_rdp,
)

NOISE = st.floats(-0.9, 3).map(lambda x: 10**x)
SAMPLING = st.floats(-6, -0.01).map(lambda x: 10**x)
ORDERS = st.one_of(st.integers(2, 60), st.floats(1.02, 60), st.floats(64, 1024))
DELTAS = st.sampled_from([1e-3, 1e-5, 1e-7, 1e-10])
NOT_NUMBERS = [math.nan, math.inf, True, np.True_, "3", None, 1 + 0j, [3.0]]
ROUNDING = 1 + 1e-10
"""Two answers with the same true value differ by their margins for rounding, 1e-12, at most."""


def sampled(noise: float, sampling_prob: float) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)


def by_integration(noise: float, sampling_prob: float, order: float, *, swap: bool) -> float:
    """The divergence by adaptive quadrature of its definition, good to about 1e-8."""

    def log_density(z: float) -> tuple[float, float]:
        near, far = (float(stats.norm.logpdf(z, mean, noise)) for mean in (0, 1))
        mixture = float(
            np.logaddexp(math.log1p(-sampling_prob) + near, math.log(sampling_prob) + far)
        )
        return (near, mixture) if swap else (mixture, near)

    def integrand(z: float) -> float:
        p, q = log_density(z)
        return math.exp(order * p + (1 - order) * q) - math.exp(p)

    ends = (-12 * noise - order, 12 * noise + 2 * order)
    excess = integrate.quad(
        integrand, *ends, points=[0.0, 1.0, order], limit=500, epsabs=1e-14, epsrel=1e-10
    )
    return math.log1p(excess[0]) / (order - 1)


@pytest.mark.parametrize("order", [1.3, 2.0, 3.53, 7.46, 12.0])
@pytest.mark.parametrize(("noise", "sampling_prob"), [(0.7, 0.3), (1.0, 0.01), (3.0, 0.9)])
def test_is_the_larger_of_both_directions(
    noise: float, sampling_prob: float, order: float
) -> None:
    got = step_rdp(sampled(noise, sampling_prob), order)
    assert got == pytest.approx(by_integration(noise, sampling_prob, order, swap=False), rel=1e-7)
    assert got >= by_integration(noise, sampling_prob, order, swap=True) * (1 - 1e-7)


# By mpmath with 40 digits: log1p of the integral of (1 + x)^order - 1 - order * x, see the module.
GOLDEN = [
    (1.0, 0.01, 3.53, 0.0003160733713042063),
    (1.0, 0.01, 6.73, 0.0006762407483737214),
    (0.5, 0.001, 2.23, 6.51046251959549e-05),
    (0.12, 0.3, 5.5, 189.50069990582386),
    (4.0, 0.05, 15.79, 0.0013309615814264249),
    (30.0, 0.5, 43.27, 0.006081963940823491),
    (1.3, 1e-06, 1.05, 4.2372009174239826e-13),
    (2.0, 0.999, 2.5, 0.31197890178564236),
    (100000.0, 1e-05, 3.3, 1.6500000000825023e-20),
    (0.9, 0.0043, 11.0, 0.7972250136387816),
    (2.0, 0.05, 63.5, 4.893839170944324),
]


@pytest.mark.parametrize(("noise", "sampling_prob", "order", "expected"), GOLDEN)
def test_extended_precision(
    noise: float, sampling_prob: float, order: float, expected: float
) -> None:
    got = step_rdp(sampled(noise, sampling_prob), order)
    assert expected <= got <= expected * (1 + 2e-12) + 2e-16 * order


@given(noise=NOISE, sampling_prob=SAMPLING, order=st.integers(2, 256))
def test_at_whole_orders_agrees_with_the_library_and_is_never_below(
    noise: float, sampling_prob: float, order: int
) -> None:
    accountant = RdpAccountant([float(order)])
    accountant.compose(sampled(noise, sampling_prob).dp_event())
    library = float(vars(accountant)["_rdp"][0])
    got = step_rdp(sampled(noise, sampling_prob), order)
    # 1e-15 per unit of order: the library's own rounding error.
    assert library <= got <= library * ROUNDING + 1e-15 * order


@settings(max_examples=30)
@given(noise=NOISE, sampling_prob=SAMPLING, order=st.floats(1.02, 60))
def test_between_whole_orders_the_library_is_an_upper_bound(
    noise: float, sampling_prob: float, order: float
) -> None:
    # It adds the terms of an alternating series without their signs.
    accountant = RdpAccountant([order])
    accountant.compose(sampled(noise, sampling_prob).dp_event())
    library = float(vars(accountant)["_rdp"][0])
    # Its terms carry an error of 1e-15 each, which is divided by order - 1.
    assert (
        step_rdp(sampled(noise, sampling_prob), order)
        <= library * ROUNDING + 1e-13 / (order - 1) + 1e-15 * order
    )


@given(noise=NOISE, sampling_prob=SAMPLING, order=ORDERS, more=st.floats(1, 3))
def test_more_noise_costs_less_more_sampling_and_higher_orders_cost_more(
    noise: float, sampling_prob: float, order: float, more: float
) -> None:
    cost = step_rdp(sampled(noise, sampling_prob), order)
    assert step_rdp(sampled(noise * more, sampling_prob), order) <= cost * ROUNDING
    assert step_rdp(sampled(noise, min(1.0, sampling_prob * more)), order) * ROUNDING >= cost
    assert step_rdp(sampled(noise, sampling_prob), min(1024.0, order * more)) * ROUNDING >= cost


@given(
    noise=st.floats(-320, 300).map(lambda x: 10**x),
    sampling_prob=st.floats(-320, 0).map(lambda x: 10**x),
    order=st.one_of(ORDERS, st.floats(1, 1.02, exclude_min=True)),
)
def test_extremes_lie_between_zero_and_no_sampling(
    noise: float, sampling_prob: float, order: float
) -> None:
    if noise == 0 or sampling_prob == 0:  # Beyond the range of a float.
        return
    cost = step_rdp(sampled(noise, sampling_prob), order)
    without = step_rdp(sampled(noise, 1.0), order)
    assert 0 < cost <= without * ROUNDING + 1e-15 * order


def test_without_sampling_is_the_gaussian() -> None:
    assert step_rdp(sampled(2.0, 1.0), 3.5) == pytest.approx(3.5 / 8, rel=1e-11)


def test_just_below_full_sampling_is_nearly_the_gaussian() -> None:
    for order in (1.5, 2, 7.7, 80.5):
        almost = step_rdp(sampled(2.0, 1 - 1e-12), order)
        assert almost == pytest.approx(step_rdp(sampled(2.0, 1.0), order), rel=1e-9)


def test_seams_between_methods_are_invisible() -> None:
    # Between whole orders above 64 a line is within 1e-4 of the curve.
    for noise in (0.3, 2.0):
        below, above = (step_rdp(sampled(noise, 0.01), order) for order in (63.999, 64.001))
        assert below <= above <= below * 1.001
    # At noise 0.1 and below an inequality stands in for the quadrature.
    below, above = (step_rdp(sampled(noise, 0.01), 3.3) for noise in (0.0999999, 0.1000001))
    assert above <= below <= above * 1.001


def truncated_exactly(step: TruncatedSampledGaussian, order: float, others: float) -> float:
    """The divergence of a cut step over all subsets, for contributions on a line.

    One unit contributes 1, or nothing once blanked; the others contribute `others` each.
    """
    n, cap, q = step.num_examples, step.truncated_batch_size, step.sampling_prob
    z = np.linspace(-40, 40, 20001) * step.noise_multiplier
    given, blanked = np.zeros_like(z), np.zeros_like(z)
    for drawn in itertools.product([False, True], repeat=n):
        weight = q ** sum(drawn) * (1 - q) ** (n - sum(drawn))
        members = [i for i in range(n) if drawn[i]]
        batches = list(itertools.combinations(members, min(cap, len(members))))
        for batch in batches:
            rest = others * sum(i != 0 for i in batch)
            share = weight / len(batches)
            given += share * stats.norm.pdf(z, rest + (0 in batch), step.noise_multiplier)
            blanked += share * stats.norm.pdf(z, rest, step.noise_multiplier)
    inside = (given > 1e-290) & (blanked > 1e-290)
    spacing = float(z[1] - z[0])

    def divergence(p: Any, q: Any) -> float:
        log_terms = order * np.log(p[inside]) + (1 - order) * np.log(q[inside])
        largest = float(log_terms.max())
        total = float(np.exp(log_terms - largest).sum())
        return (largest + math.log(total * spacing)) / (order - 1)

    return max(divergence(given, blanked), divergence(blanked, given))


@pytest.mark.parametrize("order", [1.5, 3.0, 4.6])
@pytest.mark.parametrize("others", [-1.0, 0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("noise", "sampling_prob", "num_examples", "cap"),
    [(1.0, 0.3, 4, 1), (1.0, 0.3, 4, 2), (2.0, 0.7, 4, 3), (0.8, 0.9, 3, 1), (1.5, 0.1, 5, 1)],
)
def test_truncated_step_is_never_below_the_sum_over_all_batches(
    noise: float, sampling_prob: float, num_examples: int, cap: int, others: float, order: float
) -> None:
    step = TruncatedSampledGaussian(
        noise_multiplier=noise,
        sampling_prob=sampling_prob,
        num_examples=num_examples,
        truncated_batch_size=cap,
    )
    # Quadrature of an analytic function that vanishes at both ends: good to rounding.
    assert step_rdp(step, order) >= truncated_exactly(step, order, others) * (1 - 1e-9)


@pytest.mark.parametrize("stddevs", [4, 5, 6, 8, 10])
def test_truncation_that_never_happens_costs_nothing(stddevs: int) -> None:
    q, n = 0.01, 60000
    cap = math.ceil(n * q + stddevs * math.sqrt(n * q * (1 - q)))
    step = TruncatedSampledGaussian(
        noise_multiplier=1.0, sampling_prob=q, num_examples=n, truncated_batch_size=cap
    )
    poisson = step_rdp(sampled(1.0, q), 4.6)
    excess = step_rdp(step, 4.6) / poisson - 1
    assert excess >= 0
    # p * q * exp(order * (order - 1)/(2 noise^2)) against the moment, with its tail p doubled.
    tail = float(stats.binom.sf(cap - 1, n - 1, q))
    assert excess <= 2 * tail * q * math.exp(4.6 * 3.6 / 2) / (3.6 * poisson) + 1e-9


def test_truncated_steps_at_the_edges() -> None:
    def step(cap: int, noise: float = 1.0) -> TruncatedSampledGaussian:
        return TruncatedSampledGaussian(
            noise_multiplier=noise, sampling_prob=0.5, num_examples=10, truncated_batch_size=cap
        )

    assert step_rdp(step(10), 3) == step_rdp(sampled(1.0, 0.5), 3)  # Nothing is ever cut.
    assert step_rdp(step(9), 3) > step_rdp(step(10), 3)
    assert step_rdp(step(5, noise=1e-200), 3) == math.inf
    assert 0 < step_rdp(step(5, noise=1e200), 3) < 1e-14


@pytest.mark.parametrize("order", [*NOT_NUMBERS, 1, 1.0, 0.5, 0, -2, 1024.1, 10**400], ids=repr)
def test_refuses_orders_out_of_range(order: Any) -> None:
    calls = (
        lambda: step_rdp(sampled(1.0, 0.1), order),
        lambda: parts_rdp({}, order),
        lambda: rdp_limit(3.0, 1e-5, order),
        lambda: epsilon_of_rdp(1.0, 1e-5, order),
    )
    for call in calls:
        with pytest.raises(InvalidPrivacyParameter, match=r"a number in \(1, 1024\]") as caught:
            call()
        assert caught.value.field == "rdp_order"


@pytest.mark.parametrize("bad", [*NOT_NUMBERS, -1, -1e-9], ids=repr)
def test_refuses_what_is_no_budget_and_no_step(bad: Any) -> None:
    for call in (
        lambda: rdp_limit(bad, 1e-5, 3.0),
        lambda: rdp_limit(3.0, bad, 3.0),
        lambda: epsilon_of_rdp(1.0, bad, 3.0),
        lambda: default_rdp_order(bad, 1e-5),
        lambda: default_rdp_order(3.0, bad),
        lambda: best_rdp_order(bad, 1e-5, {sampled(1.0, 0.1): 1}),
    ):
        with pytest.raises(InvalidPrivacyParameter):
            call()
    if bad is not math.inf:
        with pytest.raises(InvalidPrivacyParameter):
            epsilon_of_rdp(bad, 1e-5, 3.0)
    if not isinstance(bad, list):  # No key of a dictionary.
        for step in (sampled(bad, 0.1), sampled(1.0, bad)):
            with pytest.raises(AccountingError):
                step_rdp(step, 3.0)


@pytest.mark.parametrize("count", [-1, 1.0, True, "2", None, math.nan, 10**13])
def test_refuses_what_is_no_count(count: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="count must be an integer from 0"):
        parts_rdp({sampled(1.0, 0.1): count}, 3.0)


def test_number_types_do_not_matter() -> None:
    expected = step_rdp(sampled(2.0, 0.5), 3.0)
    assert step_rdp(sampled(2, np.float32(0.5)), np.int64(3)) == expected  # pyright: ignore
    assert type(step_rdp(sampled(np.float64(2), 0.5), np.float64(3))) is float


STEPS = [sampled(1.0, 0.01), sampled(4.0, 0.2), sampled(10.0, 1.0)]


@given(
    counts=st.lists(st.integers(0, 10**6), min_size=3, max_size=3),
    more=st.lists(st.integers(0, 10**6), min_size=3, max_size=3),
    order=ORDERS,
)
def test_parts_add_up(counts: list[int], more: list[int], order: float) -> None:
    def parts(counts: list[int]) -> dict[Step, int]:
        return dict(zip(STEPS, counts, strict=True))

    both = [a + b for a, b in zip(counts, more, strict=True)]
    total = parts_rdp(parts(both), order)
    assert total == pytest.approx(
        parts_rdp(parts(counts), order) + parts_rdp(parts(more), order), rel=1e-13
    )
    exact = math.fsum(n * step_rdp(step, order) for step, n in parts(both).items())
    assert total >= exact


def test_parts_that_do_not_run_cost_nothing() -> None:
    assert parts_rdp({}, 3.0) == 0.0
    assert parts_rdp({sampled(1e-300, 1.0): 0}, 3.0) == 0.0
    assert parts_rdp({sampled(1e-300, 1.0): 1}, 3.0) == math.inf


@given(epsilon=st.floats(-3, 6).map(lambda x: 10**x), delta=DELTAS, order=ORDERS)
def test_limit_and_epsilon_are_inverse(epsilon: float, delta: float, order: float) -> None:
    limit = rdp_limit(epsilon, delta, order)
    if limit <= 0:
        # Not even the least divergence fits.
        assert epsilon_of_rdp(1e-300, delta, order) >= epsilon * (1 - 1e-12)
        return
    back = epsilon_of_rdp(limit, delta, order)
    assert back <= epsilon
    # Differences of numbers as large as what is added or taken away.
    added = epsilon - limit
    assert back >= epsilon - 1e-14 * (epsilon + abs(added))
    assert epsilon_of_rdp(limit + 1e-13 * (epsilon + abs(added)), delta, order) > epsilon


def test_epsilon_at_the_edges() -> None:
    assert epsilon_of_rdp(0.0, 1e-5, 2.0) == 0.0
    assert epsilon_of_rdp(math.inf, 1e-5, 2.0) == math.inf
    assert epsilon_of_rdp(1e-9, 0.5, 64.0) == 0.0  # This delta pays for it alone.


def least_epsilon(parts: dict[Step, int], delta: float, times: float = 1.0) -> float:
    """Epsilon at the best single order of so many repetitions, whole or not."""
    tried = [1 + x / 10 for x in range(1, 100)] + [float(x) for x in range(11, 64)]
    return min(epsilon_of_rdp(times * parts_rdp(parts, a), delta, a) for a in tried)


@pytest.mark.parametrize(
    ("noise", "sampling_prob", "steps", "expected"),
    [(1.0, 0.01, 1000, 2.101), (2.0, 0.1, 1000, 8.947), (2.0, 0.01, 65610, 6.82),
     (2.0, 0.01, 7290, 1.98), (1.0, 1.0, 1, 4.729)],
)  # fmt: skip
def test_best_single_order_gives_the_known_epsilon(
    noise: float, sampling_prob: float, steps: int, expected: float
) -> None:
    # The 65,610 and 7,290 steps: 81 trials of 810, reserved in full, and halted early by
    # successive halving (30/90/270/810, a third survives).
    assert 81 * 30 + 27 * 60 + 9 * 180 + 3 * 540 == 7290
    got = least_epsilon({sampled(noise, sampling_prob): steps}, 1e-5)
    assert got == pytest.approx(expected, abs=6e-3)  # Two to three decimals are known.


TYPICAL = [(1.0, 0.01, 1000), (2.0, 0.01, 1000), (1.0, 256 / 60000, 1000), (4.0, 0.05, 500),
           (2.0, 0.1, 100), (3.0, 1.0, 1)]  # fmt: skip


@pytest.mark.parametrize("epsilon", [3.0, 8.0, 20.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_orders_are_within_two_percent_of_the_best(epsilon: float, delta: float) -> None:
    for noise, sampling_prob, iterations in TYPICAL:
        trial: dict[Step, int] = {sampled(noise, sampling_prob): iterations}
        for order in (default_rdp_order(epsilon, delta), best_rdp_order(epsilon, delta, trial)):
            times = rdp_limit(epsilon, delta, order) / parts_rdp(trial, order)
            if times >= 1:  # Otherwise one trial is more than the budget.
                assert least_epsilon(trial, delta, times) >= epsilon * 0.98


def test_best_order_holds_at_least_as_much_as_others() -> None:
    # Divergences leap up by orders of magnitude near the default order.
    trial: dict[Step, int] = {sampled(0.73, 0.002): 317}
    best = best_rdp_order(3.0, 1e-5, trial)

    def held(order: float) -> float:
        return rdp_limit(3.0, 1e-5, order) / parts_rdp(trial, order)

    assert all(held(best) >= 0.999 * held(1 + x / 10) for x in range(1, 150))
    assert held(best) > 1.5 * held(default_rdp_order(3.0, 1e-5))


def test_default_orders() -> None:
    got = [default_rdp_order(epsilon, 1e-5) for epsilon in (0.3, 1.0, 3.0, 8.0, 20.0)]
    assert got == [43.27, 15.79, 6.73, 3.53, 2.23]


@given(epsilon=st.floats(-2, 8).map(lambda x: 10**x), delta=DELTAS)
def test_default_order_can_be_used_where_any_can(epsilon: float, delta: float) -> None:
    try:
        order = default_rdp_order(epsilon, delta)
    except InvalidPrivacyParameter:
        assert all(rdp_limit(epsilon, delta, order) <= 0 for order in (1.5, 30, 700, 1024))
    else:
        assert rdp_limit(epsilon, delta, order) > 0


def test_budgets_too_small_for_any_order() -> None:
    with pytest.raises(InvalidPrivacyParameter, match=r"more than 0.0035.* at delta 1e-05"):
        default_rdp_order(0.003, 1e-5)
    with pytest.raises(InvalidPrivacyParameter, match="epsilon must be more than"):
        best_rdp_order(0.003, 1e-5, {sampled(1.0, 0.1): 1})
    with pytest.raises(InvalidPrivacyParameter, match="parts must be at least one step"):
        best_rdp_order(3.0, 1e-5, {sampled(1.0, 0.1): 0})


def test_loads_neither_the_library_nor_statistics() -> None:
    code = (
        "import sys, accounting.renyi, accounting.selection\n"
        "from accounting.mechanism import SampledGaussian as S\n"
        "accounting.renyi.step_rdp(S(noise_multiplier=1.0, sampling_prob=0.1), 3.3)\n"
        "sys.exit('dp_accounting' in sys.modules or 'scipy.stats' in sys.modules)"
    )
    root = pathlib.Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_library_relation_does_not_matter() -> None:
    step = sampled(1.2, 0.05)
    for relation in (
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    ):
        accountant = RdpAccountant([5.0], relation)
        accountant.compose(step.dp_event())
        assert step_rdp(step, 5) == pytest.approx(vars(accountant)["_rdp"][0], rel=1e-10)
