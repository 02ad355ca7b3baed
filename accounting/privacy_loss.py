"""The privacy loss distribution of one step, on a grid of losses.

Idea: the privacy loss of a step is L = log(P/Q), where P and Q are the distributions of its output
with and without one unit. Both are mixtures of Gaussians on a line, and L rises along the line.
Each grid cell [l, l + d] of losses is therefore an interval of outputs, with masses p of P and q
of Q. "Connect the dots" puts p on the two ends of the cell such that q is kept as well,

    upper = (p - exp(l) q) / (1 - exp(-d)),        lower = p - upper,

which is the least that can only raise every hockey-stick divergence. Any grid hence gives an upper
bound; a finer one gives a tighter bound and costs more. Because both masses are kept, the same
pair read backwards is the distribution of the opposite direction: what has mass m at loss l when a
unit is removed has mass m exp(-l) at loss -l when one is added.

Masses are differences of whichever tail is the smaller, so that their errors are relative to that
tail, and probabilities always add up: rounding cannot create or lose mass over many compositions.

References:
    Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of Privacy Loss
    Distributions", 2022, https://arxiv.org/abs/2207.04380
    Zhu, Dong, Wang, "Optimal Accounting of Differential Privacy via Characteristic Function",
    2022, https://arxiv.org/abs/2106.08567 (dominating pairs)
    Chua et al., "Scalable DP-SGD: Shuffling vs. Poisson Subsampling", 2024,
    https://arxiv.org/abs/2411.04205 (truncated batches)
"""

# scipy ships no stubs.
# pyright: reportMissingTypeStubs=false

import dataclasses
import functools
import math

import numpy as np
import numpy.typing as npt
from scipy import special

from accounting.mechanism import SampledGaussian, Step

Floats = npt.NDArray[np.float64]

LEAST_NOISE = 0.04
"""Least noise multiplier: below it single losses reach the thousands, and epsilon hundreds."""

LEAST_NOISE_TRUNCATED = 0.16
"""The same for truncated batches, where noise is four times less effective in the worst case."""

