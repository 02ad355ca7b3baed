"""The axes of the utility-privacy picture: what they cover, and where things stand on them.

The axis of privacy covers where accuracies are. What lies far beyond it, and epsilons without a
known finite bound, stand in a strip at its right end.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class EpsilonAxis:
    """The axis of privacy spent.

    Attributes:
        log: Whether it is logarithmic.
        low: Its left end.
        high: How far it is to scale.
        strip_label: What stands in the strip behind ``high``; empty if there is no strip.
    """

    log: bool
    low: float
    high: float
    strip_label: str

    @property
    def label(self) -> str:
        """What the axis shows."""
        return "privacy spent: ε" + (" (logarithmic)" if self.log else "")

    @property
    def end(self) -> float:
        """Its right end, behind the strip."""
        return self._at(1.10) if self.strip_label else self.high

    @property
    def ticks(self) -> dict[float, str]:
        """Places on the axis and what stands there."""
        ticks = {x: f"{x:g}" for x in _ticks(self.low, self.high, self.log)}
        return ticks | {self._at(1.05): self.strip_label} if self.strip_label else ticks

    def place(self, epsilon: float | None) -> float:
        """Where an epsilon stands: in the strip if it is beyond ``high`` or has no known bound."""
        return self._at(1.05) if epsilon is None or epsilon > self.high else epsilon

    def part(self, x: float) -> float:
        """How far a place is along the axis, as it looks: 0 at its left end, 1 at its right."""
        if self.log:
            return math.log(max(x, self.low) / self.low) / math.log(self.end / self.low)
        return (x - self.low) / (self.end - self.low)

    def _at(self, part: float) -> float:
        """The place at a part of the way from low to high, as it looks."""
        if self.log:
            return self.low * (self.high / self.low) ** part
        return self.low + (self.high - self.low) * part


@dataclasses.dataclass(frozen=True)
class AccuracyAxis:
    """The axis of utility, from ``low`` to ``high``; what is above 1 is room for a label."""

    low: float
    high: float

    @property
    def bottom(self) -> float:
        """Where rejected trials stand."""
        return self.low + 0.025 * (self.high - self.low)

    @property
    def ticks(self) -> dict[float, str]:
        """Places on the axis and what stands there."""
        return {y: f"{100 * y:.4g}%" for y in _ticks(self.low, min(self.high, 1.0), log=False)}


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from low to high, about eight."""
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        steps = (1, 2, 5) if last - first <= 5 else (1,)
        ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    else:
        unit = 10.0 ** math.floor(math.log10((high - low) / 8))
        step = next(unit * nice for nice in (1, 2, 2.5, 5, 10) if unit * nice * 9 >= high - low)
        ticks = [
            round(step * k, 12) for k in range(math.floor(low / step), 1 + math.ceil(high / step))
        ]
    return [max(tick, 0.0) for tick in ticks if max(low, -1e-9) <= tick <= high + 1e-9]


def epsilon_axis(
    epsilons: Sequence[float | None], costs: Sequence[float | None], budget: float
) -> EpsilonAxis:
    """The axis for these numbers; None stands for one without a known finite bound.

    Args:
        epsilons: Where accuracies were reached; all of them are to scale.
        costs: Of rejected trials; to scale if they are not far away.
        budget: To scale.
    """
    spent = [epsilon for epsilon in epsilons if epsilon is not None and epsilon > 0]
    finite_costs = [cost for cost in costs if cost is not None]
    if spent:
        high = max([budget, *spent])
        early = max(min(spent), high / 1e4)
        log = high / early > 30
        reach = high * (4 if log else 1.6)
        high = max([high, *(cost for cost in finite_costs if cost <= reach)])
        low, high = (early / 1.3, high * 1.15) if log else (0.0, high * 1.05)
    else:
        # Nothing but costs to show; the strip is left to those without a bound.
        high = max([budget, *finite_costs])
        log = high > 4 * budget
        low, high = (budget / 2, high * 1.3) if log else (0.0, high * 1.08)
    in_strip: list[str] = []
    if any(cost > high for cost in finite_costs):
        in_strip.append(f"> {high:.3g}")
    if None in (*epsilons, *costs):
        in_strip.append("∞")
    return EpsilonAxis(log, low, high, ", ".join(in_strip))


def accuracy_axis(accuracies: Sequence[float]) -> AccuracyAxis:
    """The axis for these accuracies, with room below for marks and above for a label."""
    low, high = (min(accuracies), max(accuracies)) if accuracies else (0.0, 1.0)
    span = max(high - low, 0.02)
    return AccuracyAxis(low - 0.09 * span, high + 0.27 * span)
