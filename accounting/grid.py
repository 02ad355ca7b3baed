"""The grid of a composition: as fine as accuracy needs, as large as limits allow.

Connecting the dots over cells of width d raises E[exp(t L)] by about t (t + 1) d² / 12, and
epsilon is governed by t = a - 1 for the best Rényi order a; over n steps epsilon hence grows by

    n a d² / 12,

which is solved for d. The window that must be held follows from Chernoff bounds. Where it would
have more than the allowed number of points, d is widened until it does not: less tight, and sound
all the same, so that work and memory are bounded for every input.
"""

# scipy ships no stubs.
# pyright: reportMissingTypeStubs=false

import dataclasses
import math
from typing import Any, cast

import numpy as np
from scipy import fft

from accounting.cumulants import Cumulants, Parts, cumulants
from accounting.privacy_loss import loss_range

MAX_POINTS = 2**20
"""Most points of a transform."""

MAX_STEP_POINTS = 2**19
"""Most points of one step's distribution."""

MAX_WORK = 2**24
"""Most points over all distinct steps together, which is what takes time."""

LARGEST_EPSILON = 5000.0
"""Where epsilon is larger by Rényi DP, nothing is computed: no budget allows it."""

WIDEST_INTERVAL = 0.5
"""Wider grids than this are not worth computing: epsilon is in the hundreds at least."""

ACCURACY = 1e-4
"""Share of epsilon that the grid should add, by a first estimate."""

LEAST_EPSILON = 1e-3
"""Below this epsilon the accuracy is absolute: the share of this."""

_TAIL = 1e-5  # Tail mass, as a share of delta.


@dataclasses.dataclass(frozen=True)
class Direction:
    """The window of the composed distribution in one direction, in grid points.

    Attributes:
        lowest: Index of the first point.
        size: Number of points, the length of the transform.
        order: Order t at which the Chernoff bound above the window is taken.
    """

    lowest: int
    size: int
    order: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a composition will be computed.

    Attributes:
        interval: Distance between grid points.
        step_tail: Mass of one step that may count as infinite.
        removing: Window when a unit is removed.
        adding: Window when one is added.
        count: How many steps in all.
        renyi: Epsilon by Rényi DP, to within a percent.
    """

    interval: float
    step_tail: float
    removing: Direction
    adding: Direction
    count: int
    renyi: float


def make_plan(
    parts: Parts, delta: float, *, accuracy: float, interval: float | None = None
) -> Plan | None:
    """Chooses the grid, or returns None where no affordable grid is of use.

    Args:
        parts: Steps and their counts; not empty.
        delta: At which the composed distribution will be asked.
        accuracy: Share of epsilon that the grid may add, by a first estimate.
        interval: Where to begin instead, in place of `accuracy`.
    """
    table = cumulants(parts, delta)
    estimate, order = table.epsilon(delta)
    if not estimate <= LARGEST_EPSILON:
        return None
    if interval is None:
        error = accuracy * max(estimate, LEAST_EPSILON)
        interval = math.sqrt(12 * error / (table.count * order))
    # A power of the fourth root of two, so that similar questions share the steps' distributions.
    interval = 2 ** (math.floor(4 * math.log2(interval)) / 4)
    step_tail = _rounded(_TAIL * delta / table.count / 2)
    tail = _TAIL * delta / 2

    ranges = [loss_range(step, step_tail) for step, _ in parts]
    widest = max(high - low for low, high in ranges)
    lowest_sum = sum(count * low for (_, count), (low, _) in zip(parts, ranges, strict=True))
    highest_sum = sum(count * high for (_, count), (_, high) in zip(parts, ranges, strict=True))
    allowed = min(MAX_POINTS, max(2**12, MAX_WORK // len(parts)))
    allowed_step = min(MAX_STEP_POINTS, max(2**12, MAX_WORK // 4 // len(parts)))
    while interval <= WIDEST_INTERVAL:
        removing = _window(table, interval, tail, (lowest_sum, highest_sum), adding=False)
        adding = _window(table, interval, tail, (-highest_sum, -lowest_sum), adding=True)
        excess = max(
            widest / interval / allowed_step, removing.size / allowed, adding.size / allowed
        )
        if excess <= 1:
            return Plan(interval, step_tail, removing, adding, table.count, estimate)
        interval *= 2 ** (math.ceil(4 * math.log2(max(excess, 1.1))) / 4)
    return None


def _rounded(mass: float) -> float:
    """The mass, down to a power of a hundred: similar questions share distributions."""
    return 100.0 ** math.floor(math.log10(mass) / 2)


def _window(
    table: Cumulants,
    interval: float,
    tail: float,
    support: tuple[float, float],
    *,
    adding: bool,
) -> Direction:
    """Where the composed distribution lies, but for the tail mass on each side."""
    orders = table.orders
    # What the grid adds to K at most; linear where the cells are too wide for the square.
    grown = table.count * np.minimum(orders * (orders + 1) * interval**2 / 8, orders * interval)
    below, above = (
        (table.adding_below, table.adding_above)
        if adding
        else (table.removing_below, table.removing_above)
    )
    highs = (above + grown - math.log(tail)) / orders
    at = int(np.argmin(highs))
    high = min(float(highs[at]), support[1] + table.count * interval)
    low = max(
        float(np.max(-(below + grown - math.log(tail)) / orders)),
        support[0] - table.count * interval,
    )
    lowest = math.floor(low / interval) - 1
    size = max(16, math.ceil(max(high, 0.0) / interval) + 2 - lowest)
    if size <= 2 * MAX_POINTS:
        size = cast(Any, fft).next_fast_len(size, real=True)
    return Direction(lowest, size, float(orders[at]))
