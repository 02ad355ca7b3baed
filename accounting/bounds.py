"""Upper bounds on epsilon, each sound by itself, so that the smallest one is sound too.

* `rdp_bound`: Rényi DP. Any parameters, typically 5 to 10 % above the truth.
* `gaussian_bound`: the same steps without subsampling, which cost at least as much and have a
  closed form. Exact at sampling probability 1; useful wherever the noise is tiny.
* `accounting.composition.pld_epsilon`: the privacy loss distribution. Tight, but computed only
  where its grid is affordable.
"""

# dp-accounting ships no stubs.
# pyright: reportMissingTypeStubs=false

import math
from collections.abc import Callable

import numpy as np

from accounting.cumulants import Parts
from accounting.mechanism import Step, TruncatedSampledGaussian
from accounting.renyi import LARGEST_ORDER, epsilon_of_rdp, parts_rdp

# Below this noise subsampling hardly helps: epsilon is above 1e5 whatever the other parameters.
_LEAST_NOISE_FOR_RDP = 1e-3
# Beyond this epsilon the closed form is within a fraction of a percent of the exact Gaussian.
_EXACT_UP_TO_EPSILON = 1e6
# Whole orders have a closed form, so most are whole.
_ORDERS = (
    *(1.05, 1.1, 1.25, 1.5, 1.75),
    *map(float, (*range(2, 13), 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 192, 256, 512)),
    LARGEST_ORDER,
)
# Where so few steps are distinct, what lies between these orders is searched, too.
_FEW_STEPS = 32
_NARROW = 1e-3
_GOLDEN = (math.sqrt(5) - 1) / 2
# A truncated step at worst exchanges one unit for another, at half the noise.
_TRUNCATED_SHIFT = 4.0


def rdp_bound(parts: Parts, delta: float) -> float:
    """Returns epsilon by Rényi differential privacy.

    The least over orders, with subsampling and without; every order gives a bound, so that those
    which are not looked at cost tightness alone.

    Args:
        parts: Distinct steps, none of them truncated, and their counts; not empty.
        delta: In [1e-10, 1).

    Returns:
        An upper bound. With at most 32 distinct steps, within a fraction of a percent of the
        best over all real orders up to 1024; else the best of 32 orders.

    References:
        Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
        2019, https://arxiv.org/abs/1908.10530
        Canonne, Kamath, Steinke, "The Discrete Gaussian", 2020, https://arxiv.org/abs/2004.00010
    """
    without_sampling = _all_orders_bound(parts, delta)
    if min(step.noise_multiplier for step, _ in parts) < _LEAST_NOISE_FOR_RDP:
        return without_sampling
    counts = dict(parts)

    def at(order: float) -> float:
        return epsilon_of_rdp(parts_rdp(counts, order), delta, order)

    found = [at(order) for order in _ORDERS]
    best = min(range(len(found)), key=found.__getitem__)
    least = found[best]
    if len(parts) <= _FEW_STEPS:
        lowest = _ORDERS[max(best - 1, 0)]
        highest = _ORDERS[min(best + 1, len(_ORDERS) - 1)]
        least = min(least, _least_between(at, lowest, highest))
    return min(least, without_sampling)


def _least_between(value: Callable[[float], float], lowest: float, highest: float) -> float:
    """The least that a golden-section search finds; Kiefer, 1953."""
    lower = highest - _GOLDEN * (highest - lowest)
    upper = lowest + _GOLDEN * (highest - lowest)
    at_lower, at_upper = value(lower), value(upper)
    least = min(at_lower, at_upper)
    while highest - lowest > _NARROW * lowest:
        if at_lower <= at_upper:
            highest, upper, at_upper = upper, lower, at_lower
            lower = highest - _GOLDEN * (highest - lowest)
            at_lower = value(lower)
        else:
            lowest, lower, at_lower = lower, upper, at_upper
            upper = lowest + _GOLDEN * (highest - lowest)
            at_upper = value(upper)
        least = min(least, at_lower, at_upper)
    return least


def gaussian_bound(parts: Parts, delta: float) -> float:
    """Returns epsilon as if every unit took part in every step.

    Gaussians without sampling are one Gaussian: squares of sensitivity over noise add up.

    Args:
        parts: Distinct steps and their counts; not empty.
        delta: In [1e-10, 1).

    Returns:
        An upper bound, exact up to 1e-9 at sampling probability 1 and epsilon below 1e6;
        infinite only where the number itself exceeds the range of a float.
    """
    closed_form = _all_orders_bound(parts, delta)
    if closed_form > _EXACT_UP_TO_EPSILON:
        return closed_form
    import dp_accounting  # Costs about a second, so only on demand.

    noise = 1 / max(_unsampled_ratio(parts), 1e-300)
    with np.errstate(divide="ignore"):
        exact = float(dp_accounting.get_epsilon_gaussian(noise, delta))
    return min(closed_form, exact * (1 + 1e-9) + 1e-9)


def _unsampled_ratio(parts: Parts) -> float:
    """Sensitivity over noise of all steps together, without sampling."""
    return math.hypot(*(_shift(step) * math.sqrt(count) for step, count in parts))


def _shift(step: Step) -> float:
    """Sensitivity over noise of one step without sampling."""
    if isinstance(step, TruncatedSampledGaussian):
        return _TRUNCATED_SHIFT / step.noise_multiplier
    return 1 / step.noise_multiplier


def _all_orders_bound(parts: Parts, delta: float) -> float:
    """RDP without subsampling, minimised over all real orders (Bun and Steinke, 2016, 1.3)."""
    ratio = _unsampled_ratio(parts)
    return 0.5 * ratio * ratio + ratio * math.sqrt(-2 * math.log(delta))
