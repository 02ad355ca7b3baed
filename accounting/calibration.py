"""The other way round: the noise, the iterations or the batch size that meet a privacy target.

Idea: epsilon is monotone in each of them, so search for the crossing; led by Rényi DP's estimate,
first on a coarse grid, then on the fine one around its answer. The result is always a value
whose epsilon was computed by the accountant asked for, and lies within the target; that of a
bracket's middle or an interpolation is never returned unseen.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from accounting import _validate
from accounting._coarse_to_fine import coarse_to_fine
from accounting.accountants import ACCOUNTANTS, Accountant, epsilon, mechanism_parts
from accounting.errors import CalibrationError, InvalidPrivacyParameter
from accounting.mechanism import (
    DpSgdMechanism,
    Mechanism,
    NeighboringRelation,
    TruncatedSampledGaussian,
)

LEAST_NOISE_MULTIPLIER = 1e-2
LARGEST_NOISE_MULTIPLIER = 1e9
LEAST_BATCH_SIZE = 1.0


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
        neighboring_relation: See `Mechanism`.

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
    mechanism = DpSgdMechanism(
        noise_multiplier=1.0,
        sampling_prob=sampling_prob,
        iterations=iterations,
        neighboring_relation=neighboring_relation,
    )
    return calibrate_noise_of(
        mechanism,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
    )


def calibrate_noise_of(
    mechanism: Mechanism,
    *,
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant = "pld",
) -> float:
    """As `calibrate_noise_multiplier`, for a mechanism of any kind.

    Args:
        mechanism: What is run; its noise multiplier is not looked at.
        target_epsilon: Largest epsilon wanted; finite, > 0.
        target_delta: In [1e-10, 1).
        accountant: "pld" or "rdp"; the latter not for truncated batches.

    Returns:
        As `calibrate_noise_multiplier`, of the same mechanism.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        CalibrationError: As of `calibrate_noise_multiplier`.
        AccountingError: The accountant failed.

    Formal guarantees:
        As `calibrate_noise_multiplier`.
    """
    target_epsilon, target_delta = _target(target_epsilon, target_delta, accountant)
    ((step, _),) = mechanism_parts(mechanism)
    if accountant == "rdp" and isinstance(step, TruncatedSampledGaussian):
        raise InvalidPrivacyParameter("accountant", accountant, "'pld' with truncated batches")
    shape = dataclasses.replace(mechanism, noise_multiplier=1.0)
    return _noise_multiplier(shape, target_epsilon, target_delta, accountant)


@functools.lru_cache(maxsize=1024)
def _noise_multiplier(
    shape: Mechanism, target_epsilon: float, target_delta: float, accountant: Accountant
) -> float:
    """Calibrates from validated arguments; the noise multiplier of `shape` is ignored."""

    def with_noise(noise_multiplier: float) -> Mechanism:
        return dataclasses.replace(shape, noise_multiplier=noise_multiplier)

    steps = shape.sampling_prob * math.sqrt(shape.repetitions)
    result = coarse_to_fine(
        with_noise,
        target_epsilon,
        target_delta,
        accountant,
        start=min(max(0.5, 4 * steps / target_epsilon), 1e6),
        lowest=LEAST_NOISE_MULTIPLIER,
        highest=LARGEST_NOISE_MULTIPLIER,
    )
    if result is None:
        least = with_noise(LEAST_NOISE_MULTIPLIER)
        met = epsilon(least, delta=target_delta, accountant=accountant) <= target_epsilon
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


def calibrate_iterations(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    sampling_prob: float,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = "add_or_remove_one",
) -> int:
    """Returns the largest number of iterations that meets (target_epsilon, target_delta).

    Args:
        target_epsilon: Largest epsilon wanted; finite, > 0.
        target_delta: In [1e-10, 1).
        noise_multiplier: Finite, > 0.
        sampling_prob: In (0, 1].
        accountant: "pld" or "rdp".
        neighboring_relation: See `Mechanism`.

    Returns:
        An integer that meets the target while the next one does not; 1e12 if that does.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        CalibrationError: The target is missed by a single iteration.
        AccountingError: The accountant failed.

    Formal guarantees:
        As `calibrate_noise_multiplier`.
    """
    target_epsilon, target_delta = _target(target_epsilon, target_delta, accountant)
    one = DpSgdMechanism(
        noise_multiplier=noise_multiplier,
        sampling_prob=sampling_prob,
        iterations=1,
        neighboring_relation=neighboring_relation,
    )
    return _iterations(one, target_epsilon, target_delta, accountant)


@functools.lru_cache(maxsize=1024)
def _iterations(
    one: DpSgdMechanism, target_epsilon: float, target_delta: float, accountant: Accountant
) -> int:
    def cost(iterations: int) -> float:
        return epsilon(one.after(iterations), delta=target_delta, accountant=accountant)

    if cost(1) > target_epsilon:
        raise CalibrationError(
            f"target_epsilon {target_epsilon:g} at target_delta {target_delta:g} is missed even "
            f"by a single iteration (noise_multiplier {one.noise_multiplier:g}, sampling_prob "
            f"{one.sampling_prob:g})"
        )
    most = _validate.MAX_ITERATIONS
    if cost(most) <= target_epsilon:
        return most
    near = coarse_to_fine(
        lambda inverse: one.after(_whole(inverse)),
        target_epsilon,
        target_delta,
        accountant,
        start=0.5,
        lowest=1 / most,
        highest=1.0,
    )
    return _last_fitting(cost, target_epsilon, 1 if near is None else _whole(near))


def _last_fitting(cost: Callable[[int], float], target: float, near: int) -> int:
    """The integer that fits while the next does not; 1 fits, `near` is close."""
    fits, dear, stride = 1, _validate.MAX_ITERATIONS, max(1, near // 2000)
    at = near
    while dear - fits > 1:
        at = min(max(at, fits + 1), dear - 1)
        if cost(at) <= target:
            fits, at = at, at + stride
        else:
            dear, at = at, at - stride
        # Strides grow until both sides are known, then the bracket is halved.
        stride *= 2
        if fits > 1 and dear < _validate.MAX_ITERATIONS:
            at = (fits + dear) // 2
    return fits


def calibrate_expected_batch_size(
    *,
    target_epsilon: float,
    target_delta: float,
    noise_multiplier: float,
    iterations: int,
    num_examples: int,
    accountant: Accountant = "pld",
    neighboring_relation: NeighboringRelation = "add_or_remove_one",
) -> float:
    """Returns the largest expected batch size that meets (target_epsilon, target_delta).

    Args:
        target_epsilon: Largest epsilon wanted; finite, > 0.
        target_delta: In [1e-10, 1).
        noise_multiplier: Finite, > 0.
        iterations: An integer from 1 to 1e12.
        num_examples: Units in the data, each drawn with probability batch size / this; an
            integer from 1 to 1e12.
        accountant: "pld" or "rdp".
        neighboring_relation: See `Mechanism`.

    Returns:
        A number in [1, num_examples], at most 0.1 % below the largest that meets the target.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        CalibrationError: The target is missed even by an expected batch of one.
        AccountingError: The accountant failed.

    Formal guarantees:
        As `calibrate_noise_multiplier`.
    """
    target_epsilon, target_delta = _target(target_epsilon, target_delta, accountant)
    examples = _validate.count("num_examples", num_examples)
    full = DpSgdMechanism(
        noise_multiplier=noise_multiplier,
        sampling_prob=1.0,
        iterations=iterations,
        neighboring_relation=neighboring_relation,
    )
    return _expected_batch_size(full, examples, target_epsilon, target_delta, accountant)


@functools.lru_cache(maxsize=1024)
def _expected_batch_size(
    full: DpSgdMechanism,
    num_examples: int,
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant,
) -> float:
    def with_batches(inverse: float) -> DpSgdMechanism:
        return DpSgdMechanism(
            noise_multiplier=full.noise_multiplier,
            sampling_prob=min(1.0, 1 / inverse / num_examples),
            iterations=full.iterations,
            neighboring_relation=full.neighboring_relation,
        )

    def met_by(inverse: float) -> bool:
        spent = epsilon(with_batches(inverse), delta=target_delta, accountant=accountant)
        return spent <= target_epsilon

    least, largest = 1 / LEAST_BATCH_SIZE, 1 / num_examples
    if met_by(largest):
        return float(num_examples)
    if not met_by(least):
        raise CalibrationError(
            f"target_epsilon {target_epsilon:g} at target_delta {target_delta:g} is missed even "
            f"by an expected batch size of {LEAST_BATCH_SIZE:g} (noise_multiplier "
            f"{full.noise_multiplier:g}, iterations {full.iterations})"
        )
    inverse = coarse_to_fine(
        with_batches,
        target_epsilon,
        target_delta,
        accountant,
        start=math.sqrt(least * largest),
        lowest=largest,
        highest=least,
    )
    return LEAST_BATCH_SIZE if inverse is None else 1 / inverse


def _whole(inverse: float) -> int:
    """The number of iterations, down to a whole one."""
    return min(max(1, math.floor(1 / inverse + 1e-9)), _validate.MAX_ITERATIONS)


def _target(target_epsilon: float, target_delta: float, accountant: str) -> tuple[float, float]:
    _validate.one_of("accountant", accountant, ACCOUNTANTS)
    return (
        _validate.positive("target_epsilon", target_epsilon),
        _validate.delta("target_delta", target_delta),
    )
