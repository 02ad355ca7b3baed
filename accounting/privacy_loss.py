"""The privacy loss distribution of one DP-SGD step, on a grid that is never too large.

Idea: the privacy loss of one step is log(P/Q) under P, where P and Q are the outputs with and
without one example. Losses add up over steps, so the distribution of the total is a repeated
convolution, done by FFT on a grid of losses. Losses are rounded so that every hockey-stick
divergence can only grow ("connect the dots"), so any grid gives an upper bound; a finer one gives
a tighter bound and costs more.

The number of grid points is what costs time and memory, so the grid is chosen from it: as fine as
`FINEST_INTERVAL`, doubled until one step fits into `MAX_STEP_POINTS` and the whole into
`MAX_TOTAL_POINTS`. Where even `COARSEST_INTERVAL` does not do, epsilon is in the thousands or
beyond and no distribution is computed at all.

The hockey-stick divergence of one step has a closed form by amplification through subsampling:
with d(e) that of the Gaussian mechanism, q the sampling probability and
i(e) = log(1 + (exp(e) - 1)/q),

    removing an example:  delta(e) = q * d(i(e))
    adding an example:    delta(e) = q * exp(e + i(-e)) * d(-i(-e))

which is evaluated for the whole grid at once, some ten times faster than point by point.

References:
    Doroshenko et al., "Connect the Dots", 2022, https://arxiv.org/abs/2207.04380
    Balle, Barthe, Gaboardi, "Privacy Amplification by Subsampling", 2018,
    https://arxiv.org/abs/1807.01647
    Balle and Wang, "Improving the Gaussian Mechanism", 2018, https://arxiv.org/abs/1805.06530
    Koskela, Jälkö, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", 2020,
    https://arxiv.org/abs/1906.03049
"""

# dp-accounting and scipy ship no stubs.
# pyright: reportMissingTypeStubs=false

import functools
import math

import numpy as np
import numpy.typing as npt
from dp_accounting.pld import pld_pmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy import special

FINEST_INTERVAL = 1e-4
COARSEST_INTERVAL = FINEST_INTERVAL * 2**12
MAX_STEP_POINTS = 400_000
MAX_TOTAL_POINTS = 2_000_000

# Noise beyond this many standard deviations (probability 2e-22) counts as an infinite loss.
_TAIL_STDDEVS = 9.7
# Tail mass cut off by the library's composition, counted as an infinite loss.
_TAIL_MASS = 1e-15
_CHERNOFF_ORDERS = 20

Floats = npt.NDArray[np.float64]


def loss_range(sampling_prob: float, noise_multiplier: float) -> tuple[float, float]:
    """Returns the least and the largest loss of one step that the grid must hold.

    Args:
        sampling_prob: In (0, 1).
        noise_multiplier: At least 0.03.
    """
    inverse_variance = (1 / noise_multiplier) ** 2
    shift = _TAIL_STDDEVS / noise_multiplier
    stay, drawn = math.log1p(-sampling_prob), math.log(sampling_prob)
    return (
        float(np.logaddexp(stay, drawn - inverse_variance / 2 - shift)),
        float(np.logaddexp(stay, drawn + inverse_variance / 2 + shift)),
    )


def choose_interval(
    sampling_prob: float, noise_multiplier: float, iterations: int, finest: float
) -> float | None:
    """Returns the finest affordable distance between grid points, or None if none is.

    The width of the total distribution is bounded as the library's composition bounds it
    (Chernoff), with the Rényi divergence of order 2 in the place of those between 1 and 2.

    Args:
        sampling_prob: In (0, 1).
        noise_multiplier: At least 0.03.
        iterations: At least 1.
        finest: Where to start doubling, > 0.
    """
    least, largest = loss_range(sampling_prob, noise_multiplier)
    width = largest - least
    inverse_variance = (1 / noise_multiplier) ** 2
    log_expm1 = inverse_variance + math.log(-math.expm1(-inverse_variance))
    renyi_2 = float(np.logaddexp(0.0, 2 * math.log(sampling_prob) + log_expm1))
    order = min(1.0, _CHERNOFF_ORDERS / width)
    chernoff = iterations * renyi_2 + 2 * math.log(2 / _TAIL_MASS) / order
    total = 1.1 * min(iterations * width, chernoff)
    interval = finest
    while width / interval > MAX_STEP_POINTS or total / interval > MAX_TOTAL_POINTS:
        interval *= 2
        if interval > COARSEST_INTERVAL:
            return None
    return interval


