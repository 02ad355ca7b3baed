"""What a hyperparameter may be: a constant, one of Ray Tune's domains, or one by another field.

A `Domain` is what a specification says about one hyperparameter by itself. A `ConditionalDomain`
says several, and which of them holds follows from the value of another hyperparameter. How both
are read is in `sweeps.spec.allowed_domains`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from trainer.yaml_text import KeyPath

MAX_ITERATIONS = 10_000_000
# Whole numbers up to here are exact as floats.
MAX_WHOLE = 2**53

CALIBRATED: Literal["calibrated"] = "calibrated"
FULL: Literal["full"] = "full"

# Keys of a domain that depends on another field: which one, and the branch for its other values.
BY = "by"
ELSE = "else"

Value = str | int | float
DomainKind = Literal[
    "constant",
    "grid_search",
    "choice",
    "uniform",
    "loguniform",
    "quniform",
    "randint",
    "lograndint",
]


@dataclasses.dataclass(frozen=True)
class Domain:
    """What one hyperparameter may be: a constant, or one of Ray Tune's domains.

    Attributes:
        kind: ``constant``, or the domain's name as in Ray Tune.
        values: The constant alone; the listed values of ``grid_search`` and ``choice``;
            low and high of ``uniform``, ``loguniform``, ``randint`` and ``lograndint`` (the
            last two exclude high, as in Ray Tune); low, high and step of ``quniform``.
    """

    kind: DomainKind
    values: tuple[Value, ...]

    @property
    def is_random(self) -> bool:
        """Whether trials draw from it; else every value takes its turn."""
        return self.kind not in ("constant", "grid_search")

    @property
    def is_range(self) -> bool:
        """Whether it is given by bounds rather than by a list of its values."""
        return self.is_random and self.kind != "choice"

    def plain(self) -> Value | dict[str, list[Value]]:
        """The form in which a specification states it."""
        if self.kind == "constant":
            return self.values[0]
        return {self.kind: list(self.values)}

    @property
    def num_listed(self) -> int:
        """How many places it takes in a grid; what is drawn takes one."""
        return len(self.values) if self.kind == "grid_search" else 1

    def given(self, values: Mapping[str, Value]) -> "Domain":
        """Itself, whatever the other hyperparameters are."""
        return self

    def parts(self) -> "Sequence[tuple[KeyPath, Domain]]":
        """Itself alone, as `ConditionalDomain.parts`."""
        return (((), self),)

    def contains(self, value: Value) -> bool:
        """Whether it can give a value, of a quniform but for rounding."""
        if not self.is_range:
            return value in self.values
        low, high = self.bounds()
        if isinstance(value, str) or not low <= value <= high:
            return False
        if self.kind in ("randint", "lograndint"):
            return float(value).is_integer()
        steps = value / float(self.values[2]) if self.kind == "quniform" else 0.0
        return math.isclose(steps, round(steps))

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number it can give; words such as `CALIBRATED` do not count.

        Raises:
            ValueError: It gives words only.
        """
        numbers = [float(value) for value in self.values if not isinstance(value, str)]
        if self.kind in ("randint", "lograndint"):
            return numbers[0], numbers[1] - 1
        if self.kind == "quniform":
            return numbers[0], numbers[1]
        if not numbers:
            raise ValueError(f"domain.values={self.values!r}: allowed are numbers")
        return min(numbers), max(numbers)


@dataclasses.dataclass(frozen=True)
class ConditionalDomain:
    """What one hyperparameter may be, by the value of another.

    Attributes:
        by: The field of the other one, which depends on none itself.
        branches: What it may be for each value of that, as `branch_key` says it; `ELSE` stands
            for all others.
    """

    by: str
    branches: tuple[tuple[str, Domain], ...]

    def given(self, values: Mapping[str, Value]) -> Domain:
        """The branch that holds.

        Args:
            values: Of other hyperparameters, `by` among them.

        Raises:
            KeyError: `by` is not, or no branch holds; a specification is refused then.
        """
        branches, key = dict(self.branches), branch_key(values[self.by])
        return branches[key if key in branches else ELSE]

    def parts(self) -> Sequence[tuple[KeyPath, Domain]]:
        """The branches, each with where it stands below the field."""
        return [((key,), domain) for key, domain in self.branches]

    @property
    def values(self) -> tuple[Value, ...]:
        """Those of all branches."""
        return tuple(value for _, domain in self.branches for value in domain.values)

    def bounds(self) -> tuple[float, float]:
        """Smallest and largest number that any branch can give, as `Domain.bounds`.

        Raises:
            ValueError: They give words only.
        """
        numeric = [
            domain.bounds()
            for _, domain in self.branches
            if not all(isinstance(value, str) for value in domain.values)
        ]
        if not numeric:
            raise ValueError(f"domain.values={self.values!r}: allowed are numbers")
        return min(low for low, _ in numeric), max(high for _, high in numeric)

    def plain(self) -> Mapping[str, object]:
        """The form in which a specification states it."""
        return {BY: self.by} | {key: domain.plain() for key, domain in self.branches}


AnyDomain = Domain | ConditionalDomain


def branch_key(value: Value) -> str:
    """A value as the key of the branch that holds for it: numbers in their shortest form."""
    return value if isinstance(value, str) else repr(float(value)).removesuffix(".0")


def step_indices(low: float, high: float, step: float) -> tuple[int, int]:
    """First and last k with low <= k * step <= high, forgiving rounding as Ray Tune does.

    Raises:
        ValueError: There is no such k, or it is too large to count exactly.
    """

    def index(bound: float, inwards: Callable[[float], int]) -> int:
        scaled = bound / step
        if not scaled <= MAX_WHOLE:
            raise ValueError("step is too small")
        return round(scaled) if math.isclose(scaled, round(scaled)) else inwards(scaled)

    first, last = index(low, math.ceil), index(high, math.floor)
    if last < first:
        raise ValueError("there is no multiple of step between low and high")
    return first, last
