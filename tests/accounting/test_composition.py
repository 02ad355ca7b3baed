import math
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft

from accounting import (
    AccountingError,
    InvalidPrivacyParameter,
    accountants,
    composition,
    grid,
    privacy_loss,
)
from accounting.accountants import epsilon_of_list, fits
from accounting.convolution import compose
from accounting.cumulants import Parts
from accounting.mechanism import SampledGaussian, Step, TruncatedSampledGaussian
from accounting.privacy_loss import step_distribution

DELTA = 1e-5


def gaussian(sampling_prob: float, noise: float) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)


def truncated(n: int, batch: float, noise: float, cap: int) -> TruncatedSampledGaussian:
    return TruncatedSampledGaussian(
        noise_multiplier=noise, sampling_prob=batch / n, num_examples=n, truncated_batch_size=cap
    )


A, B, C = gaussian(0.01, 1.0), gaussian(0.1, 3.0), gaussian(0.001, 0.7)

log_noises = st.floats(-0.3, 1.5)
log_probs = st.floats(-4, -0.05)
log_counts = st.floats(0, 3.5)


def plan_of(parts: Parts, accuracy: float = grid.ACCURACY) -> grid.Plan:
    plan = grid.make_plan(parts, DELTA, accuracy=accuracy)
    assert plan is not None
    return plan


def lower_bound(step: SampledGaussian, count: int, delta: float, interval: float) -> float:
    """The library's optimistic estimate."""
    return (
        privacy_loss_distribution.from_gaussian_mechanism(
            step.noise_multiplier,
            sampling_prob=step.sampling_prob,
            pessimistic_estimate=False,
            use_connect_dots=False,
            value_discretization_interval=interval,
        )
        .self_compose(count)
        .get_epsilon_for_delta(delta)
    )


