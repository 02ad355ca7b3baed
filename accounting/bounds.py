"""Upper bounds on epsilon, each sound by itself, so that the smallest one is sound too.

* `rdp_bound`: Rényi DP. Milliseconds, any parameters, typically 5 to 10 % above the truth.
* `gaussian_bound`: the same mechanism without subsampling, which costs at least as much and has a
  closed form. Exact at sampling probability 1; useful wherever the noise is tiny.
* `pld_bound`: the privacy loss distribution. Tight, but its time and memory grow without limit as
  noise falls and iterations rise. It is therefore computed only on a grid that fits (see
  `accounting.privacy_loss`) and not at all where epsilon is far beyond any sensible budget.

Rounding errors are paid for, not ignored. Composing by FFT leaves an error in delta of about
1e-16 per iteration (at most 1.3e-16 when compared with extended precision); the question
is therefore asked at a delta smaller by four times that. The Rényi divergence of a step carries an
error of about 1e-17 per unit of order; ten times that is added.
"""

# dp-accounting and scipy ship no stubs.
# pyright: reportMissingTypeStubs=false

import contextlib
import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Generator

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from accounting import privacy_loss
from accounting.mechanism import DpSgdMechanism

# Outside these the library's formulas overflow. Clamped upwards in cost: less noise and more
# frequent sampling never cost less.
_LARGEST_NOISE_MULTIPLIER = 1e9
_LEAST_SAMPLING_PROB = 1e-12
_SAMPLING_PROB_AS_GOOD_AS_ONE = 1 - 1e-9

_RELATIONS = {
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "zero_out": NeighboringRelation.REPLACE_SPECIAL,
}
# Below this noise subsampling hardly helps: epsilon is above 1e5 whatever the other parameters.
_LEAST_NOISE_FOR_RDP = 1e-3
# Below this noise losses of one step reach the thousands: epsilon is in the hundreds, and the
# rounding errors of such losses exceed the margin.
_LEAST_NOISE_FOR_PLD = 0.03
# Beyond this epsilon the closed form is within a fraction of a percent of the exact Gaussian.
_EXACT_UP_TO_EPSILON = 1e6
_RDP_ERROR_PER_ITERATION = 1e-16
_FFT_ERROR_PER_ITERATION = 4e-16
_FFT_ERROR = 1e-12


def clamped(mechanism: DpSgdMechanism) -> DpSgdMechanism:
    """Returns a mechanism within the range of the formulas that costs at least as much."""
    sampling_prob = max(mechanism.sampling_prob, _LEAST_SAMPLING_PROB)
    if sampling_prob > _SAMPLING_PROB_AS_GOOD_AS_ONE:
        sampling_prob = 1.0
    noise_multiplier = min(mechanism.noise_multiplier, _LARGEST_NOISE_MULTIPLIER)
    return dataclasses.replace(
        mechanism, sampling_prob=sampling_prob, noise_multiplier=noise_multiplier
    )


def rdp_bound(mechanism: DpSgdMechanism, delta: float) -> float:
    """Returns epsilon by Rényi differential privacy.

    The best of the library's 156 orders with subsampling, and of all orders without.

    Args:
        mechanism: What is accounted.
        delta: In [1e-10, 1).

    References:
        Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism",
        2019, https://arxiv.org/abs/1908.10530
        Canonne, Kamath, Steinke, "The Discrete Gaussian", 2020, https://arxiv.org/abs/2004.00010
    """
    mechanism = clamped(mechanism)
    without_sampling = _all_orders_bound(mechanism, delta)
    if mechanism.noise_multiplier < _LEAST_NOISE_FOR_RDP:
        return without_sampling
    with _library_log_muted(), np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        orders, step_curve = _step_curve(mechanism.after(1))
        curve = mechanism.iterations * (step_curve + _RDP_ERROR_PER_ITERATION * orders)
        with_sampling = float(compute_epsilon(orders.tolist(), curve.tolist(), delta)[0])
    if math.isnan(with_sampling):
        return without_sampling
    return min(with_sampling, without_sampling)


@functools.lru_cache(maxsize=256)
def _step_curve(step: DpSgdMechanism) -> tuple[np.ndarray, np.ndarray]:
    """The Rényi divergence of one step at each of the library's orders.

    Iterations add up, so this one curve serves every number of them; it is what takes time.

    Returns:
        ``(orders, divergences)``, float64 ``[orders]`` each.
    """
    accountant = RdpAccountant(neighboring_relation=_RELATIONS[step.neighboring_relation])
    accountant.compose(step.dp_event())
    # The curve has no public name; the exact pin of dp-accounting keeps this one.
    return np.asarray(vars(accountant)["_orders"]), np.asarray(vars(accountant)["_rdp"])


def gaussian_bound(mechanism: DpSgdMechanism, delta: float) -> float:
    """Returns epsilon as if every example took part in every step.

    `iterations` Gaussians are one Gaussian with its noise divided by sqrt(iterations).

    Args:
        mechanism: What is accounted.
        delta: In [1e-10, 1).

    Returns:
        An upper bound, exact up to 1e-9 at sampling probability 1 and epsilon below 1e6;
        infinite only where the number itself exceeds the range of a float.
    """
    closed_form = _all_orders_bound(mechanism, delta)
    if closed_form > _EXACT_UP_TO_EPSILON:
        return closed_form
    noise = mechanism.noise_multiplier / math.sqrt(mechanism.iterations)
    with np.errstate(divide="ignore"):
        exact = float(dp_accounting.get_epsilon_gaussian(noise, delta))
    return min(closed_form, exact * (1 + 1e-9) + 1e-9)


def pld_bound(mechanism: DpSgdMechanism, delta: float, finest_interval: float) -> float:
    """Returns epsilon by the privacy loss distribution, or infinity where it is not computed.

    Args:
        mechanism: What is accounted.
        delta: In [1e-10, 1).
        finest_interval: Least distance between grid points, > 0.

    Returns:
        An upper bound on epsilon. Infinite if sampling is not done (`gaussian_bound` is exact),
        if noise is below 0.03, if the grid would exceed its limits, or if rounding errors are not
        small against delta.
    """
    mechanism = clamped(mechanism)
    q, noise, iterations = (
        mechanism.sampling_prob,
        mechanism.noise_multiplier,
        mechanism.iterations,
    )
    safe_delta = delta - _FFT_ERROR - _FFT_ERROR_PER_ITERATION * iterations
    if q == 1 or noise < _LEAST_NOISE_FOR_PLD or safe_delta < delta / 2:
        return math.inf
    interval = privacy_loss.choose_interval(q, noise, iterations, finest_interval)
    if interval is None:
        return math.inf
    step = privacy_loss.step_distribution(q, noise, interval)
    with np.errstate(over="ignore"):  # Losses above 700: the answer is infinite, hence sound.
        return float(step.self_compose(iterations).get_epsilon_for_delta(safe_delta))


def _all_orders_bound(mechanism: DpSgdMechanism, delta: float) -> float:
    """RDP without subsampling, minimised over all real orders (Bun and Steinke, 2016, 1.3)."""
    ratio = math.sqrt(mechanism.iterations) / mechanism.noise_multiplier
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
