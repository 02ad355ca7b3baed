"""Private selection: what it costs to run many candidates and release only the best.

Draw a secret number K from a stated law, run K candidates, each drawn anew and at random from a
fixed list, and release the one with the best score, nothing else. However large K turns out, that
costs little more than one run: two to three times its epsilon for a mean in the hundreds, where
releasing every run would cost ten.

It holds only if K is drawn beforehand and kept secret, the candidates are drawn without looking
at results, the score is part of what a candidate releases under its own guarantee, and nothing
else leaves: no stopping on scores, no curves.

    law                  P[K = k]                                             k
    geometric            gamma * (1 - gamma)^(k - 1)                          1, 2, ...
    logarithmic          (1 - gamma)^k / (k * log(1/gamma))                   1, 2, ...
    negative_binomial    ~ (1 - gamma)^k * binom(k + shape - 1, k)            1, 2, ...
    poisson              exp(-mean) * mean^k / k!                             0, 1, ...

The first two are the third with shape 1 and shape 0. Under poisson nothing may run at all, with
probability exp(-mean); then there is no winner.

References:
    Papernot and Steinke, "Hyperparameter Tuning with Renyi Differential Privacy", 2022,
    Theorems 2 and 6, https://arxiv.org/abs/2110.03620
"""

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from accounting import _validate
from accounting._count_laws import (
    draw_poisson,
    draw_truncated_negative_binomial,
    log_inverse_gamma,
)
from accounting.errors import InvalidPrivacyParameter
from accounting.mechanism import Mechanism, Step, TruncatedSampledGaussian, mechanism_from_json
from accounting.renyi import epsilon_of_rdp, parts_rdp

Distribution = Literal["geometric", "poisson", "logarithmic", "negative_binomial"]
DISTRIBUTIONS: tuple[Distribution, ...] = (
    "geometric",
    "poisson",
    "logarithmic",
    "negative_binomial",
)

LARGEST_MEAN = 10_000.0
LARGEST_SHAPE = 100.0

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in range(11, 64)),
    *(128.0, 256.0, 512.0, 1024.0),
)
"""The orders tried; those of dp-accounting."""

_MARGIN = 1e-12

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """One private selection: what may run, and the law of how often.

    Attributes:
        candidates: What a draw may run; at least one. Of those with equal steps and repetitions,
            which cost the same, only the first is kept.
        distribution: The law of the secret number of runs.
        mean: Its mean, from 1 to 10,000.
        shape: With "negative_binomial" alone: in (0, 100]. Less means a wider law and less cost;
            1 is "geometric", towards 0 it becomes "logarithmic".

    Raises:
        InvalidPrivacyParameter: A field is of the wrong type or out of range; a candidate is
            truncated; or candidates differ in neighbouring relation or privacy unit.
    """

    candidates: tuple[Mechanism, ...]
    distribution: Distribution
    mean: float
    shape: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "candidates", _distinct(self.candidates))
        _validate.one_of("distribution", self.distribution, DISTRIBUTIONS)
        object.__setattr__(self, "mean", _in_range("mean", self.mean, 1.0, LARGEST_MEAN))
        if self.distribution == "negative_binomial":
            shape = _validate.positive("shape", self.shape)
            object.__setattr__(self, "shape", _in_range("shape", shape, 0.0, LARGEST_SHAPE))
        elif self.shape is not None:
            raise InvalidPrivacyParameter(
                "shape", self.shape, f"absent with distribution {self.distribution!r}"
            )

    def to_json(self) -> dict[str, Any]:
        """Returns the selection as plain JSON data, for `selection_from_json`."""
        return {
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "distribution": self.distribution,
            "mean": self.mean,
            "shape": self.shape,
        }


def _in_range(field: str, value: object, least: float, largest: float) -> float:
    number = _validate.non_negative(field, value)
    if not least <= number <= largest:
        raise InvalidPrivacyParameter(field, value, f"a number from {least:g} to {largest:g}")
    return number


def _distinct(candidates: object) -> tuple[Mechanism, ...]:
    """Returns valid candidates, one of each cost, in the order given."""
    allowed = "a tuple of mechanisms, not empty"
    if not isinstance(candidates, (tuple, list)):
        raise InvalidPrivacyParameter("candidates", candidates, allowed)
    given = cast(Sequence[object], candidates)
    if not given:
        raise InvalidPrivacyParameter("candidates", given, allowed)
    distinct: dict[tuple[Step, int], Mechanism] = {}
    units: set[tuple[str, str]] = set()
    for candidate in given:
        if not isinstance(candidate, Mechanism):
            raise InvalidPrivacyParameter("candidates", candidate, allowed)
        if isinstance(candidate.step, TruncatedSampledGaussian):
            raise InvalidPrivacyParameter(
                "candidates",
                candidate.kind,
                "without truncated batches: truncated sampling is only accounted by privacy loss "
                "distributions, which repeat-and-select cannot use",
            )
        units.add((candidate.neighboring_relation, candidate.privacy_unit))
        distinct.setdefault((candidate.step, candidate.repetitions), candidate)
    if len(units) > 1:
        raise InvalidPrivacyParameter(
            "candidates", sorted(units), "of one neighboring_relation and one privacy_unit"
        )
    return tuple(distinct.values())


