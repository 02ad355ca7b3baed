"""The utility-privacy picture: what accuracy each trial reached at what epsilon.

`make_picture` decides what is drawn, where, and in which words; `sweeps.report.figure_png` and
`sweeps.report.figure_html` draw it:

- one thin line per configuration over its reports, of one that was repeated over their means, with
  a band of one standard deviation; colour is the optimizer, line style and marker the expected
  batch size, and the mark at the line's end how the trial ended, or the least fortunate of them;
- the frontier, a bold step line: the best accuracy that any line reached at or below an epsilon;
- the budget, a vertical line; along the bottom, rejected trials at what they would have cost.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sweeps.database.states import SweepState, TrialState
from sweeps.report.axes import AccuracyAxis, EpsilonAxis, accuracy_axis, epsilon_axis
from sweeps.report.results import (
    Configuration,
    CurvePoint,
    MeanPoint,
    SweepResults,
    TrialSummary,
)
from sweeps.report.table import (
    brief_config,
    count_words,
    flat_config,
    list_numbers,
    one_line,
    show_epsilon,
    show_mean,
    show_value,
    varying_names,
)

# More trials than this only blacken the picture: the best, and those of the frontier, are drawn.
MAX_DRAWN = 2000
# As many as there are line styles that an eye tells apart.
MAX_BATCH_GROUPS = 4

# Okabe and Ito's palette and a violet, safe for colour-blind readers; black is the frontier's.
# Each optimizer keeps its colour from sweep to sweep.
_COLOURS = {
    "sgd": "#0072B2",
    "momentum": "#E69F00",
    "nesterov": "#56B4E9",
    "adam": "#009E73",
    "adamw": "#CC79A7",
    "lamb": "#D55E00",
    "lars": "#5D3A9B",
}
OTHER_COLOUR = "#666666"
BUDGET_COLOUR = "#8A1C1C"

_END_WORDS = {
    TrialState.COMPLETED: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.DIVERGED: "diverged",
    TrialState.FAILED: "failed or cancelled",
    TrialState.RUNNING: "not ended yet",
}
ACCURACY_LABEL = "utility: accuracy on the evaluation split"
FRONTIER_LABEL = "best accuracy at or\nbelow each ε"


def colour_of(optimizer: str) -> str:
    """The colour of an optimizer's trials."""
    return _COLOURS.get(optimizer, OTHER_COLOUR)


# --- What a picture consists of ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """A report, or a mean of some, that none with as small an epsilon surpasses.

    ``trial`` is the number of its configuration's first trial.
    """

    epsilon: float
    eval_accuracy: float
    trial: int
    step: int


class Point(NamedTuple):
    """A report in the picture, or the mean of some.

    Attributes:
        x: Its epsilon; in the strip where that is unknown.
        y: Its accuracy.
        report: The report.
        is_ahead: Whether it is on the frontier.
    """

    x: float
    y: float
    report: CurvePoint
    is_ahead: bool

    @property
    def spread(self) -> float:
        """The standard deviation of the accuracy; 0 where it is no mean."""
        return (isinstance(self.report, MeanPoint) and self.report.eval_accuracy_std) or 0.0


class Label(NamedTuple):
    """Words about a place in the picture."""

    x: float
    y: float
    text: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A configuration that has reported an accuracy.

    Attributes:
        configuration: The configuration.
        points: Its reports of an accuracy, at least one.
        optimizer: What its colour says.
        batch: Index of its batch-size group.
        end: How it ended; RUNNING if it has not.
    """

    configuration: Configuration
    points: tuple[Point, ...]
    optimizer: str
    batch: int
    end: TrialState

    @property
    def joined(self) -> tuple[Point, ...]:
        """The points with a known epsilon, which a line may join."""
        return tuple(point for point in self.points if point.report.epsilon is not None)

    @property
    def has_spread(self) -> bool:
        """Whether it is a mean, around which there is a band."""
        return any(point.spread for point in self.joined)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """Everything that is drawn.

    Attributes:
        title: Which sweep it shows.
        subtitle: Its data set and its privacy section.
        guarantee: What the sweep promises.
        notes: What is not drawn, and why.
        empty: What stands where no accuracy is; else empty.
        budget: The target epsilon.
        x: The axis of privacy spent.
        y: The axis of utility.
        lines: The best configuration first.
        best: The end of the best line, and what it is.
        frontier: As `pareto_frontier` says.
        rejected: The rejected trials that are drawn.
        num_rejected: How many there are.
        batches: Names of the batch-size groups.
    """

    title: str
    subtitle: str
    guarantee: str
    notes: tuple[str, ...]
    empty: str
    budget: float
    x: EpsilonAxis
    y: AccuracyAxis
    lines: tuple[Line, ...]
    best: Label | None
    frontier: tuple[FrontierPoint, ...]
    rejected: tuple[TrialSummary, ...]
    num_rejected: int
    batches: tuple[str, ...]

    @property
    def crowd(self) -> int:
        """How thin to draw: 0 for few lines, 1 for many, 2 for very many."""
        return bisect.bisect_left((15, 60), len(self.lines))

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The optimizers of the lines, in an order that stays from sweep to sweep."""
        present = {line.optimizer for line in self.lines}
        known = [name for name in _COLOURS if name in present]
        return (*known, *sorted(present.difference(known)))

    @property
    def ends(self) -> dict[TrialState, str]:
        """How lines end, in words."""
        ends = [line.end for line in self.lines]
        return {
            end: f"{words} ({ends.count(end)})" for end, words in _END_WORDS.items() if end in ends
        }

    @property
    def rejected_label(self) -> str:
        """What the marks along the bottom are."""
        return f"rejected, never ran ({self.num_rejected})\nat what it would cost"

    @property
    def frontier_path(self) -> tuple[list[float], list[float]]:
        """The frontier's corners; it holds on to the budget, and a free point is at the left."""
        xs = [max(point.epsilon, self.x.low) for point in self.frontier]
        ys = [point.eval_accuracy for point in self.frontier]
        if xs and xs[-1] < self.budget:
            xs.append(self.budget)
            ys.append(ys[-1])
        return xs, ys


