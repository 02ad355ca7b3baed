"""What mechanisms cost: `epsilon(mechanism, delta=...)`, and `epsilon_of_list` of many together.

Both accountants return an upper bound on the true epsilon for every valid input, within seconds
and a bounded memory, and the same number every time:

* "rdp": Rényi DP, or the closed form without subsampling where that is smaller.
* "pld": the privacy loss distribution; where that is not computed, or not certainly the tightest,
  the smallest of it and the two bounds above. For epsilon from 0.01 to thousands its grid adds
  less than 0.1 % in practice. At sampling probability 1 the result is the exact value of
  the Gaussian mechanism.

A list fixed in advance is accounted as one composition, whatever kinds of steps are in it.

Nothing carries over from one query to the next but finished results and the distributions of
single steps, so a failed query cannot poison a later one.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

from accounting import _validate
from accounting.errors import AccountingError, InvalidPrivacyParameter
from accounting.mechanism import (
    Mechanism,
    SampledGaussian,
    Step,
    TruncatedSampledGaussian,
    step_key,
)

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")

AnyStep = TypeVar("AnyStep", bound=Step)

Parts = tuple[tuple[Step, int], ...]
"""Distinct steps and how often each is composed, in one canonical order."""

# Outside these the formulas overflow. Clamped upwards in cost: less noise and more frequent
# sampling never cost less.
_LARGEST_NOISE_MULTIPLIER = 1e9
_LEAST_SAMPLING_PROB = 1e-12
_SAMPLING_PROB_AS_GOOD_AS_ONE = 1 - 1e-9


def epsilon(mechanism: Mechanism, *, delta: float, accountant: Accountant = "pld") -> float:
    """Returns an epsilon for which the mechanism is (epsilon, delta)-differentially private.

    Asking for several `mechanism.after(step)` is cheap: the distribution of one step is kept.

    Args:
        mechanism: What is accounted.
        delta: In [1e-10, 1).
        accountant: "pld" (tight) or "rdp" (looser, not for truncated batches).

    Returns:
        A number >= 0, never NaN; `math.inf` only where the bound exceeds the range of a float.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        AccountingError: The accountant failed; nothing is known about the cost.

    Formal guarantees:
        Never below the true epsilon of the mechanism described by `mechanism`, up to rounding
        errors of double precision, for which there is a margin.
    """
    parts = mechanism_parts(mechanism)
    return _cached_epsilon(parts, _validate.delta("delta", delta), _accountant(accountant, parts))


def epsilon_of_list(
    parts: Mapping[AnyStep, int], *, delta: float, accountant: Accountant = "pld"
) -> float:
    """Returns an epsilon for all steps together, each composed as often as its count says.

    Sound for a list that is fixed before the first of it runs, and in any order.

    Args:
        parts: How often each distinct step runs; integers from 1 to 1e12.
        delta: In [1e-10, 1).
        accountant: As for `epsilon`.

    Returns:
        As `epsilon`; 0.0 for an empty list.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        AccountingError: The accountant failed; nothing is known about the cost.
    """
    checked = _checked_parts(parts)
    delta, accountant = _validate.delta("delta", delta), _accountant(accountant, checked)
    return _cached_epsilon(checked, delta, accountant) if checked else 0.0


def fits(parts: Mapping[AnyStep, int], *, epsilon: float, delta: float) -> bool:
    """Whether all steps together cost at most (epsilon, delta), by accountant "pld".

    A quick look on a coarse grid decides where there is room; near the limit it is the same as
    ``epsilon_of_list(parts, delta=delta) <= epsilon``.

    Args:
        parts: How often each distinct step runs; integers from 1 to 1e12.
        epsilon: Of the budget; finite, > 0.
        delta: Of the budget; in [1e-10, 1).

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        AccountingError: The accountant failed; nothing is known about the cost.
    """
    epsilon = _validate.positive("epsilon", epsilon)
    delta = _validate.delta("delta", delta)
    checked = _checked_parts(parts)
    if not checked or _coarsely_fits(checked, epsilon, delta):
        return True
    return _cached_epsilon(checked, delta, "pld") <= epsilon


def mechanism_parts(mechanism: Mechanism) -> Parts:
    """Returns the one step of a mechanism and its repetitions.

    Raises:
        InvalidPrivacyParameter: It is no mechanism.
    """
    if not isinstance(mechanism, Mechanism):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidPrivacyParameter("mechanism", mechanism, "a DpSgdMechanism or another kind")
    return ((mechanism.step, mechanism.repetitions),)


def _accountant(accountant: str, parts: Parts) -> Accountant:
    """The accountant, if it exists and serves these steps."""
    _validate.one_of("accountant", accountant, ACCOUNTANTS)
    if accountant == "rdp" and any(isinstance(s, TruncatedSampledGaussian) for s, _ in parts):
        raise InvalidPrivacyParameter("accountant", accountant, "'pld' with truncated batches")
    return cast(Accountant, accountant)


def _checked_parts(parts: Mapping[AnyStep, int]) -> Parts:
    """The parts with plain numbers and in canonical order, or an error."""
    given: Any = parts
    if not isinstance(given, Mapping):
        raise InvalidPrivacyParameter("parts", given, "a mapping from steps to counts")
    checked: dict[Step, int] = {}
    for step, count in parts.items():
        plain = _checked_step(step)
        checked[plain] = checked.get(plain, 0) + _validate.count("count", count)
    return _in_order(checked)


def _checked_step(step: Step) -> Step:
    if not isinstance(step, (SampledGaussian, TruncatedSampledGaussian)):  # pyright: ignore
        raise InvalidPrivacyParameter(
            "step", step, "a SampledGaussian or a TruncatedSampledGaussian"
        )
    noise_multiplier = _validate.positive("noise_multiplier", step.noise_multiplier)
    sampling_prob = _validate.probability("sampling_prob", step.sampling_prob)
    if isinstance(step, SampledGaussian):
        return SampledGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    if sampling_prob == 1:
        raise InvalidPrivacyParameter("sampling_prob", 1, "< 1 with truncated batches")
    return TruncatedSampledGaussian(
        noise_multiplier=noise_multiplier,
        sampling_prob=sampling_prob,
        num_examples=_validate.count("num_examples", step.num_examples),
        truncated_batch_size=_validate.count("truncated_batch_size", step.truncated_batch_size),
    )


def _in_order(parts: Mapping[Step, int]) -> Parts:
    return tuple(sorted(parts.items(), key=lambda part: step_key(part[0])))


@functools.lru_cache(maxsize=16384)
def _cached_epsilon(parts: Parts, delta: float, accountant: Accountant) -> float:
    return compute_epsilon(parts, delta, accountant)


@functools.lru_cache(maxsize=1024)
def _coarsely_fits(parts: Parts, epsilon: float, delta: float) -> bool:
    from accounting import composition

    def on_a_coarse_grid() -> float:
        accuracy = composition.COARSE_ACCURACY
        return composition.pld_delta(_clamped(parts), epsilon, delta, accuracy)

    return _guarded(on_a_coarse_grid, parts, delta, "pld") <= delta


def compute_epsilon(
    parts: Parts, delta: float, accountant: Accountant, *, coarse: bool = False
) -> float:
    """Computes what `epsilon` and `epsilon_of_list` cache, from validated arguments.

    Args:
        parts: Distinct steps and their counts; not empty.
        delta: In [1e-10, 1).
        accountant: "pld" or "rdp"; the latter for steps that it serves.
        coarse: Whether a quick bound will do, some 0.5 % less tight; sound all the same.

    Raises:
        AccountingError: The accountant failed.
    """

    def least() -> float:
        clamped = _clamped(parts)
        found = _pld_bounds(clamped, delta, coarse) if accountant == "pld" else []
        if accountant == "rdp":
            from accounting import bounds

            found.append(bounds.rdp_bound(clamped, delta))
        return math.nan if any(map(math.isnan, found)) else min(found)

    return _guarded(least, parts, delta, accountant)


def _pld_bounds(parts: Parts, delta: float, coarse: bool) -> list[float]:
    """The bounds whose minimum accountant "pld" returns; others only where they may be less."""
    from accounting import composition  # Costs some tenths of a second, so only on demand.

    bound = composition.NOT_COMPUTED
    if not all(composition.is_unsampled(step) for step, _ in parts):
        accuracy = composition.COARSE_ACCURACY if coarse else composition.ACCURACY
        bound = composition.pld_epsilon(parts, delta, accuracy)
        if (coarse and bound.epsilon < math.inf) or (bound.accurate and bound.below_rdp):
            return [bound.epsilon]
    from accounting import bounds  # Loads dp-accounting: costs about a second.

    found = [bound.epsilon, bounds.gaussian_bound(parts, delta)]
    truncated = any(isinstance(step, TruncatedSampledGaussian) for step, _ in parts)
    if not bound.below_rdp and not truncated:
        found.append(bounds.rdp_bound(parts, delta))
    return found


def _clamped(parts: Parts) -> Parts:
    """Parts within the range of the formulas that cost at least as much."""
    clamped: dict[Step, int] = {}
    for step, count in parts:
        inside = step
        noise_multiplier = min(step.noise_multiplier, _LARGEST_NOISE_MULTIPLIER)
        if isinstance(step, SampledGaussian):
            sampling_prob = max(step.sampling_prob, _LEAST_SAMPLING_PROB)
            if sampling_prob > _SAMPLING_PROB_AS_GOOD_AS_ONE:
                sampling_prob = 1.0
            inside = SampledGaussian(
                noise_multiplier=noise_multiplier, sampling_prob=sampling_prob
            )
        elif noise_multiplier < step.noise_multiplier:
            inside = TruncatedSampledGaussian(
                noise_multiplier=noise_multiplier,
                sampling_prob=step.sampling_prob,
                num_examples=step.num_examples,
                truncated_batch_size=step.truncated_batch_size,
            )
        clamped[inside] = clamped.get(inside, 0) + count
    return tuple(clamped.items())


def _guarded(answer: Any, parts: Parts, delta: float, accountant: Accountant) -> float:
    """The answer, or `AccountingError` whatever went wrong: an unknown cost admits nothing."""
    shown = ", ".join(f"{count} x {step}" for step, count in parts[:3])
    shown += ", ..." if len(parts) > 3 else ""
    try:
        result = float(answer())
    except AccountingError:
        raise
    except Exception as error:
        raise AccountingError(
            f"the {accountant} accountant failed for {shown} at delta {delta:g}: {error}"
        ) from error
    if math.isnan(result) or result < 0:
        raise AccountingError(
            f"the {accountant} accountant answered {result} for {shown} at delta {delta:g}"
        )
    return result
