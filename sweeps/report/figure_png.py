"""Draws the utility-privacy picture with matplotlib, for documents and messages."""

import textwrap
from pathlib import Path
from typing import Any

from sweeps.database.states import TrialState
from sweeps.report.picture import (
    ACCURACY_LABEL,
    BUDGET_COLOUR,
    FRONTIER_LABEL,
    OTHER_COLOUR,
    Picture,
    colour_of,
    make_picture,
)
from sweeps.report.results import SweepResults
from sweeps.report.table import show_value

# By batch-size group: line style and marker.
_STYLES: tuple[tuple[Any, str], ...] = (
    ("-", "o"),
    ((0, (5, 1.5)), "s"),
    ((0, (1.2, 1.2)), "^"),
    ((0, (6, 1.5, 1.2, 1.5)), "D"),
)
_LEFT = 0.065
_GREY = "#444444"
_BOX = {"fc": "white", "ec": "#BBBBBB"}


def write_png(results: SweepResults, path: Path) -> None:
    """Draws the picture into a PNG file, 1800 by 1080 pixels.

    Touches none of matplotlib's global state, so any thread may call it.

    Args:
        results: What to show.
        path: The file; an existing one is replaced.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = make_picture(results)
    figure: Any = Figure(figsize=(12, 7.2), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_axes((_LEFT, 0.205, 0.715, 0.655))
    _write_words(figure, picture)
    _draw_axes(axes, picture)
    _draw_budget(axes, picture)
    _draw_lines(axes, picture)
    _draw_frontier(axes, picture)
    _draw_rejected(axes, picture)
    _draw_best(axes, picture)
    _draw_legend(axes, picture)
    figure.savefig(path, format="png", metadata={"Software": "dp-sweeps"})


def _write_words(figure: Any, picture: Picture) -> None:
    def write(y: float, text: str, **style: Any) -> None:
        figure.text(_LEFT, y, text, parse_math=False, **style)

    write(0.945, _drawable(picture.title), fontsize=17, weight="bold")
    write(0.905, _drawable(picture.subtitle), fontsize=10, color=_GREY)
    guarantee = textwrap.fill(picture.guarantee, 170)
    write(0.115, guarantee, fontsize=9, color="#222222", va="top")
    write(0.022, "; ".join(picture.notes), fontsize=8.5, color=_GREY, va="top")


def _draw_axes(axes: Any, picture: Picture) -> None:
    from matplotlib.ticker import NullLocator

    x = picture.x
    axes.set_xscale("log" if x.log else "linear")
    axes.set_xlim(x.low, x.end)
    axes.set_ylim(picture.y.low, picture.y.high)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(list(x.ticks), list(x.ticks.values()))
    y_ticks = {} if picture.empty else picture.y.ticks
    axes.set_yticks(list(y_ticks), list(y_ticks.values()))
    axes.set_xlabel(x.label, fontsize=11)
    axes.set_ylabel(ACCURACY_LABEL, fontsize=11)
    axes.axvspan(x.high, x.end, color="#EEEEEE", lw=0, zorder=0)
    axes.grid(True, color="#E4E4E4", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if picture.empty:
        place = {"ha": "center", "va": "center", "transform": axes.transAxes, "zorder": 8}
        box = {"boxstyle": "round,pad=0.6", **_BOX}
        axes.text(0.5, 0.55, picture.empty, fontsize=14, color=_GREY, bbox=box, **place)


def _draw_budget(axes: Any, picture: Picture) -> None:
    axes.axvspan(picture.budget, picture.x.high, color=BUDGET_COLOUR, alpha=0.04, lw=0, zorder=0)
    axes.axvline(picture.budget, color=BUDGET_COLOUR, lw=1.4, zorder=3)
    axes.annotate(
        f"budget ε = {show_value(picture.budget)}",
        (picture.budget, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        color=BUDGET_COLOUR,
        fontsize=10,
        weight="bold",
    )


def _draw_lines(axes: Any, picture: Picture) -> None:
    alpha = (0.85, 0.5, 0.28)[picture.crowd]
    width = (1.3, 1.0, 0.7)[picture.crowd]
    size = (7.5, 6, 4.2)[picture.crowd]
    # The best are drawn last, on top.
    for line in reversed(picture.lines):
        colour = colour_of(line.optimizer)
        style, marker = _STYLES[line.batch]
        dots = {"marker": ".", "ms": 2.5 * width} if picture.crowd < 2 else {}
        xs, ys = [point.x for point in line.joined], [point.y for point in line.joined]
        look: dict[str, Any] = {"color": colour, "lw": width, "alpha": alpha, "zorder": 2}
        axes.plot(xs, ys, ls=style, **look, **dots)
        if line.has_spread:
            low, high = zip(*((p.y - p.spread, p.y + p.spread) for p in line.joined), strict=True)
            faint = (0.15, 0.08, 0.04)[picture.crowd]
            axes.fill_between(xs, low, high, color=colour, alpha=faint, lw=0, zorder=1)
        tip = line.points[-1]
        mark = _end_mark(line.end, marker, colour, size)
        axes.plot([tip.x], [tip.y], ls="none", zorder=6, alpha=max(alpha, 0.8), **mark)


def _end_mark(end: TrialState, marker: str, colour: str, size: float) -> dict[str, Any]:
    filled = {"marker": marker, "ms": size, "mfc": colour, "mec": colour}
    marks: dict[TrialState, dict[str, Any]] = {
        TrialState.COMPLETED: {"mec": "white", "mew": 0.6},
        TrialState.PRUNED: {"mfc": "white", "mew": 1.3},
        TrialState.DIVERGED: {"marker": "x", "mew": 2},
        TrialState.FAILED: {"marker": "+", "mew": 2},
        TrialState.RUNNING: {"marker": ">", "ms": size * 0.8, "mew": 0},
    }
    return filled | marks[end]


def _draw_frontier(axes: Any, picture: Picture) -> None:
    xs, ys = picture.frontier_path
    axes.plot(xs, ys, drawstyle="steps-post", color="black", lw=2.4, zorder=5)


def _draw_rejected(axes: Any, picture: Picture) -> None:
    xs = [picture.x.place(trial.planned_epsilon) for trial in picture.rejected]
    look = {"ls": "none", "marker": "|", "ms": 13, "mew": 1.6, "color": BUDGET_COLOUR, "zorder": 6}
    axes.plot(xs, [picture.y.bottom] * len(xs), alpha=0.9 if len(xs) <= 60 else 0.5, **look)


def _draw_best(axes: Any, picture: Picture) -> None:
    if picture.best is None:
        return
    x, y, text = picture.best
    axes.plot([x], [y], marker="o", ms=15, mfc="none", mec="black", mew=1.5, zorder=7)
    # The box hangs from the top, to the side of its point where there is room for it.
    place = picture.x.part(x)
    on_left = place < 0.42
    axes.annotate(
        text,
        (x, y),
        xytext=(max(place, 0.02) if on_left else min(place, 0.98) - 0.012, 0.985),
        textcoords="axes fraction",
        ha="left" if on_left else "right",
        va="top",
        multialignment="left",
        fontsize=10,
        linespacing=1.35,
        zorder=8,
        bbox={"boxstyle": "round,pad=0.35", "alpha": 0.95, **_BOX},
        arrowprops={"arrowstyle": "-", "color": "black", "lw": 1, "shrinkB": 8},
    ).set_parse_math(False)


def _draw_legend(axes: Any, picture: Picture) -> None:
    from matplotlib.lines import Line2D

    entries: list[tuple[Any, bool]] = []

    def entry(label: str, heading: bool = False, ls: Any = "none", **style: Any) -> None:
        handle = Line2D([], [], label=_drawable(label), ls=ls, **style)
        entries.append((handle, heading))

    if picture.lines:
        entry(FRONTIER_LABEL, ls="-", color="black", lw=2.4)
    if picture.best is not None:
        entry("best", marker="o", ms=11, mfc="none", mec="black", mew=1.5)
    if picture.lines:
        entry("optimizer", heading=True)
    for name in picture.optimizers:
        entry(name, ls="-", color=colour_of(name), lw=2.5)
    if picture.batches:
        entry("expected batch size", heading=True)
    for (style, marker), label in zip(_STYLES, picture.batches, strict=False):
        entry(label, color=OTHER_COLOUR, ls=style, lw=1.5, marker=marker, ms=6)
    if picture.lines:
        entry("where a trial ended", heading=True)
    for end, label in picture.ends.items():
        entry(label, **_end_mark(end, "o", OTHER_COLOUR, 7))
    if picture.rejected:
        entry(picture.rejected_label, marker="|", ms=11, mew=1.6, color=BUDGET_COLOUR)
    if not entries:
        return
    legend: Any = axes.legend(
        handles=[handle for handle, _ in entries],
        loc="upper left",
        bbox_to_anchor=(1.015, 1.02),
        frameon=False,
        fontsize=9.5,
        handlelength=3.2,
        labelspacing=0.6,
    )
    for text, (_, heading) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        if heading:
            text.set_weight("bold")
            text.set_position((-44, 0))


def _drawable(text: str) -> str:
    """Text without characters that the picture's font lacks."""
    return "".join(c if ord(c) < 0x250 or 0x370 <= ord(c) < 0x400 else "?" for c in text)
