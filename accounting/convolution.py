"""Composition: the privacy loss distribution of many steps of several kinds.

Idea: losses add up, so distributions convolve, and a convolution is a product of spectra:

    composed = irfft( product over steps of rfft(step) ** count )

on one common grid (`accounting.grid`), once for removing a unit and once for adding one. The
length of the transform is that of a window holding the composed distribution but for a tail of
negligible mass; what lies outside wraps around. Mass wrapped from below appears at larger losses
than it has, and mass wrapped from above is counted as an infinite loss as well, by a Chernoff
bound on the discretised distributions themselves: every error is on the safe side.

References:
    Koskela, Jälkö, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", 2020,
    https://arxiv.org/abs/1906.03049
    Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy", 2021,
    https://arxiv.org/abs/2106.02848
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from accounting.cumulants import Parts
from accounting.grid import Plan
from accounting.mechanism import Step
from accounting.privacy_loss import Floats, StepDistribution, step_distribution

# exp of minus this, over all frequencies, is nothing beside the rounding errors.
_VANISHED = 60.0


@dataclasses.dataclass(frozen=True, eq=False)
class Composed:
    """The composed distribution in one direction, for losses above zero.

    Attributes:
        interval: Distance between grid points.
        lowest: Index of the first point, at least 1; the loss is the index times `interval`.
        probs: Probability of each loss, but for rounding errors, ``[points]``.
        infinite: Upper bound on the probability of anything larger.
    """

    interval: float
    lowest: int
    probs: Floats
    infinite: float

    def delta(self, epsilon: float) -> float:
        """The hockey-stick divergence at epsilon >= 0, but for rounding errors."""
        below = min(epsilon / self.interval, float(self.lowest + self.probs.size))
        first = min(max(math.floor(below) + 1 - self.lowest, 0), self.probs.size)
        losses = np.arange(self.lowest + first, self.lowest + self.probs.size) * self.interval
        weights = -np.expm1(np.minimum(epsilon - losses, 0.0))
        return self.infinite + float(weights @ self.probs[first:])

    def epsilon(self, delta: float) -> tuple[float, float]:
        """Solves for epsilon.

        Returns:
            ``(epsilon, sensitivity)``: the least epsilon >= 0 whose divergence is at most delta,
            but for rounding errors; and by how much it rises with half the variance of the
            composed loss, which is what a grid adds to.
        """
        if self.infinite > delta:
            return math.inf, 0.0
        # At each grid point, from the one below the first: the masses of larger losses.
        losses = np.arange(self.lowest - 1, self.lowest + self.probs.size) * self.interval
        above = _sum_above(self.probs) + self.infinite
        # The divergence is at most the mass above: an upper bound to measure losses from.
        reference = losses[int(np.flatnonzero(above <= delta)[0])]
        # Where the minimum takes effect the divergence comes out too large.
        theirs = _sum_above(self.probs * np.exp(np.minimum(reference - losses[1:], 600.0)))
        deltas = above - np.exp(np.minimum(losses - reference, 0.0)) * theirs
        dear = np.flatnonzero((deltas > delta) & (losses < reference))
        at = int(dear[-1]) if dear.size else 0
        if above[at] <= delta or (not dear.size and self.lowest == 1):
            return 0.0, 0.0
        if theirs[at] <= 0:
            return float(losses[min(at + 1, losses.size - 1)]), 0.0
        exact = reference + math.log((above[at] - delta) / theirs[at])
        least, largest = (losses[at], losses[at + 1]) if dear.size else (0.0, losses[0])
        epsilon = float(min(max(exact, least), largest))
        # Spreading losses by a variance v, E[exp(-L)] kept, adds v/2 times the density at epsilon.
        density = float(np.mean(self.probs[max(0, at - 2) : at + 3])) / self.interval
        slope = math.exp(min(epsilon - reference, 0.0)) * float(theirs[at])
        return epsilon, max(0.0, density / slope) if slope > 0 else 0.0


def _sum_above(values: Floats) -> Floats:
    """For each place before, between and after the values: the sum of those after it."""
    return np.append(np.cumsum(values[::-1])[::-1], 0.0)


Steps = Callable[[Step, float, float], StepDistribution]


def compose(
    parts: Parts, plan: Plan, *, adding: bool, distribution: Steps = step_distribution
) -> Composed:
    """Composes the steps in one direction.

    Args:
        parts: Steps and their counts; not empty.
        plan: Made for these parts.
        adding: Which direction.
        distribution: Makes one step's distribution; one that remembers saves time.
    """
    window = plan.adding if adding else plan.removing
    size, interval = window.size, plan.interval
    log_spectrum = np.zeros(size // 2 + 1, dtype=np.complex128)
    log_mgf = log_finite = 0.0
    moved = largest = 0
    for step, count in parts:
        one = distribution(step, interval, plan.step_tail)
        probs, first, losses, infinite = (
            one.removing,
            one.lowest,
            one.losses,
            one.infinite_removing,
        )
        if adding:
            probs, losses = one.adding[::-1], -losses[::-1]
            first, infinite = -(one.lowest + one.adding.size - 1), one.infinite_adding
        # With its mean at index 0 a step's phases are small, and so are errors in their powers.
        mean = first + round(float(probs @ np.arange(probs.size)) / float(probs.sum()))
        moved += count * mean
        largest += count * (first + probs.size - 1)
        spectrum = np.fft.rfft(_wrapped(probs, first - mean, size))
        # Most frequencies vanish in a high power; logarithms are what takes time.
        alive = spectrum.real**2 + spectrum.imag**2 > math.exp(-2 * _VANISHED / count)
        log_spectrum[alive] += count * np.log(spectrum[alive])
        log_spectrum[~alive] = -math.inf
        log_mgf += count * _log_mgf(probs, losses, window.order)
        log_finite += count * math.log1p(-infinite)
    alive = np.isfinite(log_spectrum)
    product = np.zeros_like(log_spectrum)
    product[alive] = np.exp(log_spectrum[alive])
    circle = np.fft.irfft(product, size)
    highest = window.lowest + size - 1
    lowest = max(1, window.lowest)
    probs = np.roll(circle, (moved - lowest) % size)[: highest + 1 - lowest]
    escaped = 0.0
    if largest > highest:
        escaped = math.exp(min(0.0, log_mgf - window.order * (highest + 1) * interval))
    return Composed(interval, lowest, probs, -math.expm1(log_finite) + escaped)


def _wrapped(probs: Floats, lowest: int, size: int) -> Floats:
    """The probabilities around a circle of grid points, index 0 at loss 0."""
    start = lowest % size
    rows = -(-(start + probs.size) // size)
    padded = np.zeros(rows * size)
    padded[start : start + probs.size] = probs
    return padded if rows == 1 else padded.reshape(rows, size).sum(axis=0)


def _log_mgf(probs: Floats, losses: Floats, order: float) -> float:
    """Log of the sum of exp(order * loss), an infinite loss left out."""
    exponents = order * losses
    if float(np.max(np.abs(exponents))) < 1:
        return math.log1p(float(probs @ np.expm1(exponents)) + float(probs.sum()) - 1)
    largest = max(0.0, float(exponents[-1]))
    return largest + math.log(float(probs @ np.exp(exponents - largest)))
