"""Epsilon and delta of a composition by its privacy loss distribution.

Plan a grid, compose on it, look at what the grid has added, and compose once more on a finer grid
where that is too much. Each result is an upper bound by itself. What a grid adds is known well: it
spreads the loss of each step by a variance of about d² / 6, d being the distance between points.

Rounding errors are paid for, not ignored. Composing by FFT leaves an error in delta of about
1e-16 per step (at most 1.3e-16 when compared with extended precision); the question is therefore
asked at a delta smaller by three times that. Where that would take half of it, no bound is given.
"""

import collections
import dataclasses
import math
import threading

from accounting.convolution import Composed, compose
from accounting.cumulants import Parts
from accounting.grid import ACCURACY, LEAST_EPSILON, Plan, make_plan
from accounting.mechanism import SampledGaussian, Step
from accounting.privacy_loss import (
    LEAST_NOISE,
    LEAST_NOISE_TRUNCATED,
    StepDistribution,
    step_distribution,
)

COARSE_ACCURACY = 2e-3
"""Share of epsilon that the grid of a quick look should add."""

MAX_REMEMBERED_POINTS = 2**22
"""Grid points of the steps' distributions kept between queries, 16 bytes each."""

_FFT_ERROR = 1e-12
_FFT_ERROR_PER_STEP = 4e-16
_MAX_REFINEMENTS = 2
# What a grid has added, in terms of what was asked: what will do, and what a finer one aims at.
_ACCEPTED = 4.0
_AIMED = 3.0


class _RecentDistributions:
    """Distributions of single steps, the most recent ones, up to a number of grid points.

    A trainer asks for the cost after several numbers of steps, and an account for one list after
    the other; composing is cheaper than building.
    """

    def __init__(self, max_points: int) -> None:
        self._max_points = max_points
        self._points = 0
        self._kept: collections.OrderedDict[tuple[Step, float, float], StepDistribution] = (
            collections.OrderedDict()
        )
        self._lock = threading.Lock()

    def __call__(self, step: Step, interval: float, tail_mass: float) -> StepDistribution:
        key = (step, interval, tail_mass)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        built = step_distribution(step, interval, tail_mass)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = built
                self._points += built.removing.size
            while self._points > self._max_points:
                _, dropped = self._kept.popitem(last=False)
                self._points -= dropped.removing.size
        return built


_recent = _RecentDistributions(MAX_REMEMBERED_POINTS)


@dataclasses.dataclass(frozen=True)
class PldBound:
    """An upper bound on epsilon and what is known about it.

    Attributes:
        epsilon: Infinite where it is not computed.
        accurate: Whether the grid has added next to nothing.
        below_rdp: Whether Rényi DP is certain to be no smaller.
    """

    epsilon: float
    accurate: bool
    below_rdp: bool


NOT_COMPUTED = PldBound(epsilon=math.inf, accurate=False, below_rdp=False)


def pld_epsilon(parts: Parts, delta: float, accuracy: float = ACCURACY) -> PldBound:
    """Returns epsilon by the privacy loss distribution.

    Args:
        parts: Distinct steps and their counts; not empty.
        delta: In [1e-10, 1).
        accuracy: Share of epsilon, or of 0.001 if that is more, that the grid should add; up to
            four times that is accepted.

    Returns:
        An upper bound. It is infinite if a step's noise is too small (`privacy_loss.LEAST_NOISE`),
        if the grid would exceed its limits, if epsilon is beyond `convolution.LARGEST_EPSILON`, or
        if rounding errors are not small against delta.
    """
    known = _question(parts, delta)
    plan = known and make_plan(known[0], known[1], accuracy=accuracy)
    if known is None or plan is None:
        return NOT_COMPUTED
    parts, safe_delta = known
    best = error = target = math.inf
    for _ in range(1 + _MAX_REFINEMENTS):
        epsilon, sensitivity = _larger(_both(parts, plan), safe_delta)
        best = min(best, epsilon)
        error = sensitivity * plan.count * plan.interval**2 / 12
        target = accuracy * max(best, LEAST_EPSILON)
        if not math.isfinite(best) or error <= _ACCEPTED * target:
            break
        wanted = plan.interval * math.sqrt(_AIMED * target / error)
        finer = make_plan(parts, safe_delta, accuracy=accuracy, interval=wanted)
        if finer is None or finer.interval > 0.9 * plan.interval:
            break
        plan = finer
    return PldBound(
        epsilon=best,
        accurate=error <= 2 * _ACCEPTED * target < math.inf,
        below_rdp=best == 0 or best < 0.99 * plan.renyi,
    )


def pld_delta(parts: Parts, epsilon: float, delta: float, accuracy: float) -> float:
    """Returns an upper bound on the delta at an epsilon, or 1 where it is not computed.

    Args:
        parts: Distinct steps and their counts; not empty.
        epsilon: At least 0.
        delta: About what is expected; the grid is made for it.
        accuracy: Share of epsilon that the grid may add.
    """
    known = _question(parts, delta)
    plan = known and make_plan(known[0], known[1], accuracy=accuracy)
    if known is None or plan is None:
        return 1.0
    margin = delta - known[1]
    return min(1.0, max(one.delta(epsilon) for one in _both(known[0], plan)) + margin)


def _question(parts: Parts, delta: float) -> tuple[Parts, float] | None:
    """The parts without what need not be composed, and delta without the margin."""
    count = sum(count for _, count in parts)
    safe_delta = delta - _FFT_ERROR - _FFT_ERROR_PER_STEP * count
    if safe_delta < delta / 2:
        return None
    merged = _merge_unsampled(parts)
    for step, _ in merged:
        least = LEAST_NOISE if isinstance(step, SampledGaussian) else LEAST_NOISE_TRUNCATED
        if step.noise_multiplier < least:
            return None
    return merged, safe_delta


def _merge_unsampled(parts: Parts) -> Parts:
    """Gaussians without sampling are one Gaussian."""
    sampled = [(step, count) for step, count in parts if not is_unsampled(step)]
    ratios = [
        math.sqrt(count) / step.noise_multiplier for step, count in parts if is_unsampled(step)
    ]
    if not ratios:
        return sampled
    noise = 1 / max(math.hypot(*ratios), 1e-300)
    return [*sampled, (SampledGaussian(noise_multiplier=noise, sampling_prob=1.0), 1)]


def is_unsampled(step: Step) -> bool:
    """Whether the step is a Gaussian without sampling, for which a closed form is exact."""
    return isinstance(step, SampledGaussian) and step.sampling_prob == 1


def _both(parts: Parts, plan: Plan) -> tuple[Composed, Composed]:
    """The composed distribution when a unit is removed and when one is added."""
    return (
        compose(parts, plan, adding=False, distribution=_recent),
        compose(parts, plan, adding=True, distribution=_recent),
    )


def _larger(directions: tuple[Composed, Composed], delta: float) -> tuple[float, float]:
    """Epsilon of the costlier direction and its sensitivity."""
    return max(one.epsilon(delta) for one in directions)