# --- From results to a picture -------------------------------------------------------------


def pareto_frontier(results: SweepResults) -> tuple[FrontierPoint, ...]:
    """The best accuracy at or below each epsilon, over all reports of all configurations.

    Of repeats their mean counts, for otherwise the luckiest of them would. Both epsilon and
    accuracy strictly increase. Reports without an epsilon or an accuracy do not count.
    """
    points = sorted(
        (
            FrontierPoint(report.epsilon, report.eval_accuracy, each.number, report.step)
            for each in results.configurations
            for report in each.curve
            if report.epsilon is not None and report.eval_accuracy is not None
        ),
        key=lambda point: (point.epsilon, -point.eval_accuracy, point.trial, point.step),
    )
    frontier: list[FrontierPoint] = []
    for point in points:
        if not frontier or point.eval_accuracy > frontier[-1].eval_accuracy:
            frontier.append(point)
    return tuple(frontier)


def make_picture(results: SweepResults) -> Picture:
    """What to draw of a sweep."""
    privacy = results.privacy
    budget = float(privacy["target_epsilon"])
    frontier = pareto_frontier(results)
    measured = [each for each in results.configurations if _measurements(each)]
    needed = {point.trial for point in frontier}
    drawn = [c for rank, c in enumerate(measured) if rank < MAX_DRAWN or c.number in needed]
    all_rejected = [trial for trial in results.trials if trial.state is TrialState.REJECTED]
    rejected = all_rejected[:MAX_DRAWN]
    x = epsilon_axis(
        [report.epsilon for each in drawn for report in _measurements(each)],
        [trial.planned_epsilon for trial in rejected],
        budget,
    )
    groups = _batch_groups([size for each in drawn if (size := _batch_size(each)) is not None])
    lines = tuple(_line(each, x, groups, frontier) for each in drawn)
    return Picture(
        title=f"{one_line(results.name)}: accuracy against privacy spent"
        + ("" if results.state is SweepState.COMPLETED else f" (sweep {results.state.lower()})"),
        subtitle="   ·   ".join(
            [
                one_line(results.dataset),
                f"δ = {privacy['target_delta']:g}",
                f"accountant {privacy['accountant']}",
                f"policy {privacy['policy']}",
                f"neighbours: {privacy['neighboring_relation']}",
            ]
        ),
        guarantee=results.guarantee,
        notes=_notes(results, lines, len(measured)),
        empty="" if lines else _empty_words(results),
        budget=budget,
        x=x,
        y=accuracy_axis(
            [
                point.y + side * point.spread
                for line in lines
                for point in line.points
                for side in ((-1, 1) if point.spread else (0,))
            ]
        ),
        lines=lines,
        best=_best_label(results, lines),
        frontier=frontier,
        rejected=tuple(rejected),
        num_rejected=len(all_rejected),
        batches=tuple(
            show_value(low) if low == high else f"{show_value(low)} to {show_value(high)}"
            for low, high in groups
        ),
    )