def selection_from_json(data: Mapping[str, Any]) -> Selection:
    """Returns the selection that `Selection.to_json` wrote.

    Raises:
        InvalidPrivacyParameter: A field is unknown, missing or not allowed.
    """
    fields = dict(data)
    names = [field.name for field in dataclasses.fields(Selection)]
    if set(fields) != set(names):
        raise InvalidPrivacyParameter("selection", sorted(fields), "exactly " + ", ".join(names))
    if not isinstance(fields["candidates"], list):
        raise InvalidPrivacyParameter("candidates", fields["candidates"], "a list of mechanisms")
    candidates: list[Mechanism] = []
    candidate: Any
    for candidate in fields.pop("candidates"):
        if not isinstance(candidate, dict):
            raise InvalidPrivacyParameter("candidates", candidate, "a list of mechanisms")
        candidates.append(mechanism_from_json(cast(dict[str, Any], candidate)))
    return Selection(candidates=tuple(candidates), **fields)


def selection_rdp(selection: Selection) -> tuple[Floats, Floats]:
    """Returns what a selection costs, as a curve of Rényi divergences.

    Returns:
        ``(orders, divergences)``, float64 ``[orders]`` each, for the winner alone.

    Raises:
        AccountingError: The computation failed.

    Formal guarantees:
        Never below the truth. A draw reveals at most which candidate ran and what that released,
        so it costs no more than the dearest candidate, order by order.
    """
    orders = np.array(ORDERS)
    base = np.array(
        [
            max(parts_rdp({one.step: one.repetitions}, order) for one in selection.candidates)
            for order in ORDERS
        ]
    )
    return orders, repeated_rdp(orders, base, selection)


def repeated_rdp(orders: Floats, base: Floats, selection: Selection) -> Floats:
    """Returns the curve of the winner, given that of one draw.

    Args:
        orders: Float64 ``[orders]``, ascending, each at least 1.1.
        base: Divergences of one draw, float64 ``[orders]``, >= 0, possibly infinite.
        selection: Of which the law matters here, not the candidates.
    """
    with np.errstate(over="ignore", under="ignore", divide="ignore"):
        spread = base + math.log(selection.mean) / (orders - 1)
        if selection.distribution == "poisson":
            epsilons = np.log1p(1 / (orders - 1))
            return (spread + selection.mean * _deltas(orders, base, epsilons)) * (1 + _MARGIN)
        shape = _shape(selection)
        log_inverse = log_inverse_gamma(selection.mean, shape)
        repeated = spread + (1 + shape) * np.min((1 - 1 / orders) * base + log_inverse / orders)
        # A divergence grows with its order, so any larger order bounds a smaller one.
        return np.minimum.accumulate(repeated[::-1])[::-1] * (1 + _MARGIN)


def _deltas(orders: Floats, base: Floats, epsilons: Floats) -> Floats:
    """The least delta that the curve guarantees at each epsilon.

    By Canonne, Kamath, Steinke, 2020, Proposition 12 (https://arxiv.org/abs/2004.00010), or by
    the Bretagnolle-Huber inequality, delta <= sqrt(1 - exp(-KL)).
    """
    exponents = (orders - 1) * (base - epsilons[:, None] + np.log1p(-1 / orders)) - np.log(orders)
    by_order = np.min(exponents, axis=1)
    by_divergence = 0.5 * float(np.min(np.log(-np.expm1(-base))))
    return np.exp(np.minimum(by_order, min(by_divergence, 0.0)))


def selection_epsilon(selections: Sequence[Selection], *, delta: float) -> float:
    """Returns an epsilon for which releasing the winner of each is (epsilon, delta)-DP.

    Args:
        selections: One or more on the same data, each fixed beforehand.
        delta: In [1e-10, 1).

    Returns:
        A number >= 0; the best over `ORDERS`.

    Raises:
        InvalidPrivacyParameter: `delta` is out of range, nothing is given, or the selections
            differ in neighbouring relation or privacy unit.
        AccountingError: The computation failed.
    """
    delta = _validate.delta("delta", delta)
    given: list[object] = [*selections] if isinstance(selections, (list, tuple)) else []
    if not given or not all(isinstance(one, Selection) for one in given):
        raise InvalidPrivacyParameter("selections", selections, "a list of at least one Selection")
    _distinct([candidate for selection in selections for candidate in selection.candidates])
    curves = [selection_rdp(selection)[1] for selection in selections]
    total = np.sum(curves, axis=0) * (1 + _MARGIN)
    return min(
        epsilon_of_rdp(float(rdp), delta, order) for order, rdp in zip(ORDERS, total, strict=True)
    )


def _shape(selection: Selection) -> float:
    """The shape of the law among truncated negative binomials."""
    if selection.shape is not None:
        return selection.shape
    return 1.0 if selection.distribution == "geometric" else 0.0


def draw_count(selection: Selection, rng: random.Random | None = None) -> int:
    """Draws the number of candidates to run. It must stay secret and be drawn once.

    Args:
        selection: States the law.
        rng: Uniform numbers from a secret, for who has to draw the same again after a crash, and
            for tests. Without it, the operating system's entropy is used.

    Returns:
        A number >= 1, or >= 0 under "poisson", whose mean is `selection.mean`.
    """
    rng = random.SystemRandom() if rng is None else rng
    if selection.distribution == "poisson":
        return draw_poisson(selection.mean, rng)
    return draw_truncated_negative_binomial(selection.mean, _shape(selection), rng)