@settings(max_examples=15)
@given(log_noises, log_probs, log_counts, st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_never_below_an_optimistic_estimate(
    log_noise: float, log_prob: float, log_count: float, delta: float
) -> None:
    step, count = gaussian(10**log_prob, 10**log_noise), int(10**log_count)
    bound = composition.pld_epsilon(((step, count),), delta)
    assert bound.epsilon >= lower_bound(step, count, delta, 1e-3) - 1e-9


# What PLD on a grid of 1e-5 and an independent accountant agree on.
@pytest.mark.parametrize(
    ("prob", "noise", "count", "value"),
    [
        (1e-4, 1.0, 10**5, 0.1319),
        (1e-3, 0.8, 10**4, 0.7824),
        (1e-3, 1.0, 10**5, 1.6372),
        (0.01, 0.8, 1000, 3.1410),
        (0.01, 1.0, 10**4, 6.1877),
        (0.1, 2.0, 1000, 8.2793),
        (256 / 60000, 1.1, 14040, 2.3796),
    ],
)
def test_the_grid_adds_less_than_a_thousandth(
    prob: float, noise: float, count: int, value: float
) -> None:
    bound = composition.pld_epsilon(((gaussian(prob, noise), count),), DELTA)
    assert bound.accurate
    assert bound.below_rdp
    assert value - 5e-5 <= bound.epsilon <= value * 1.001 + 5e-5


@settings(max_examples=20)
@given(
    st.floats(-0.5, 1.5), st.integers(1, 300), st.integers(1, 300), st.sampled_from([1e-3, 1e-8])
)
def test_gaussians_without_sampling_compose_to_the_exact_gaussian(
    log_noise: float, few: int, many: int, delta: float
) -> None:
    quiet, loud = gaussian(1.0, 10**log_noise), gaussian(1.0, 3 * 10**log_noise)
    ratio = math.sqrt(few / quiet.noise_multiplier**2 + many / loud.noise_multiplier**2)
    exact = dp_accounting.get_epsilon_gaussian(1 / ratio, delta)
    assert exact <= epsilon_of_list({quiet: few, loud: many}, delta=delta) <= exact * 1.01 + 1e-8
    # The same through the grid: a step that is sampled, though hardly ever, joins in.
    tiny = gaussian(1e-12, 1e9)
    bound = composition.pld_epsilon(((quiet, few), (loud, many), (tiny, 1)), delta)
    if bound.epsilon < math.inf:
        assert exact * (1 - 1e-9) <= bound.epsilon <= exact * 1.001 + 1e-6


def test_a_large_composition_of_gaussians_is_exact() -> None:
    # Not merged: the sampling probability is just below one.
    step = gaussian(1 - 1e-8, 40.0)
    exact = dp_accounting.get_epsilon_gaussian(40 / math.sqrt(5000), DELTA)
    bound = composition.pld_epsilon(((step, 5000),), DELTA)
    assert exact * (1 - 1e-6) <= bound.epsilon <= exact * 1.0005


@pytest.mark.parametrize("adding", [False, True])
def test_composition_is_that_of_direct_convolution(adding: bool) -> None:
    parts = ((A, 2), (B, 3))
    plan = plan_of(parts, accuracy=0.05)
    whole, infinite, lowest = np.ones(1), 0.0, 0
    for step, count in parts:
        one = step_distribution(step, plan.interval, plan.step_tail)
        probs = one.adding[::-1] if adding else one.removing
        first = -(one.lowest + probs.size - 1) if adding else one.lowest
        lost = one.infinite_adding if adding else one.infinite_removing
        for _ in range(count):
            whole = np.convolve(whole, probs)
            infinite += (1 - infinite) * lost
            lowest += first
    composed = compose(parts, plan, adding=adding)
    losses = np.arange(lowest, lowest + whole.size) * plan.interval
    for epsilon in (0.0, 0.1, 0.5, 1.0):
        gains = -np.expm1(np.minimum(epsilon - losses, 0.0))
        direct = infinite + float(gains @ whole)
        # Wrapped and truncated tails: together at most 1e-5 of delta.
        assert direct - 1e-15 <= composed.delta(epsilon) <= direct + 2e-5 * DELTA


def in_extended_precision(parts: Parts, plan: grid.Plan, *, adding: bool) -> np.ndarray:
    """The composed probabilities by the same transform in extended precision."""
    window = plan.adding if adding else plan.removing
    transform: Any = fft  # It has no stubs.
    product: Any = np.ones(window.size // 2 + 1, dtype=np.clongdouble)
    for step, count in parts:
        one = step_distribution(step, plan.interval, plan.step_tail)
        probs = one.adding[::-1] if adding else one.removing
        first = -(one.lowest + probs.size - 1) if adding else one.lowest
        circle = np.zeros(window.size, dtype=np.longdouble)
        np.add.at(circle, (np.arange(probs.size) + first) % window.size, probs)
        product *= transform.rfft(circle) ** count
    circle = transform.irfft(product, window.size)
    lowest = max(1, window.lowest)
    return circle[np.arange(lowest, window.lowest + window.size) % window.size]


@pytest.mark.parametrize(
    "parts",
    [
        ((gaussian(1e-4, 1.0), 10**6),),
        ((gaussian(0.1, 100.0), 10**6),),
        ((gaussian(0.01, 1.0), 1000),),
        ((gaussian(1e-5, 0.7), 10**5),),
        ((gaussian(0.3, 0.66), 100),),
        ((gaussian(0.05, 3.4), 2 * 10**6),),
        ((gaussian(0.5, 0.45), 20), (gaussian(0.3, 8.0), 10**4), (A, 1)),
        ((gaussian(3e-5, 0.74), 23_000), (B, 10), (C, 1000)),
    ],
    ids=str,
)
def test_the_margin_covers_the_rounding_errors_of_the_transform(parts: Parts) -> None:
    plan = plan_of(parts, accuracy=5e-3)
    count = sum(count for _, count in parts)
    margin = composition._FFT_ERROR + composition._FFT_ERROR_PER_STEP * count
    for adding in (False, True):
        ours = compose(parts, plan, adding=adding)
        errors = ours.probs - in_extended_precision(parts, plan, adding=adding)
        losses = np.arange(ours.lowest, ours.lowest + ours.probs.size) * plan.interval
        seen = 0
        for epsilon in np.linspace(0, 1.2 * plan.renyi, 25):
            if 1e-10 <= ours.delta(epsilon) <= 1e-3:
                gains = -np.expm1(np.minimum(epsilon - losses, 0.0))
                assert abs(float(gains @ errors)) <= margin / 2
                seen += 1
        assert seen


def test_nothing_where_rounding_errors_rival_delta() -> None:
    step = gaussian(0.01, 10.0)
    assert composition.pld_epsilon(((step, 10**6),), 1e-10) == composition.NOT_COMPUTED
    assert composition.pld_epsilon(((step, 10**6),), 1e-5).epsilon < math.inf
    assert composition.pld_delta(((step, 10**6),), 1.0, 1e-10, 1e-3) == 1


@settings(max_examples=200)
@given(st.data())
def test_work_and_memory_are_bounded_for_every_input(data: st.DataObject) -> None:
    parts = tuple(
        (
            gaussian(10 ** data.draw(st.floats(-12, 0)), 10 ** data.draw(st.floats(-1.39, 9))),
            int(10 ** data.draw(st.floats(0, 12))),
        )
        for _ in range(data.draw(st.integers(1, 3)))
    )
    plan = grid.make_plan(parts, DELTA, accuracy=grid.ACCURACY)
    if plan is not None:
        assert_within_limits(plan, parts)


@pytest.mark.parametrize("distinct", [30, 400])
def test_long_lists_are_bounded_too(distinct: int) -> None:
    rng = np.random.default_rng(distinct)
    parts = tuple(
        (
            gaussian(10 ** rng.uniform(-3, -1), 10 ** rng.uniform(0, 1)),
            int(10 ** rng.uniform(0, 2)),
        )
        for _ in range(distinct)
    )
    assert_within_limits(plan_of(parts), parts)


def assert_within_limits(plan: grid.Plan, parts: Parts) -> None:
    points = [plan.removing.size, plan.adding.size]
    steps = [_points(step, plan) for step, _ in parts]
    assert max(points) <= grid.MAX_POINTS
    assert max(steps) <= grid.MAX_STEP_POINTS
    assert len(parts) * max(points) <= grid.MAX_WORK
    assert sum(steps) <= grid.MAX_WORK


def _points(step: Step, plan: grid.Plan) -> float:
    least, largest = privacy_loss.loss_range(step, plan.step_tail)
    return (largest - least) / plan.interval


@settings(max_examples=15)
@given(log_noises, log_probs, log_counts)
def test_more_costs_more_up_to_what_the_grid_adds(
    log_noise: float, log_prob: float, log_count: float
) -> None:
    noise, prob, count = 10**log_noise, 10**log_prob, int(10**log_count)
    middle = epsilon_of_list({gaussian(prob, noise): count}, delta=DELTA)
    slack = 1e-3 * middle + 1e-6
    assert epsilon_of_list({gaussian(prob, noise * 1.1): count}, delta=DELTA) <= middle + slack
    assert epsilon_of_list({gaussian(prob * 0.9, noise): count}, delta=DELTA) <= middle + slack
    assert epsilon_of_list({gaussian(prob, noise): count * 2}, delta=DELTA) >= middle - slack
    assert epsilon_of_list({gaussian(prob, noise): count, B: 1}, delta=DELTA) >= middle - slack


def test_a_list_is_one_composition() -> None:
    # Two steps that differ in the last bits only cost what one of them twice as often does.
    nearly = gaussian(0.01, math.nextafter(1.0, 2.0))
    together = epsilon_of_list({A: 600, nearly: 400}, delta=DELTA)
    assert together == pytest.approx(epsilon_of_list({A: 1000}, delta=DELTA), rel=1e-9)
    mixed = epsilon_of_list({A: 300, B: 20, C: 2000}, delta=DELTA)
    alone = [epsilon_of_list({s: n}, delta=DELTA / 3) for s, n in ((A, 300), (B, 20), (C, 2000))]
    assert max(alone) < mixed < sum(alone)


def test_order_and_number_types_do_not_matter() -> None:
    given = {A: 300, B: 20, C: 2000}
    expected = epsilon_of_list(given, delta=DELTA)
    assert epsilon_of_list(dict(reversed(given.items())), delta=DELTA) == expected
    odd: Any = {
        SampledGaussian(noise_multiplier=np.float64(1), sampling_prob=np.float64(0.01)): 300,
        B: np.int64(20),
        C: 2000,
    }
    assert epsilon_of_list(odd, delta=np.float64(DELTA)) == expected


def test_lists_agree_with_the_library() -> None:
    by_pld: Any = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    by_rdp: Any = dp_accounting.rdp.RdpAccountant()
    parts: dict[Step, int] = {A: 300, B: 20, C: 2000}
    for step, count in parts.items():
        by_pld.compose(step.dp_event(), count)
        by_rdp.compose(step.dp_event(), count)
    ours = epsilon_of_list(parts, delta=DELTA)
    assert ours == pytest.approx(by_pld.get_epsilon(DELTA), rel=2e-3)
    ours_by_rdp = epsilon_of_list(parts, delta=DELTA, accountant="rdp")
    # The library looks at fewer orders.
    assert by_rdp.get_epsilon(DELTA) * (1 - 1e-3) <= ours_by_rdp <= by_rdp.get_epsilon(DELTA)
    assert ours < ours_by_rdp


def test_long_lists_by_rdp_are_close_to_the_library() -> None:
    # More steps than between whose orders is searched.
    steps: dict[Step, int] = {gaussian(0.01, 1 + tenth / 50): 20 for tenth in range(40)}
    few = epsilon_of_list(steps, delta=DELTA, accountant="rdp")
    accountant: Any = dp_accounting.rdp.RdpAccountant()
    for step, count in steps.items():
        accountant.compose(step.dp_event(), count)
    library = accountant.get_epsilon(DELTA)
    assert library * (1 - 1e-3) <= few <= library * 1.03


def test_the_empty_list_is_free() -> None:
    assert epsilon_of_list({}, delta=DELTA) == 0.0
    assert fits({}, epsilon=1e-9, delta=DELTA)


def test_fits_is_the_comparison() -> None:
    parts = {A: 1000, B: 10}
    exact = epsilon_of_list(parts, delta=DELTA)
    assert fits(parts, epsilon=exact, delta=DELTA)
    assert fits(parts, epsilon=1.2 * exact, delta=DELTA)
    assert not fits(parts, epsilon=0.999 * exact, delta=DELTA)
    assert not fits(parts, epsilon=0.5 * exact, delta=DELTA)
    assert fits(parts, epsilon=1e308, delta=DELTA)


@pytest.mark.parametrize("epsilon", [0, -1, math.nan, math.inf, "1", None])
def test_fits_refuses_bad_budgets(epsilon: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="epsilon"):
        fits({A: 1}, epsilon=epsilon, delta=DELTA)


@pytest.mark.parametrize(
    ("parts", "field"),
    [
        ([(A, 1)], "parts"),
        (None, "parts"),
        ({"step": 1}, "step"),
        ({A: 0}, "count"),
        ({A: -1}, "count"),
        ({A: 1.0}, "count"),
        ({A: True}, "count"),
        ({A: 10**12 + 1}, "count"),
        ({gaussian(math.nan, 1.0): 1}, "sampling_prob"),
        ({gaussian(0.1, math.nan): 1}, "noise_multiplier"),
        ({gaussian(1.5, 1.0): 1}, "sampling_prob"),
        ({gaussian(0.1, -1.0): 1}, "noise_multiplier"),
        ({truncated(100, 10, 1.0, 0): 1}, "truncated_batch_size"),
        ({truncated(100, 100, 1.0, 100): 1}, "sampling_prob"),
    ],
    ids=str,
)
def test_refuses_what_is_no_list_of_steps(parts: Any, field: str) -> None:
    for ask in (
        lambda: epsilon_of_list(parts, delta=DELTA),
        lambda: fits(parts, epsilon=1e9, delta=DELTA),
    ):
        with pytest.raises(InvalidPrivacyParameter, match=field):
            ask()


@pytest.mark.parametrize("answer", [math.nan, -1.0, MemoryError("full"), TypeError("no")])
def test_whatever_goes_wrong_admits_nothing(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return composition.PldBound(epsilon=answer, accurate=True, below_rdp=True)

    accountants._cached_epsilon.cache_clear()
    accountants._coarsely_fits.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(composition, "pld_epsilon", broken)
        with pytest.raises(AccountingError, match="pld accountant"):
            epsilon_of_list({A: 11, B: 12}, delta=DELTA)
        patch.setattr(composition, "pld_delta", broken)
        if isinstance(answer, Exception):
            with pytest.raises(AccountingError, match="pld accountant"):
                fits({A: 11, B: 12}, epsilon=1e6, delta=DELTA)
    assert epsilon_of_list({A: 11, B: 12}, delta=DELTA) > 0


# dp-accounting 0.6.0, at intervals of 1e-3 (of n = 60000, batch 256: which adds up to 0.2 %) and
# 1e-4; caps are at the mean and 1 to 6 standard deviations above, rounded down.
@pytest.mark.parametrize(
    ("n", "batch", "noise", "count", "values"),
    [
        (60000, 256, 1.0, 1000, [6.061, 4.865, 3.646, 2.240, 0.7849, 0.7297, 0.7291]),
        (60000, 1024, 1.0, 600, [13.85, 9.508, 6.196, 4.263, 2.640, 2.551, 2.5505]),
        (50000, 4096, 2.0, 1000, [23.01, 13.23, 7.831, 6.632, 6.543, 6.541, 6.5408]),
        (10000, 100, 1.0, 1000, [10.77, 7.984, 5.480, 3.851, 2.056, 1.832, 1.8290]),
        (1000, 64, 1.0, 300, [29.52, 20.17, 12.27, 8.741, 7.677, 7.574, 7.572]),
        (60000, 600, 0.8, 1000, [22.00, 14.86, 9.432, 6.465, 3.597, 3.146, 3.1415]),
    ],
)
def test_truncation_golden_values(
    n: int, batch: int, noise: float, count: int, values: list[float]
) -> None:
    stddev = math.sqrt(batch * (1 - batch / n))
    poisson = epsilon_of_list({gaussian(batch / n, noise): count}, delta=DELTA)
    for stddevs, value in enumerate(values):
        cap = math.floor(batch + stddevs * stddev)
        ours = epsilon_of_list({truncated(n, batch, noise, cap): count}, delta=DELTA)
        assert value * 0.998 <= ours <= value * 1.001
        assert ours >= poisson * (1 - 1e-3)


def test_tiny_noise_with_truncation_falls_back_to_the_gaussian() -> None:
    step = truncated(1000, 64, 0.01, 100)
    bound = epsilon_of_list({step: 3}, delta=DELTA)
    exact = dp_accounting.get_epsilon_gaussian(0.01 / 4 / math.sqrt(3), DELTA)
    assert exact <= bound <= exact * 1.01
    assert composition.pld_epsilon(((step, 3),), DELTA) == composition.NOT_COMPUTED


def test_truncation_with_rdp_is_refused() -> None:
    with pytest.raises(InvalidPrivacyParameter, match="accountant must be 'pld'"):
        epsilon_of_list({truncated(1000, 64, 1.0, 100): 3}, delta=DELTA, accountant="rdp")


def test_what_is_remembered_is_bounded() -> None:
    recent = composition._RecentDistributions(max_points=3000)
    for noise in np.linspace(1, 2, 20):
        step = gaussian(0.01, float(noise))
        built = recent(step, 1e-2, 1e-16)
        assert recent(step, 1e-2, 1e-16) is built
    assert recent._points == sum(one.removing.size for one in recent._kept.values()) <= 3000
    # What is larger than the limit by itself is handed out and not kept.
    assert recent(gaussian(0.01, 0.5), 1e-3, 1e-16).removing.size > 3000
    assert not recent._kept
