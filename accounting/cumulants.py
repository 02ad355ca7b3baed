"""What the privacy loss of a step looks like from afar: its cumulant generating function.

    K(t) = log E[exp(t L)] under P, for many real t at once, by a few hundred quadrature points.

It costs a fraction of a millisecond and tells all that is needed to plan a computation: where
the composed distribution lies (Chernoff bounds), and what epsilon will be to a few percent (Rényi
DP at order a is K(a - 1) / (a - 1)). It is a plan and a guide only: accurate to many digits, but
no bound that is handed out rests on it.

The opposite direction needs no second table: its function at t is K(-1 - t).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from accounting.mechanism import Step
from accounting.privacy_loss import LEAST_NOISE, Floats, Pair, pairs

Parts = Sequence[tuple[Step, int]]
"""Distinct steps and how often each is composed."""

_RANGE_STDDEVS = 10.0
_MAX_POINTS = 400
_RATIO = 1.2
_OVERFLOW = 600.0


@dataclasses.dataclass(frozen=True, eq=False)
class Cumulants:
    """K of a composition on one grid of positive orders, for both directions and both tails.

    Attributes:
        orders: t > 0, float64 ``[orders]``, rising.
        removing_above: K(t) when a unit is removed: bounds large losses.
        removing_below: K(-t): bounds small losses.
        adding_above: K when one is added, at t.
        adding_below: The same at -t.
        count: How many steps in all.
    """

    orders: Floats
    removing_above: Floats
    removing_below: Floats
    adding_above: Floats
    adding_below: Floats
    count: int

    def epsilon(self, delta: float) -> tuple[float, float]:
        """Returns epsilon by Rényi DP, and the Rényi order at which it is attained."""
        found: list[tuple[float, float]] = []
        for cumulant in (self.removing_above, self.adding_above):
            epsilons = cumulant / self.orders + _conversion(self.orders, delta)
            at = int(np.argmin(epsilons))
            found.append((max(0.0, float(epsilons[at])), float(self.orders[at]) + 1))
        return max(found)


def cumulants(parts: Parts, delta: float) -> Cumulants:
    """Returns the cumulants of a composition, at orders around those that matter for delta.

    Args:
        parts: Steps and their counts; not empty.
        delta: In (0, 1).
    """
    orders = _orders(parts, delta)
    wanted = np.concatenate([orders, -orders, -1 - orders, orders - 1])
    total = np.zeros_like(wanted)
    for step, count in parts:
        total += count * step_cumulants(step, wanted)
    above, below, adding_above, adding_below = np.split(total, 4)
    return Cumulants(
        orders=orders,
        removing_above=above,
        removing_below=below,
        adding_above=adding_above,
        adding_below=adding_below,
        count=sum(count for _, count in parts),
    )


def renyi_guide(parts: Parts, delta: float, renyi_orders: Floats | None = None) -> float:
    """Returns about the epsilon by Rényi DP, to guide a search; no bound.

    Args:
        parts: Steps and their counts; not empty.
        delta: In (0, 1).
        renyi_orders: Orders > 1 to choose from; without them, a grid around the best.
    """
    if min(step.noise_multiplier for step, _ in parts) < LEAST_NOISE:
        # Sampling hardly helps here: the closed form without it.
        ratio = math.hypot(*(math.sqrt(count) / step.noise_multiplier for step, count in parts))
        return ratio * ratio / 2 + ratio * math.sqrt(-2 * math.log(delta))
    orders = _orders(parts, delta) if renyi_orders is None else renyi_orders - 1
    total = np.zeros_like(orders)
    for step, count in parts:
        total += count * step_cumulants(step, orders)
    return float(np.min(total / orders + _conversion(orders, delta)))


def _conversion(orders: Floats, delta: float) -> Floats:
    """What Rényi DP at orders above 1 by so much adds to become epsilon (Canonne et al., 2020)."""
    return np.log1p(-1 / (orders + 1)) - (math.log(delta) + np.log(orders + 1)) / orders


def _orders(parts: Parts, delta: float) -> Floats:
    """Orders around those that matter."""
    tables = [_quadrature(step) for step, _ in parts]
    variance = sum(
        count * sum(weight * float(probs @ losses**2) for weight, probs, losses in table)
        for (_, count), table in zip(parts, tables, strict=True)
    )
    # Where the distribution is normal this is the best order; heavy tails move it down.
    middle = math.sqrt(2 * math.log(2 / delta) / max(variance, 1e-300))
    steps = math.ceil(math.log(3e4) / math.log(_RATIO))
    return middle * 20 * _RATIO ** np.arange(-steps, 1, dtype=np.float64)


def step_cumulants(step: Step, orders: Floats) -> Floats:
    """Returns K of one step at any real orders; infinite where it would overflow."""
    excess = np.zeros_like(orders)
    for weight, probs, losses in _quadrature(step):
        exponents = np.outer(orders, losses)
        with np.errstate(divide="ignore"):
            weighted = exponents + np.log(probs)
        # exp(x) - 1 without cancellation where x is small, without overflow where it is large.
        terms = np.where(
            np.abs(exponents) < 1,
            probs * np.expm1(np.clip(exponents, -1, 1)),
            np.exp(np.minimum(weighted, _OVERFLOW)) - probs,
        )
        terms[weighted >= _OVERFLOW] = math.inf
        excess += weight * terms.sum(axis=1)
    return np.log1p(np.maximum(excess, -1 + 1e-15))


def _quadrature(step: Step) -> list[tuple[float, Floats, Floats]]:
    """For each pair of a step: its weight, and outputs' probabilities under P and losses."""
    return [(pair.weight, *_points(pair)) for pair in pairs(step)[0]]


def _points(pair: Pair) -> tuple[Floats, Floats]:
    s = pair.stddev
    first = -_RANGE_STDDEVS * s - (1 if pair.mirrored else 0)
    last = 1 + _RANGE_STDDEVS * s
    # The trapezoid rule converges exponentially; small noise makes the loss less smooth.
    spacing = max(s * min(1 / 3, s / 1.2), (last - first) / _MAX_POINTS)
    outputs = np.arange(first, last + spacing, spacing)
    probs = np.exp(pair.log_densities(outputs))
    return probs / probs.sum(), pair.losses(outputs)
