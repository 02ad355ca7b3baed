"""What a budget covers, stated in words.

A policy says which set of releases one (epsilon, delta) covers; a budget has one, for good:

* `per_trial`: every trial is held to the whole budget by itself, as papers report it. It says
  nothing about the trials together, and the sentence shown with every result says so.
* `declared`: a whole list of trials, fixed before the first of them starts.
* `open`: whatever is trained, each trial chosen in the light of all earlier ones.
* `private_selection`: the best of a secret number of trials, of which nothing else is shown.

A decision fails closed: whatever goes wrong while the cost is computed means "not admitted".
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, cast, get_args

from accounting import _validate
from accounting.accountants import Accountant, epsilon, epsilon_of_list
from accounting.errors import InvalidPrivacyParameter
from accounting.hints import what_would_fit
from accounting.mechanism import (
    NEIGHBORING_RELATIONS,
    PRIVACY_UNITS,
    Mechanism,
    NeighboringRelation,
    PrivacyUnit,
    composed,
)

MOST_HINTS = 100
"""Of many that are refused together, so many are told what would fit."""

Policy = Literal["per_trial", "declared", "open", "private_selection"]
POLICIES: tuple[Policy, ...] = ("per_trial", "declared", "open", "private_selection")

Sampling = Literal["poisson", "truncated_poisson", "full_batch", "cyclic_poisson"]

_SENTENCES: dict[Policy, str] = {
    "per_trial": (
        "Each trial on its own is ({epsilon}, {delta})-differentially private for the training "
        "data, where neighbouring data sets differ by {neighbours} and {batches}; this does NOT "
        "cover choosing the best of several trials, nor the sweep as a whole."
    ),
    "declared": (
        "All trials of the declared list together, however one of them is chosen, are "
        "({epsilon}, {delta})-differentially private for the training data, where neighbouring "
        "data sets differ by {neighbours} and {batches}; the list was fixed before the first of "
        "them was trained."
    ),
    "open": (
        "Everything trained under this budget together, however trials were chosen, stopped or "
        "continued in the light of earlier ones, is ({epsilon}, {delta})-differentially private "
        "for the training data, where neighbouring data sets differ by {neighbours} and {batches}."
    ),
    "private_selection": (
        "The winner, and nothing else, is released, and that is ({epsilon}, {delta})-"
        "differentially private for the training data, the search for it included, where "
        "neighbouring data sets differ by {neighbours} and {batches}; how many trials there "
        "were, and every trial but the winner, stay secret."
    ),
}
_BATCHES: dict[Sampling | None, str] = {
    "poisson": "batches are drawn by Poisson sampling",
    "truncated_poisson": "batches are drawn by Poisson sampling and cut, at random, to a largest "
    "size",
    "full_batch": "every batch is all of the data",
    "cyclic_poisson": "batches are drawn by Poisson sampling from one group of the data "
    "after the other, with noise that is correlated over as many steps as there are groups",
    None: "batches are drawn as the mechanism says that is accounted for",
}
_NEIGHBOURS: dict[tuple[NeighboringRelation, PrivacyUnit], str] = {
    ("add_or_remove_one", "example"): "adding or removing one example",
    ("add_or_remove_one", "user"): "adding or removing all examples of one user",
    ("zero_out", "example"): "blanking one example (their number is public)",
    ("zero_out", "user"): "blanking all examples of one user (the number of users is public)",
}

GUARANTEES: dict[Policy, str] = {
    policy: sentence.format(
        epsilon="epsilon", delta="delta", neighbours="one example", batches=_BATCHES[None]
    )
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
    mechanism: Mechanism,
    budget: PrivacyBudget,
    *,
    prefix: Sequence[Mechanism] = (),
    accountant: Accountant = "pld",
    hint: bool = True,
) -> Decision:
    """Decides whether one trial by itself stays within the budget.

    Args:
        mechanism: What the trial would run, for all its iterations.
        budget: What each trial may spend.
        prefix: What was spent before on the parameters that the trial starts from; it counts.
        accountant: See `accounting.epsilon`.
        hint: Whether a rejection also says what would fit, which takes ten times as long.

    Returns:
        Admitted if and only if the computed epsilon is at most that of the budget. A rejection
        names the cost and, where one exists, a change that would fit.

    Raises:
        InvalidPrivacyParameter: `budget` is not a `PrivacyBudget`.
    """
    if not isinstance(budget, PrivacyBudget):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidPrivacyParameter("budget", budget, "a PrivacyBudget")
    try:
        spent = _epsilon(prefix, mechanism, budget, accountant)
    except Exception as error:  # Whatever it is, the cost is unknown.
        reason = f"the privacy cost could not be computed: {error}"
        return Decision(admitted=False, epsilon=math.inf, delta=budget.delta, reason=reason)
    if math.isnan(spent):
        reason = "the privacy cost could not be computed: the accountant answered NaN"
        return Decision(admitted=False, epsilon=math.inf, delta=budget.delta, reason=reason)
    limit = f"the budget of {budget.epsilon:.10g} at delta {budget.delta:g}"
    cost = f"epsilon {shown_epsilon(spent)}"
    if prefix:
        cost += ", with what was spent before on the parameters that the trial starts from,"
    if spent <= budget.epsilon:
        reason = f"{cost} is within {limit}"
        return Decision(admitted=True, epsilon=spent, delta=budget.delta, reason=reason)
    reason = f"{cost} exceeds {limit}"
    if hint and not prefix:  # what would fit is computed for a trial that starts from nothing
        reason += _what_would_fit(mechanism, budget, accountant)
    return Decision(admitted=False, epsilon=spent, delta=budget.delta, reason=reason)


def guarantee(
    policy: str,
    *,
    epsilon: float,
    delta: float,
    neighboring_relation: NeighboringRelation = "add_or_remove_one",
    privacy_unit: PrivacyUnit = "example",
    sampling: Sampling | None = None,
) -> str:
    """Returns the guarantee of a policy as one sentence with its numbers.

    Args:
        policy: A key of `GUARANTEES`.
        epsilon: What was obtained or is the limit; finite, >= 0. Shown rounded up.
        delta: In [1e-10, 1).
        neighboring_relation: See `Mechanism`.
        privacy_unit: See `Mechanism`.
        sampling: How batches are drawn; None where mechanisms of several kinds may be paid for.

    Raises:
        InvalidPrivacyParameter: An argument is unknown or out of range.
    """
    _validate.one_of("policy", policy, POLICIES)
    _validate.one_of("neighboring_relation", neighboring_relation, NEIGHBORING_RELATIONS)
    _validate.one_of("privacy_unit", privacy_unit, PRIVACY_UNITS)
    if sampling is not None:
        _validate.one_of("sampling", sampling, get_args(Sampling))
    return _SENTENCES[cast("Policy", policy)].format(
        epsilon=shown_epsilon(_validate.non_negative("epsilon", epsilon)),
        delta=f"{_validate.delta('delta', delta):g}",
        neighbours=_NEIGHBOURS[neighboring_relation, privacy_unit],
        batches=_BATCHES[sampling],
    )


def shown_epsilon(epsilon: float) -> str:
    """Four significant digits, rounded up, so that no text promises more than was computed."""
    if epsilon == 0 or math.isinf(epsilon):
        return f"{epsilon:g}"
    epsilon = max(epsilon, 1e-300)  # below, the digits run out
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.4g}"


def _epsilon(
    prefix: Sequence[Mechanism], mechanism: Mechanism, budget: PrivacyBudget, how: Accountant
) -> float:
    if not prefix:
        return epsilon(mechanism, delta=budget.delta, accountant=how)
    parts = composed([*prefix, mechanism])
    return epsilon_of_list(parts, delta=budget.delta, accountant=how)


def _what_would_fit(mechanism: Mechanism, budget: PrivacyBudget, how: Accountant) -> str:
    """Changes that were computed to fit, in words."""
    noise, iterations = what_would_fit(mechanism, budget.epsilon, budget.delta, how)
    hints: list[str] = []
    if noise is not None:
        hints.append(f"noise_multiplier >= {noise:.10g}")
    if iterations is not None:
        hints.append(f"iterations <= {iterations}")
    return f"; {' or '.join(hints)} would fit" if hints else ""
