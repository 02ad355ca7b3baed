"""The other way round: the least noise that meets a privacy target.

Idea: epsilon falls as noise rises, so search for the crossing; first on a ten times coarser grid,
which is ten times cheaper and a little pessimistic, then around its answer on the fine grid. The
result is always a noise multiplier whose epsilon was computed and lies within the target; that of
a bracket's middle or an interpolation is never returned unseen.
"""

import functools
import math

from accounting import _validate
from accounting._search import smallest_fitting
from accounting.accountants import ACCOUNTANTS, Accountant, compute_epsilon, epsilon
from accounting.errors import CalibrationError
from accounting.mechanism import DpSgdMechanism, NeighboringRelation

TOLERANCE = 1e-3
"""The result is at most this fraction above the least noise that meets the target."""

LEAST_NOISE_MULTIPLIER = 1e-2
LARGEST_NOISE_MULTIPLIER = 1e9

_COARSENING = 10
_COARSE_TOLERANCE = 2e-4


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sampling_prob: float,
    iterations: int,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = "add_or_remove_one",
) -> float:
    """Returns the least noise multiplier that meets (target_epsilon, target_delta).

    Args:
        target_epsilon: Largest epsilon wanted; finite, > 0.
        target_delta: In [1e-10, 1).
        sampling_prob: In (0, 1].
        iterations: An integer from 1 to 1e12.
        accountant: "pld" (less noise) or "rdp" (typically 5 to 10 % more noise).
        neighboring_relation: See `DpSgdMechanism`.

    Returns:
        A noise multiplier at most 0.1 % above the least one in [0.01, 1e9] that meets the target.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        CalibrationError: The target is missed even at noise multiplier 1e9, or met even at 0.01.
        AccountingError: The accountant failed.

    Formal guarantees:
        `epsilon` of the mechanism with the returned noise, by the same accountant, never exceeds
        `target_epsilon`.
    """
    target_epsilon = _validate.positive("target_epsilon", target_epsilon)
    target_delta = _validate.delta("target_delta", target_delta)
    _validate.one_of("accountant", accountant, ACCOUNTANTS)
    mechanism = DpSgdMechanism(
        noise_multiplier=1.0,
        sampling_prob=sampling_prob,
        iterations=iterations,
        neighboring_relation=neighboring_relation,
    )
    return _calibrate(mechanism, target_epsilon, target_delta, accountant)


@functools.lru_cache(maxsize=1024)
def _calibrate(
    shape: DpSgdMechanism, target_epsilon: float, target_delta: float, accountant: Accountant
) -> float:
    """Calibrates from validated arguments; the noise multiplier of `shape` is ignored."""

    def with_noise(noise_multiplier: float) -> DpSgdMechanism:
        return DpSgdMechanism(
            noise_multiplier=noise_multiplier,
            sampling_prob=shape.sampling_prob,
            iterations=shape.iterations,
            neighboring_relation=shape.neighboring_relation,
        )

    def coarse(noise_multiplier: float) -> float:
        mechanism = with_noise(noise_multiplier)
        return compute_epsilon(mechanism, target_delta, accountant, coarsening=_COARSENING)

    def fine(noise_multiplier: float) -> float:
        return epsilon(with_noise(noise_multiplier), delta=target_delta, accountant=accountant)

    steps = shape.sampling_prob * math.sqrt(shape.iterations)
    guess = min(max(0.5, 4 * steps / target_epsilon), 1e6)
    coarse_result = smallest_fitting(
        coarse,
        target_epsilon,
        start=guess,
        factor=2,
        tolerance=_COARSE_TOLERANCE,
        lowest=LEAST_NOISE_MULTIPLIER,
        highest=LARGEST_NOISE_MULTIPLIER,
    )
    result = coarse_result and smallest_fitting(
        fine,
        target_epsilon,
        start=coarse_result,
        factor=1 + 0.95 * TOLERANCE,  # One step down closes the bracket where the grids agree.
        tolerance=TOLERANCE,
        lowest=LEAST_NOISE_MULTIPLIER,
        highest=LARGEST_NOISE_MULTIPLIER,
    )
    if result is None:
        met = fine(LEAST_NOISE_MULTIPLIER) <= target_epsilon
        raise CalibrationError(
            f"target_epsilon {target_epsilon:g} at target_delta {target_delta:g} is "
            + (
                f"met even by noise_multiplier {LEAST_NOISE_MULTIPLIER:g}: the target does not "
                "restrict anything"
                if met
                else f"missed even by noise_multiplier {LARGEST_NOISE_MULTIPLIER:g}"
            )
            + f" (sampling_prob {shape.sampling_prob:g}, iterations {shape.iterations})"
        )
    return result