def _gaussian_delta(epsilons: Floats, noise_multiplier: float) -> Floats:
    """Hockey-stick divergence of the Gaussian mechanism, for any sign of epsilon."""
    upper = 0.5 / noise_multiplier - noise_multiplier * epsilons
    lower = -0.5 / noise_multiplier - noise_multiplier * epsilons
    # exp(epsilon) * ndtr(lower), by whichever form does not cancel large numbers.
    scaled: Floats = np.exp(np.minimum(epsilons, 0)) * special.ndtr(lower)
    tail = lower < 0
    mills: Floats = 0.5 * special.erfcx(-lower[tail] / math.sqrt(2))
    scaled[tail] = mills * np.exp(-(upper[tail] ** 2) / 2)
    return special.ndtr(upper) - scaled


def _amplified(epsilons: Floats, sampling_prob: float) -> Floats:
    """log(1 + (exp(epsilon) - 1)/sampling_prob), stable, for epsilon > log(1 - sampling_prob)."""
    stay = math.log1p(-sampling_prob)
    return epsilons + np.log(-np.expm1(stay - epsilons)) - math.log(sampling_prob)


def step_deltas_remove(
    epsilons: Floats, *, sampling_prob: float, noise_multiplier: float
) -> Floats:
    """Hockey-stick divergence of one step when one example is removed.

    Args:
        epsilons: Losses, any sign.
        sampling_prob: In (0, 1).
        noise_multiplier: > 0.

    Returns:
        One delta in [0, 1] for each epsilon.
    """
    inside = epsilons > math.log1p(-sampling_prob)
    deltas = np.zeros_like(epsilons)
    deltas[~inside] = -np.expm1(epsilons[~inside])
    amplified = _amplified(epsilons[inside], sampling_prob)
    deltas[inside] = sampling_prob * _gaussian_delta(amplified, noise_multiplier)
    return np.clip(deltas, 0.0, 1.0)


def step_deltas_add(epsilons: Floats, *, sampling_prob: float, noise_multiplier: float) -> Floats:
    """Hockey-stick divergence of one step when one example is added; see `step_deltas_remove`."""
    inside = -epsilons > math.log1p(-sampling_prob)
    deltas = np.zeros_like(epsilons)
    amplified = _amplified(-epsilons[inside], sampling_prob)
    # sampling_prob * exp(epsilon + amplified), without cancelling large numbers.
    scale = -np.expm1(epsilons[inside] + math.log1p(-sampling_prob))
    deltas[inside] = scale * _gaussian_delta(-amplified, noise_multiplier)
    return np.clip(deltas, 0.0, 1.0)


@functools.lru_cache(maxsize=8)
def step_distribution(
    sampling_prob: float, noise_multiplier: float, interval: float
) -> PrivacyLossDistribution:
    """Returns the pessimistic privacy loss distribution of one step.

    Kept for the last few mechanisms, because a trainer asks for the cost after several numbers
    of iterations of one mechanism, and composing is cheaper than building.

    Args:
        sampling_prob: In (0, 1).
        noise_multiplier: At least 0.03.
        interval: Distance between grid points, > 0.
    """
    least, largest = loss_range(sampling_prob, noise_multiplier)
    lower, upper = math.floor(least / interval), math.ceil(largest / interval)
    connect = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap
    remove_epsilons = np.arange(lower, upper + 1, dtype=np.float64) * interval
    remove = step_deltas_remove(
        remove_epsilons, sampling_prob=sampling_prob, noise_multiplier=noise_multiplier
    )
    add_epsilons = np.arange(-upper, -lower + 1, dtype=np.float64) * interval
    add = step_deltas_add(
        add_epsilons, sampling_prob=sampling_prob, noise_multiplier=noise_multiplier
    )
    return PrivacyLossDistribution(
        connect(interval, lower, upper, remove).to_dense_pmf(),
        connect(interval, -upper, -lower, add).to_dense_pmf(),
    )
