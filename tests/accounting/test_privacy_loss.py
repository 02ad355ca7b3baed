import math
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import common, privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss
from scipy import fft

from accounting import bounds, privacy_loss
from accounting.mechanism import DpSgdMechanism

STEPS = [(0.01, 1.0), (0.5, 5.0), (1e-4, 0.7), (0.3, 0.4), (0.999, 2.0), (1e-6, 30.0)]


@pytest.mark.parametrize(("prob", "noise"), STEPS)
def test_deltas_are_those_of_the_library(prob: float, noise: float) -> None:
    least, largest = privacy_loss.loss_range(prob, noise)
    epsilons = np.linspace(least, largest, 400)
    ours = {
        AdjacencyType.REMOVE: privacy_loss.step_deltas_remove(
            epsilons, sampling_prob=prob, noise_multiplier=noise
        ),
        AdjacencyType.ADD: privacy_loss.step_deltas_add(
            -epsilons[::-1], sampling_prob=prob, noise_multiplier=noise
        ),
    }
    for adjacency, deltas in ours.items():
        library: Any = GaussianPrivacyLoss(noise, sampling_prob=prob, adjacency_type=adjacency)
        points = epsilons if adjacency is AdjacencyType.REMOVE else -epsilons[::-1]
        # The library subtracts numbers near 1: its own error is a few times 1e-16.
        np.testing.assert_allclose(deltas, library.get_delta_for_epsilon(points), atol=1e-14)


@pytest.mark.parametrize(("prob", "noise", "iterations"), [(0.01, 1.0, 1000), (0.3, 1.5, 50)])
def test_composition_is_that_of_the_library(prob: float, noise: float, iterations: int) -> None:
    ours = privacy_loss.step_distribution(prob, noise, 1e-3).self_compose(iterations)
    library = privacy_loss_distribution.from_gaussian_mechanism(
        noise, sampling_prob=prob, value_discretization_interval=1e-3
    ).self_compose(iterations)
    for delta in (1e-3, 1e-5, 1e-8):
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(
            library.get_epsilon_for_delta(delta), rel=1e-6
        )


def test_the_grid_is_fine_for_usual_parameters_and_bounded_for_all() -> None:
    finest = privacy_loss.FINEST_INTERVAL
    for prob, noise, iterations in [(0.01, 1.0, 10**4), (0.1, 5.0, 10**4), (0.001, 0.5, 10**4)]:
        assert privacy_loss.choose_interval(prob, noise, iterations, finest) == finest
    for prob, noise, iterations in [(0.5, 0.05, 10**5), (0.5, 0.001, 1)]:
        assert privacy_loss.choose_interval(prob, noise, iterations, finest) is None
    rng = np.random.default_rng(0)
    for _ in range(200):
        prob, noise = 10 ** rng.uniform(-6, -0.01), 10 ** rng.uniform(-2.9, 4)
        interval = privacy_loss.choose_interval(prob, noise, 100, finest)
        least, largest = privacy_loss.loss_range(prob, noise)
        if interval is not None:
            assert (largest - least) / interval <= privacy_loss.MAX_STEP_POINTS


@pytest.mark.slow
def test_the_total_stays_within_its_limit() -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        prob, noise = 10 ** rng.uniform(-4, -0.1), 10 ** rng.uniform(-0.4, 2)
        iterations = int(10 ** rng.uniform(1, 6))
        interval = privacy_loss.choose_interval(prob, noise, iterations, 1e-3)
        assert interval is not None
        total: Any = privacy_loss.step_distribution(prob, noise, interval).self_compose(iterations)
        for distribution in (total._pmf_remove, total._pmf_add):
            assert distribution.size <= privacy_loss.MAX_TOTAL_POINTS


def extended_precision_delta(step: Any, iterations: int, epsilon: float) -> float:
    """Delta of a composed distribution by the same FFT in extended precision."""
    lower, upper = common.compute_self_convolve_bounds(step._probs, iterations, 1e-15)
    length = fft.next_fast_len(max(upper - lower + 1, step.size))
    spectrum: Any = fft.fft(np.asarray(step._probs, np.longdouble), length)
    probs = np.roll(np.real(np.asarray(fft.ifft(spectrum**iterations))), -lower)[
        : upper - lower + 1
    ]
    losses = (np.arange(len(probs)) + step._lower_loss * iterations + lower) * step._discretization
    above = losses > epsilon
    infinite = 1e-15 - math.expm1(iterations * math.log1p(-step._infinity_mass))
    return infinite + float(np.dot(-np.expm1(epsilon - losses[above]), probs[above]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prob", "noise", "iterations"),
    [(1e-4, 1.0, 10**6), (0.1, 100.0, 10**6), (0.01, 1.0, 1000), (1e-5, 0.7, 10**5)],
)
def test_the_margin_covers_the_rounding_errors_of_the_fft(
    prob: float, noise: float, iterations: int
) -> None:
    interval = 1e-3
    step: Any = privacy_loss.step_distribution(prob, noise, interval)
    mechanism = DpSgdMechanism(noise_multiplier=noise, sampling_prob=prob, iterations=iterations)
    for delta in (1e-5, 2e-9):
        bound = bounds.pld_bound(mechanism, delta, interval)
        assert math.isfinite(bound)
        for one in (step._pmf_remove, step._pmf_add):
            assert extended_precision_delta(one, iterations, bound) <= delta


def test_no_distribution_where_rounding_errors_rival_delta() -> None:
    mechanism = DpSgdMechanism(noise_multiplier=10, sampling_prob=0.01, iterations=10**6)
    assert bounds.pld_bound(mechanism, 1e-10, 1e-4) == math.inf
    assert bounds.pld_bound(mechanism, 1e-5, 1e-4) < math.inf
