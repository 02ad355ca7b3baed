"""Upper bounds on epsilon, each sound by itself, so that the smallest one is sound too.

* `rdp_bound`: Rényi DP. Any parameters, typically 5 to 10 % above the truth.
* `gaussian_bound`: the same steps without subsampling, which cost at least as much and have a
  closed form. Exact at sampling probability 1; useful wherever the noise is tiny.
* `accounting.composition.pld_epsilon`: the privacy loss distribution. Tight, but computed only
  where its grid is affordable.

The Rényi divergence of a step carries an error of about 1e-17 per unit of order; ten times that
is added.
"""

# dp-accounting and scipy ship no stubs.
# pyright: reportMissingTypeStubs=false

import contextlib
import functools
import logging
import math
import threading
from collections.abc import Generator

import dp_accounting
import numpy as np
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from accounting.cumulants import Parts
from accounting.mechanism import Step, TruncatedSampledGaussian
from accounting.renyi import epsilon_of_rdp, parts_rdp

# Below this noise subsampling hardly helps: epsilon is above 1e5 whatever the other parameters.
_LEAST_NOISE_FOR_RDP = 1e-3
# Beyond this epsilon the closed form is within a fraction of a percent of the exact Gaussian.
_EXACT_UP_TO_EPSILON = 1e6
_RDP_ERROR_PER_STEP = 1e-16
# A curve takes the library up to a second. Whole orders have a closed form.
_MAX_CURVES = 4
_FEW_ORDERS = (
    1.25,
    1.5,
    *map(float, (*range(2, 13), 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128)),
)
# A truncated step at worst exchanges one unit for another, at half the noise.
_TRUNCATED_SHIFT = 4.0


def rdp_bound(parts: Parts, delta: float) -> float:
    """Returns epsilon by Rényi differential privacy.

    The best of the library's 156 orders with subsampling, and of all orders without; of a few
    orders where there are so many distinct steps that whole curves would take too long.

    Args:
        parts: Distinct steps, none of them truncated, and their counts; not empty.
        delta: In [1e-10, 1).

    References:
        Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
        2019, https://arxiv.org/abs/1908.10530
        Canonne, Kamath, Steinke, "The Discrete Gaussian", 2020, https://arxiv.org/abs/2004.00010
    """
    without_sampling = _all_orders_bound(parts, delta)
    if min(step.noise_multiplier for step, _ in parts) < _LEAST_NOISE_FOR_RDP:
        return without_sampling
    if len(parts) > _MAX_CURVES:
        return min(without_sampling, _few_orders_bound(parts, delta))
    with _library_log_muted(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        orders, curve = np.zeros(0), np.zeros(0)
        for step, count in parts:
            orders, step_curve = _step_curve(step)
            total = count * (step_curve + _RDP_ERROR_PER_STEP * orders)
            curve = total if curve.size == 0 else curve + total
        with_sampling = float(compute_epsilon(orders.tolist(), curve.tolist(), delta)[0])
    if math.isnan(with_sampling):
        return without_sampling
    return min(with_sampling, without_sampling)


def _few_orders_bound(parts: Parts, delta: float) -> float:
    costs = dict(parts)
    return min(epsilon_of_rdp(parts_rdp(costs, order), delta, order) for order in _FEW_ORDERS)


@functools.lru_cache(maxsize=1024)
def _step_curve(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """The Rényi divergence of one step at each of the library's orders.

    Steps add up, so this one curve serves every number of them; it is what takes time.

    Returns:
        ``(orders, divergences)``, float64 ``[orders]`` each.
    """
    accountant = RdpAccountant()
    accountant.compose(step.dp_event())
    # The curve has no public name; the exact pin of dp-accounting keeps this one.
    return np.asarray(vars(accountant)["_orders"]), np.asarray(vars(accountant)["_rdp"])


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


@contextlib.contextmanager
def _library_log_muted() -> Generator[None]:
    """Drops what this thread logs through absl: one line for each order that did not converge.

    Such an order is left out of the minimum by the library, which is sound.
    """
    thread = threading.get_ident()
    logger = logging.getLogger("absl")

    def from_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(from_elsewhere)
    try:
        yield
    finally:
        logger.removeFilter(from_elsewhere)