def _measurements(shown: TrialSummary | Configuration) -> list[CurvePoint]:
    return [report for report in shown.curve if report.eval_accuracy is not None]


def _batch_size(configuration: Configuration) -> float | None:
    size = flat_config(configuration.config).get("expected_batch_size")
    return float(size) if isinstance(size, int | float) else None


def _batch_groups(sizes: Sequence[float]) -> list[tuple[float, float]]:
    """Least and greatest of each group of batch sizes, in order.

    Few different sizes are groups of their own; of many, each group takes an equal share.
    """
    distinct = sorted(set(sizes))
    if len(distinct) <= MAX_BATCH_GROUPS:
        return [(size, size) for size in distinct]
    ordered = sorted(sizes)
    cuts = [ordered[len(ordered) * k // MAX_BATCH_GROUPS] for k in range(1, MAX_BATCH_GROUPS)]
    shares = itertools.groupby(distinct, key=lambda size: bisect.bisect_right(cuts, size))
    groups = [list(share) for _, share in shares]
    return [(group[0], group[-1]) for group in groups]


def _line(
    configuration: Configuration,
    x: EpsilonAxis,
    groups: Sequence[tuple[float, float]],
    frontier: Iterable[FrontierPoint],
) -> Line:
    ahead = {point.step for point in frontier if point.trial == configuration.number}
    size, state = _batch_size(configuration), configuration.state
    if state is TrialState.CANCELLED:
        end = TrialState.FAILED
    else:
        end = state if state in _END_WORDS else TrialState.RUNNING
    return Line(
        configuration=configuration,
        points=tuple(
            Point(x.place(report.epsilon), report.eval_accuracy, report, report.step in ahead)
            for report in configuration.curve
            if report.eval_accuracy is not None
        ),
        optimizer=one_line(str(flat_config(configuration.config).get("optimizer", "?"))),
        batch=0 if size is None else bisect.bisect_left([high for _, high in groups], size),
        end=end,
    )


def _best_label(results: SweepResults, lines: Sequence[Line]) -> Label | None:
    if not lines or lines[0].configuration.eval_accuracy is None:
        return None  # whoever was measured ended without an accuracy
    best, end = lines[0].configuration, lines[0].points[-1]
    names = varying_names([trial.config for trial in results.trials])
    parts = brief_config(best.config, names or tuple(flat_config(best.config)))
    which = list_numbers(best.numbers)
    rows = [
        f"best: {which}, {show_mean(best)} at ε = {show_epsilon(best.epsilon)}",
        *(", ".join(parts[start : start + 3]) for start in range(0, len(parts), 3)),
    ]
    return Label(end.x, end.y, "\n".join(rows))


def _notes(results: SweepResults, lines: Sequence[Line], num_measured: int) -> tuple[str, ...]:
    means = ()
    if any(line.has_spread for line in lines):
        means = ("lines are means over repeats, as far as all have come; bands: ± 1 std",)
    return (*means, *_not_drawn(results, len(lines), num_measured))


def _not_drawn(results: SweepResults, num_drawn: int, num_measured: int) -> tuple[str, ...]:
    if num_drawn < num_measured:
        return (f"the best {num_drawn} of {num_measured} measured configurations are drawn",)
    silent = [
        trial.state
        for trial in results.trials
        if not _measurements(trial) and trial.state is not TrialState.REJECTED
    ]
    return (f"not drawn, no accuracy yet or ever: {count_words(silent)}",) if silent else ()


def _empty_words(results: SweepResults) -> str:
    total = len(results.trials)
    if total and results.count(TrialState.REJECTED) == total:
        which = "The only trial was" if total == 1 else f"All {total} trials were"
        return f"{which} rejected before the start:\nnothing ran, no privacy was spent."
    return "No trial has reported an accuracy yet."
