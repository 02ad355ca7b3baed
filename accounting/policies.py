"""What the budget is spent on, decided before a trial starts and stated in words.

A policy says which set of releases one (epsilon, delta) covers. There is one so far:

* `per_trial`: every trial is held to the whole budget by itself, as papers report it. It says
  nothing about the trials together, and the sentence shown with every result says so.

A decision fails closed: whatever goes wrong while the cost is computed means "not admitted".
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from accounting import _validate
from accounting._search import smallest_fitting
from accounting.accountants import Accountant, compute_epsilon, epsilon
from accounting.calibration import LARGEST_NOISE_MULTIPLIER
from accounting.errors import AccountingError, InvalidPrivacyParameter
from accounting.mechanism import NEIGHBORING_RELATIONS, DpSgdMechanism, NeighboringRelation

_SENTENCES = {
    "per_trial": (
        "Each trial on its own is ({epsilon}, {delta})-differentially private for the training "
        "data, where neighbouring data sets differ by {neighbours} and batches are drawn by "
        "Poisson sampling; this does NOT cover choosing the best of several trials, nor the "
        "sweep as a whole."
    ),
}
_NEIGHBOURS: dict[NeighboringRelation, str] = {
    "add_or_remove_one": "adding or removing one example",
    "zero_out": "blanking one example (their size is public)",
}

GUARANTEES: dict[str, str] = {
    policy: sentence.format(epsilon="epsilon", delta="delta", neighbours="one example")
    for policy, sentence in _SENTENCES.items()
}
"""What each policy guarantees, in one sentence; `guarantee` says it with the numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyBudget:
    """How much privacy may be spent.

    Attributes:
        epsilon: Largest epsilon; finite, > 0.
        delta: In [1e-10, 1); commonly below 1 / (number of examples).

    Raises:
        InvalidPrivacyParameter: A field is of the wrong type or out of range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", _validate.positive("epsilon", self.epsilon))
        object.__setattr__(self, "delta", _validate.delta("delta", self.delta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether a trial may start, and why.

    Attributes:
        admitted: True only if the cost was computed and fits the budget.
        epsilon: What the trial would spend; infinite if that is not known.
        delta: The delta at which `epsilon` holds.
        reason: One or two sentences for a person.
    """

    admitted: bool
    epsilon: float
    delta: float
    reason: str


def check_per_trial(
    mechanism: DpSgdMechanism, budget: PrivacyBudget, *, accountant: Accountant = "pld"
) -> Decision:
    """Decides whether one trial by itself stays within the budget.

    Args:
        mechanism: What the trial would run, for all its iterations.
        budget: What each trial may spend.
        accountant: See `accounting.epsilon`.

    Returns:
        Admitted if and only if the computed epsilon is at most that of the budget. A rejection
        names the cost and, where one exists, a change that would fit.

    Raises:
        InvalidPrivacyParameter: `budget` is not a `PrivacyBudget`.
    """
    if not isinstance(budget, PrivacyBudget):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidPrivacyParameter("budget", budget, "a PrivacyBudget")
    try:
        spent = epsilon(mechanism, delta=budget.delta, accountant=accountant)
    except Exception as error:  # Whatever it is, the cost is unknown.
        reason = f"the privacy cost could not be computed: {error}"
        return Decision(admitted=False, epsilon=math.inf, delta=budget.delta, reason=reason)
    if math.isnan(spent):
        reason = "the privacy cost could not be computed: the accountant answered NaN"
        return Decision(admitted=False, epsilon=math.inf, delta=budget.delta, reason=reason)
    limit = f"the budget of {budget.epsilon:.10g} at delta {budget.delta:g}"
    if spent <= budget.epsilon:
        reason = f"epsilon {_shown(spent)} is within {limit}"
        return Decision(admitted=True, epsilon=spent, delta=budget.delta, reason=reason)
    reason = (
        f"epsilon {_shown(spent)} exceeds {limit}{_what_would_fit(mechanism, budget, accountant)}"
    )
    return Decision(admitted=False, epsilon=spent, delta=budget.delta, reason=reason)


def guarantee(
    policy: str,
    *,
    epsilon: float,
    delta: float,
    neighboring_relation: NeighboringRelation = "add_or_remove_one",
) -> str:
    """Returns the guarantee of a policy as one sentence with its numbers.

    Args:
        policy: A key of `GUARANTEES`.
        epsilon: What was obtained or is the limit; finite, >= 0. Shown rounded up.
        delta: In [1e-10, 1).
        neighboring_relation: See `DpSgdMechanism`.

    Raises:
        InvalidPrivacyParameter: An argument is unknown or out of range.
    """
    _validate.one_of("policy", policy, tuple(GUARANTEES))
    _validate.one_of("neighboring_relation", neighboring_relation, NEIGHBORING_RELATIONS)
    return _SENTENCES[policy].format(
        epsilon=_shown(_validate.non_negative("epsilon", epsilon)),
        delta=f"{_validate.delta('delta', delta):g}",
        neighbours=_NEIGHBOURS[neighboring_relation],
    )


def _shown(epsilon: float) -> str:
    """Four significant digits, rounded up, so that no text promises more than was computed."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.4g}"


@functools.lru_cache(maxsize=1024)
def _what_would_fit(mechanism: DpSgdMechanism, budget: PrivacyBudget, how: Accountant) -> str:
    """Changes that were computed to fit, on a coarse grid: quick, and never below the truth."""

    def cost_with_noise(noise_multiplier: float) -> float:
        louder = dataclasses.replace(mechanism, noise_multiplier=noise_multiplier)
        return compute_epsilon(louder, budget.delta, how, coarsening=10)

    def cost_with_inverse_iterations(inverse: float) -> float:
        shorter = mechanism.after(max(1, math.floor(1 / inverse)))
        return compute_epsilon(shorter, budget.delta, how, coarsening=10)

    def fitting(cost: Callable[[float], float], start: float, highest: float) -> float | None:
        try:
            return smallest_fitting(
                cost,
                budget.epsilon,
                start=start,
                factor=1.5,
                tolerance=0.01,
                lowest=start / 2,
                highest=highest,
            )
        except AccountingError:
            return None

    hints: list[str] = []
    noise = fitting(cost_with_noise, mechanism.noise_multiplier, LARGEST_NOISE_MULTIPLIER)
    if noise is not None:
        hints.append(f"noise_multiplier >= {_shown(noise)}")
    inverse = fitting(cost_with_inverse_iterations, 1 / mechanism.iterations, 1.0)
    if inverse is not None:
        hints.append(f"iterations <= {max(1, math.floor(1 / inverse))}")
    return f"; {' or '.join(hints)} would fit" if hints else ""