_LARGEST_STDDEVS = 9.5
# Truncation less probable than this counts as an infinite loss.
_NEGLIGIBLE_TRUNCATION = 1e-24


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two mixtures of Gaussians on a line whose log-ratio is the privacy loss, rising along it.

    P = (1 - q) N(0, s²) + q N(1, s²);   Q = N(0, s²), or with `mirrored`
    Q = (1 - q) N(0, s²) + q N(-1, s²).

    Attributes:
        weight: Probability with which this pair is the one in force; in (0, 1].
        stddev: s, > 0.
        sampling_prob: q, in (0, 1].
        mirrored: Which Q.
    """

    weight: float
    stddev: float
    sampling_prob: float
    mirrored: bool

    def losses(self, outputs: Floats) -> Floats:
        """The loss at each output."""
        rise = self._log_ratio(outputs)
        return rise - self._log_ratio(-outputs) if self.mirrored else rise

    def _log_ratio(self, outputs: Floats) -> Floats:
        q = self.sampling_prob
        exponents = (outputs - 0.5) / self.stddev**2
        if q == 1:
            return exponents
        small = np.minimum(exponents, 30.0)
        # log(1 - q + q exp(x)), accurate for small x and without overflow for large x.
        low = np.log1p(q * np.expm1(small))
        high = exponents + math.log(q) + np.log1p((1 - q) / q * np.exp(-np.maximum(exponents, 0)))
        return np.where(exponents < 30.0, low, high)

    def outputs(self, losses: Floats) -> Floats:
        """The output at each loss, the inverse of `losses`; -inf where no loss is so low."""
        q, variance = self.sampling_prob, self.stddev**2
        if self.mirrored:
            if q == 1:
                return variance * losses / 2
            log_ratio = math.log1p(-q) - math.log(q) + 0.5 / variance
            half = losses / 2
            # asinh(exp(log_ratio) sinh(half)), without overflow.
            with np.errstate(divide="ignore"):
                log_sinh = np.abs(half) + np.log(-np.expm1(-np.abs(losses))) - math.log(2)
            log_product = log_ratio + log_sinh
            product = np.exp(np.minimum(log_product, 20.0))
            large = log_product + math.log(2)
            magnitude = np.where(log_product < 20.0, np.arcsinh(product), large)
            return variance * (half + np.sign(losses) * magnitude)
        if q == 1:
            return variance * losses + 0.5
        small = np.minimum(losses, 1.0)
        with np.errstate(divide="ignore"):
            low = np.log1p(np.maximum(np.expm1(small) / q, -1.0))
        high = losses - math.log(q) + np.log1p(-(1 - q) * np.exp(-np.maximum(losses, 1.0)))
        return variance * np.where(losses < 1.0, low, high) + 0.5

    def log_densities(self, outputs: Floats) -> Floats:
        """Log P at each output, up to a constant."""
        at_zero = -((outputs / self.stddev) ** 2) / 2
        at_one = -(((outputs - 1) / self.stddev) ** 2) / 2
        if self.sampling_prob == 1:
            return at_one
        stay, drawn = math.log1p(-self.sampling_prob), math.log(self.sampling_prob)
        return np.logaddexp(stay + at_zero, drawn + at_one)

    def output_range(self, tail_mass: float) -> tuple[float, float]:
        """Outputs beyond which P above, and Q below, have at most about `tail_mass` (weighted)."""
        q, s = self.sampling_prob, self.stddev
        above = max(1 + _tail(tail_mass / (self.weight * q)) * s, _tail(tail_mass) * s)
        if self.mirrored:
            return -above, above
        return -_tail(tail_mass) * s, above


def _tail(mass: float) -> float:
    """Standard deviations beyond which a normal variable has at most the mass, in half steps."""
    exact = -float(special.ndtri(min(max(mass, 1e-300), 0.5)))
    return min(math.ceil(2 * exact) / 2, _LARGEST_STDDEVS)


@functools.lru_cache(maxsize=1024)
def pairs(step: Step) -> tuple[tuple[Pair, ...], float]:
    """Returns the pairs whose mixture is the step, and the probability of an infinite loss.

    With truncated batches, let p = P[Bin(n-1, q) >= B] be the probability that the batch is full
    without the unit in question. If it is not, the step is as without truncation. If it is,
    the unit takes another's place: a change of twice the sensitivity, in both directions, for
    which the pair with a mirrored Q at half the noise is an upper bound.
    """
    if isinstance(step, SampledGaussian):
        return (Pair(1.0, step.noise_multiplier, step.sampling_prob, False),), 0.0
    n, q, cap = step.num_examples, step.sampling_prob, step.truncated_batch_size
    truncated = _binomial_tail(cap - 1, n - 1, q)
    plain = Pair(1 - truncated, step.noise_multiplier, q, False)
    if truncated < _NEGLIGIBLE_TRUNCATION:
        return (Pair(1.0, step.noise_multiplier, q, False),), truncated
    drawn = min(1.0, _binomial_tail(cap, n, q) * cap / truncated / n)
    full = Pair(truncated, step.noise_multiplier / 2, drawn, True)
    return ((plain, full) if truncated < 1 else (full,)), 0.0


def _binomial_tail(k: int, n: int, q: float) -> float:
    """P[Bin(n, q) > k]."""
    if k >= n:
        return 0.0
    return float(special.betainc(k + 1, n - k, q))


@dataclasses.dataclass(frozen=True, eq=False)
class StepDistribution:
    """The distribution of the loss of one step, in both directions.

    Attributes:
        interval: Distance between grid points.
        lowest: Index of the first grid point; the loss is the index times `interval`.
        removing: Probability of each loss when a unit is removed, float64 ``[points]``.
        adding: Probability of the *negative* of each loss when one is added, ``[points]``.
        infinite_removing: Probability of an infinite loss when a unit is removed.
        infinite_adding: The same when one is added.
    """

    interval: float
    lowest: int
    removing: Floats
    adding: Floats
    infinite_removing: float
    infinite_adding: float

    @property
    def losses(self) -> Floats:
        """The loss of each entry of `removing`."""
        last = self.lowest + self.removing.size
        return np.arange(self.lowest, last, dtype=np.float64) * self.interval


def loss_range(step: Step, tail_mass: float) -> tuple[float, float]:
    """Returns the losses between which the grid must reach if so much mass may lie beyond."""
    ends = [
        one.losses(np.asarray(one.output_range(tail_mass), dtype=np.float64))
        for one in pairs(step)[0]
    ]
    return float(min(low for low, _ in ends)), float(max(high for _, high in ends))


def step_distribution(step: Step, interval: float, tail_mass: float) -> StepDistribution:
    """Returns the distribution of one step.

    Args:
        step: Its noise multiplier is at least `LEAST_NOISE` (`LEAST_NOISE_TRUNCATED`).
        interval: Distance between grid points, > 0.
        tail_mass: Losses that are rarer may count as infinite; whatever does is recorded.

    Formal guarantees:
        Its hockey-stick divergence, in both directions, is nowhere below that of the step, but
        for rounding errors of about 1e-16 times the divergence's own tail.
    """
    parts, infinite = pairs(step)
    placed = [_on_grid(one, interval, tail_mass) for one in parts]
    lowest = min(low for low, *_ in placed)
    removing = np.zeros(max(low + probs.size for low, probs, *_ in placed) - lowest)
    infinite_removing = infinite_adding = infinite
    for one, (low, probs, lost_removing, lost_adding) in zip(parts, placed, strict=True):
        removing[low - lowest : low - lowest + probs.size] += one.weight * probs
        infinite_removing += one.weight * lost_removing
        infinite_adding += one.weight * lost_adding
    losses = np.arange(lowest, lowest + removing.size) * interval
    return StepDistribution(
        interval=interval,
        lowest=lowest,
        removing=removing,
        adding=removing * np.exp(-losses),
        infinite_removing=infinite_removing,
        infinite_adding=infinite_adding,
    )


def _on_grid(pair: Pair, interval: float, tail_mass: float) -> tuple[int, Floats, float, float]:
    """Connects the dots.

    Returns:
        ``(lowest index, probabilities, infinite mass removing, infinite mass adding)``.
    """
    ends = pair.losses(np.asarray(pair.output_range(tail_mass), dtype=np.float64))
    lowest, highest = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    highest = max(highest, lowest + 1)
    losses: Floats = np.arange(lowest, highest + 1, dtype=np.float64) * interval
    outputs = pair.outputs(losses)
    q = pair.sampling_prob
    center, center_below, center_above = _masses(outputs, 0.0, pair.stddev)
    drawn, drawn_below, drawn_above = _masses(outputs, 1.0, pair.stddev)
    ours = (1 - q) * center + q * drawn
    grown = np.exp(losses)
    if pair.mirrored:
        other, other_below, other_above = _masses(outputs, -1.0, pair.stddev)
        theirs_below = (1 - q) * center_below + q * other_below
        theirs_above = (1 - q) * center_above + q * other_above
        excess = ours - grown[:-1] * ((1 - q) * center + q * other)
    else:
        theirs_below, theirs_above = center_below, center_above
        # p - exp(l) q without the part that P and Q share.
        excess = q * drawn - (np.expm1(losses[:-1]) + q) * center
    ours_below = (1 - q) * center_below + q * drawn_below
    ours_above = (1 - q) * center_above + q * drawn_above
    upper = np.clip(excess / -math.expm1(-interval), 0.0, ours)
    probs = np.zeros(losses.size)
    probs[1:] = upper
    probs[:-1] += ours - upper
    # Beyond the ends: all of the one mass moves to the end, what is left of the other is infinite.
    probs[0] += ours_below
    kept = min(ours_above, float(grown[-1]) * theirs_above)
    probs[-1] += kept
    lost_adding = max(0.0, theirs_below - ours_below * math.exp(-losses[0]))
    return lowest, probs, ours_above - kept, lost_adding


def _masses(outputs: Floats, mean: float, stddev: float) -> tuple[Floats, float, float]:
    """Gaussian mass between neighbouring outputs, below the first and above the last."""
    scaled = (outputs - mean) / stddev
    tails: Floats = special.ndtr(-np.abs(scaled))
    masses: Floats = np.diff(np.where(scaled > 0, -tails, tails))
    masses[(scaled[:-1] <= 0) & (scaled[1:] > 0)] += 1.0
    below = tails[0] if scaled[0] <= 0 else 1 - tails[0]
    above = tails[-1] if scaled[-1] > 0 else 1 - tails[-1]
    return masses, float(below), float(above)
