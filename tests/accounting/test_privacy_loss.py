import math
from typing import Any

import dp_accounting
import mpmath
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, GaussianPrivacyLoss

from accounting import privacy_loss
from accounting.mechanism import SampledGaussian, Step, TruncatedSampledGaussian

STEPS = [(0.01, 1.0), (0.5, 5.0), (1e-4, 0.7), (0.3, 0.4), (0.999, 2.0), (1e-6, 30.0)]


def gaussian(sampling_prob: float, noise: float) -> SampledGaussian:
    return SampledGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)


def truncated(n: int, batch: float, noise: float, cap: int) -> TruncatedSampledGaussian:
    return TruncatedSampledGaussian(
        noise_multiplier=noise, sampling_prob=batch / n, num_examples=n, truncated_batch_size=cap
    )


def divergence(
    one: privacy_loss.StepDistribution, epsilons: np.ndarray, *, adding: bool
) -> np.ndarray:
    """Hockey-stick divergences of a step's distribution, term by term."""
    losses = -one.losses if adding else one.losses
    probs = one.adding if adding else one.removing
    infinite = one.infinite_adding if adding else one.infinite_removing
    gains = -np.expm1(np.minimum(epsilons[:, None] - losses[None, :], 0.0))
    return infinite + gains @ probs


@pytest.mark.parametrize(("prob", "noise"), STEPS)
def test_divergence_is_that_of_the_library_on_the_grid_and_above_it_between(
    prob: float, noise: float
) -> None:
    step = gaussian(prob, noise)
    least, largest = privacy_loss.loss_range(step, 1e-18)
    interval = (largest - least) / 400
    one = privacy_loss.step_distribution(step, interval, 1e-18)
    for adding in (False, True):
        kind = AdjacencyType.ADD if adding else AdjacencyType.REMOVE
        library: Any = GaussianPrivacyLoss(noise, sampling_prob=prob, adjacency_type=kind)
        on_grid = np.sort(-one.losses if adding else one.losses)[2:-2]
        # The library inverts the loss, which above (below) log(1 - q) does not exist.
        edge = math.log1p(-prob)
        on_grid = on_grid[(on_grid < -edge if adding else on_grid > edge)]
        np.testing.assert_allclose(
            divergence(one, on_grid, adding=adding),
            library.get_delta_for_epsilon(on_grid),
            atol=1e-14,
        )
        between = (on_grid[1:] + on_grid[:-1]) / 2
        ours = divergence(one, between, adding=adding)
        assert (ours >= np.asarray(library.get_delta_for_epsilon(between)) - 1e-15).all()


@pytest.mark.parametrize("prob", [1.0, 0.3])
def test_without_sampling_losses_are_normal(prob: float) -> None:
    pair = privacy_loss.Pair(1.0, 2.0, prob, False)
    outputs = np.linspace(-20, 30, 101)
    np.testing.assert_allclose(pair.outputs(pair.losses(outputs)), outputs, rtol=1e-8, atol=1e-8)
    if prob == 1:
        np.testing.assert_allclose(pair.losses(outputs), (outputs - 0.5) / 4)


@pytest.mark.parametrize(("noise", "prob"), [(0.5, 0.2), (3.0, 1.0), (0.1, 1e-6)])
def test_mirrored_losses_invert(noise: float, prob: float) -> None:
    pair = privacy_loss.Pair(1.0, noise, prob, True)
    losses = np.linspace(-40, 40, 201)
    outputs = pair.outputs(losses)
    assert (np.diff(outputs) > 0).all()
    np.testing.assert_allclose(pair.losses(outputs), losses, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    "step",
    [gaussian(*one) for one in STEPS] + [gaussian(1.0, 3.0), truncated(1000, 64, 1.0, 90)],
    ids=str,
)
@pytest.mark.parametrize("interval", [1e-2, 1e-4])
def test_mass_is_neither_made_nor_lost(step: Step, interval: float) -> None:
    one = privacy_loss.step_distribution(step, interval, 1e-14)
    assert one.removing.sum() + one.infinite_removing == pytest.approx(1, abs=1e-15 * 4)
    assert one.adding.sum() + one.infinite_adding == pytest.approx(1, abs=1e-15 * 4)
    assert (one.removing >= 0).all()
    assert 0 <= one.infinite_removing <= 1e-13
    assert 0 <= one.infinite_adding <= 1e-13


@pytest.mark.parametrize(
    ("prob", "noise", "interval"), [(1e-4, 1.0, 1e-5), (0.5, 5.0, 1e-4), (1e-6, 30.0, 1e-9)]
)
def test_rounding_moves_far_less_loss_than_the_grid_adds(
    prob: float, noise: float, interval: float
) -> None:
    one = privacy_loss.step_distribution(gaussian(prob, noise), interval, 1e-18)
    cumulative = np.cumsum(one.removing)
    drawn = np.searchsorted(cumulative, np.random.default_rng(0).uniform(0, 1, 12))
    with mpmath.workdps(40):
        q, s, d = mpmath.mpf(prob), mpmath.mpf(noise), mpmath.mpf(interval)

        def output(index: int) -> Any:
            inside = 1 + mpmath.expm1(index * d) / q
            return s * s * mpmath.log(inside) + 0.5 if inside > 0 else -mpmath.inf

        def upper(index: int) -> Any:
            """Share of cell [index, index + 1] that goes to its upper end, and its mass."""
            low, high = output(index), output(index + 1)
            theirs = mpmath.ncdf(high / s) - mpmath.ncdf(low / s)
            moved = mpmath.ncdf((high - 1) / s) - mpmath.ncdf((low - 1) / s)
            ours = (1 - q) * theirs + q * moved
            return (ours - mpmath.exp(index * d) * theirs) / (1 - mpmath.exp(-d)), ours

        errors: list[float] = []
        for place in drawn.clip(1, one.removing.size - 2).tolist():
            index = one.lowest + place
            ending, _ = upper(index - 1)
            beginning, mass = upper(index)
            errors.append(abs(float(ending + mass - beginning - one.removing[place])))
    # Errors of either sign: their sum grows with the root of their number.
    moved = max(errors) * interval * math.sqrt(one.removing.size)
    assert moved < 0.1 * interval * interval / 12


def test_truncation_is_the_mixture_of_the_library() -> None:
    n, batch, noise, cap, interval = 1000, 64, 1.0, 80, 1e-2
    library: Any = privacy_loss_distribution.from_truncated_subsampled_gaussian_mechanism(
        n,
        batch / n,
        cap,
        noise,
        value_discretization_interval=interval,
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    )
    one = privacy_loss.step_distribution(truncated(n, batch, noise, cap), interval, 1e-18)
    epsilons = np.linspace(0.0, 10.0, 21)
    for adding, theirs in ((False, library._pmf_remove), (True, library._pmf_add)):
        np.testing.assert_allclose(
            divergence(one, epsilons, adding=adding),
            [theirs.get_delta_for_epsilon(float(e)) for e in epsilons],
            rtol=1e-6,
            atol=1e-13,
        )


def test_a_cap_that_is_never_reached_changes_nothing() -> None:
    for cap in (1000, 5000):
        capped, infinite = privacy_loss.pairs(truncated(1000, 64, 1.0, cap))
        assert (capped, infinite) == privacy_loss.pairs(gaussian(0.064, 1.0))
    # So rare that it is counted as a failure instead.
    parts, infinite = privacy_loss.pairs(truncated(10**6, 100, 1.0, 260))
    assert len(parts) == 1
    assert 0 < infinite < 1e-24
