"""Draws the utility-privacy picture with plotly, into one HTML file that needs no network."""

import html
import importlib
import itertools
import math
import string
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sweeps.database.states import TrialState
from sweeps.report.picture import (
    ACCURACY_LABEL,
    BUDGET_COLOUR,
    FRONTIER_LABEL,
    MAX_BATCH_GROUPS,
    OTHER_COLOUR,
    Label,
    Line,
    Picture,
    Point,
    colour_of,
    make_picture,
)
from sweeps.report.results import Configuration, SweepResults, TrialSummary
from sweeps.report.table import (
    describe_config,
    list_numbers,
    one_line,
    show_accuracy,
    show_epsilon,
    show_value,
)

# By batch-size group: dash and symbol.
_STYLES = (
    ("solid", "circle"),
    ("dash", "square"),
    ("dot", "triangle-up"),
    ("dashdot", "diamond"),
)
_HEIGHT, _ABOVE, _BELOW = 660, 40, 60

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: utility and privacy</title>
<style>
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
       color: #222; background: #fff; max-width: 1280px; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; }
.facts { color: #444; margin: 0.2rem 0 0; }
.guarantee { max-width: 60rem; border-left: 3px solid #8A1C1C; padding-left: 0.8rem; }
.note { color: #444; font-size: 0.9rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="facts">$subtitle</p>
$picture
<p class="guarantee">$guarantee</p>
<p class="note">$notes</p>
</body>
</html>
""")

# Under the pointer, a trial's whole line stands out. customdata holds trial numbers.
_HIGHLIGHT = """
const picture = document.getElementById('{plot_id}');
const last = picture.data.length - 1;
picture.on('plotly_hover', event => {
  const number = event.points[0].customdata;
  const xs = [], ys = [];
  picture.data.filter(trace => trace.meta === 'line').forEach(trace => {
    trace.customdata.forEach((other, at) => {
      if (other === number) { xs.push(trace.x[at]); ys.push(trace.y[at]); }
    });
  });
  Plotly.restyle(picture, {x: [xs], y: [ys]}, [last]);
});
picture.on('plotly_unhover', () => {
  Plotly.restyle(picture, {x: [[null]], y: [[null]]}, [last]);
});
"""

# The buttons left out send data elsewhere, or select what nothing uses.
_CONFIG: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["sendChartToCloud", "select2d", "lasso2d", "autoScale2d"],
}


def write_html(results: SweepResults, path: Path) -> None:
    """Draws the picture into one HTML file that opens without a network.

    Args:
        results: What to show.
        path: The file; an existing one is replaced.
    """
    plotly_io: Any = importlib.import_module("plotly.io")  # has no types
    picture = make_picture(results)
    drawn: str = plotly_io.to_html(
        _figure(picture),
        config=_CONFIG,
        include_plotlyjs=True,
        full_html=False,
        div_id="picture",
        post_script=_HIGHLIGHT,
    )
    hints = ["hover for a trial; click an optimizer to hide it"] if picture.lines else []
    page = _PAGE.substitute(
        title=html.escape(picture.title),
        subtitle=html.escape(picture.subtitle),
        guarantee=html.escape(picture.guarantee),
        notes=html.escape("; ".join([*picture.notes, *hints])),
        picture=drawn,
    )
    path.write_text(page, encoding="utf-8")


def plotly_figure(results: SweepResults) -> dict[str, Any]:
    """The picture as a plotly figure in plain data: ``data`` and ``layout``.

    The traces of lines and ends carry the trial's number of each point as ``customdata``; a gap
    (null) parts one trial's line from the next.
    """
    return _figure(make_picture(results))


def _figure(picture: Picture) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    for look in itertools.product(picture.optimizers, range(MAX_BATCH_GROUPS)):
        lines = [line for line in picture.lines if (line.optimizer, line.batch) == look]
        if lines:
            if any(line.has_spread for line in lines):
                data.append(_band_trace(picture, lines))
            data.append(_line_trace(picture, lines))
            ends += _end_traces(picture, lines)
    # The last is what _HIGHLIGHT draws.
    highlight = _trace("highlight", [None], [None], mode="lines", hoverinfo="skip") | {
        "line": {"color": "rgba(0,0,0,0.3)", "width": 8}
    }
    data += [_frontier_trace(picture), *ends, _rejected_trace(picture), *_legend_traces(picture)]
    return {"data": [*data, highlight], "layout": _layout(picture)}


# --- Traces --------------------------------------------------------------------------------


def _trace(group: str, xs: Sequence[Any], ys: Sequence[Any], **rest: Any) -> dict[str, Any]:
    base = {"type": "scatter", "x": list(xs), "y": list(ys), "legendgroup": _markup(group)}
    return base | {"meta": group, "showlegend": False} | rest


def _line_trace(picture: Picture, lines: Sequence[Line]) -> dict[str, Any]:
    """The lines of one optimizer and one batch-size group."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    numbers: list[int | None] = []
    for line in lines:
        number = line.configuration.number
        xs += [*(point.x for point in line.joined), None]
        ys += [*(point.y for point in line.joined), None]
        texts += [*(_hover(line.configuration, point) for point in line.joined), ""]
        numbers += [*(number for _ in line.joined), None]
    colour = colour_of(lines[0].optimizer)
    dash, _ = _STYLES[lines[0].batch]
    return _trace(lines[0].optimizer, xs, ys, mode="lines+markers", meta="line") | {
        "text": texts,
        "customdata": numbers,
        "hovertemplate": "%{text}<extra></extra>",
        "opacity": (0.9, 0.6, 0.35)[picture.crowd],
        "line": {"color": colour, "width": (1.4, 1.4, 1)[picture.crowd], "dash": dash},
        "marker": {"color": colour, "size": (4, 4, 3)[picture.crowd]},
    }


def _band_trace(picture: Picture, lines: Sequence[Line]) -> dict[str, Any]:
    """One standard deviation to both sides of means, of one optimizer and batch-size group."""
    xs: list[float | None] = []
    ys: list[float | None] = []
    for line in lines:
        there, back = line.joined, line.joined[::-1]
        xs += [*(point.x for point in there + back), None]
        ys += [point.y + point.spread for point in there]
        ys += [*(point.y - point.spread for point in back), None]
    return _trace(lines[0].optimizer, xs, ys, mode="lines", meta="band", hoverinfo="skip") | {
        "fill": "toself",
        "fillcolor": _rgba(colour_of(lines[0].optimizer), (0.15, 0.08, 0.04)[picture.crowd]),
        "line": {"width": 0},
    }


def _rgba(colour: str, opacity: float) -> str:
    """A colour in hexadecimal, made to let through what lies below."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _end_traces(picture: Picture, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Where the lines of one optimizer and one batch-size group end."""
    optimizer = lines[0].optimizer
    _, symbol = _STYLES[lines[0].batch]
    size = (10, 10, 7)[picture.crowd]
    traces: list[dict[str, Any]] = []
    for end in picture.ends:
        ended = [line for line in lines if line.end is end]
        if ended:
            tips = [line.points[-1] for line in ended]
            xs, ys = [tip.x for tip in tips], [tip.y for tip in tips]
            trace = _trace(optimizer, xs, ys, mode="markers", meta="end") | {
                "text": [_hover(line.configuration, line.points[-1]) for line in ended],
                "customdata": [line.configuration.number for line in ended],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": _end_mark(end, symbol, colour_of(optimizer), size),
            }
            traces.append(trace)
    return traces


def _end_mark(end: TrialState, symbol: str, colour: str, size: float) -> dict[str, Any]:
    symbols = {
        TrialState.COMPLETED: symbol,
        TrialState.PRUNED: f"{symbol}-open",
        TrialState.DIVERGED: "x-thin",
        TrialState.FAILED: "cross-thin",
        TrialState.RUNNING: "triangle-right",
    }
    edge = {"color": colour, "width": 2}
    if end is TrialState.COMPLETED:
        edge = {"color": "white", "width": 1}
    return {"symbol": symbols[end], "color": colour, "size": size, "line": edge}


def _frontier_trace(picture: Picture) -> dict[str, Any]:
    xs, ys = picture.frontier_path
    return _trace("frontier", xs, ys, mode="lines", hoverinfo="skip") | {
        "line": {"color": "black", "width": 3, "shape": "hv"},
        "name": _markup(FRONTIER_LABEL),
        "showlegend": bool(xs),
    }


def _rejected_trace(picture: Picture) -> dict[str, Any]:
    xs = [picture.x.place(trial.planned_epsilon) for trial in picture.rejected]
    mark = {"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": BUDGET_COLOUR}}
    return _trace("rejected", xs, [picture.y.bottom] * len(xs), mode="markers") | {
        "text": [_hover(trial, None) for trial in picture.rejected],
        "customdata": [trial.number for trial in picture.rejected],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": mark,
        "name": _markup(picture.rejected_label),
        "showlegend": bool(xs),
    }


def _legend_traces(picture: Picture) -> list[dict[str, Any]]:
    """Traces without points: their entries in the legend explain the others."""

    def entry(name: str, group: str, heading: str, **rest: Any) -> dict[str, Any]:
        trace = _trace(group, [None], [None], name=_markup(name), hoverinfo="skip", **rest)
        return trace | {"meta": "key", "showlegend": True, "legendgrouptitle": {"text": heading}}

    traces: list[dict[str, Any]] = []
    for name in picture.optimizers:
        heading = "optimizer" if name == picture.optimizers[0] else ""
        line = {"color": colour_of(name), "width": 3}
        traces.append(entry(name, name, heading, mode="lines", line=line))
    for (dash, symbol), label in zip(_STYLES, picture.batches, strict=False):
        look = {
            "mode": "lines+markers",
            "line": {"color": OTHER_COLOUR, "width": 1.5, "dash": dash},
            "marker": {"symbol": symbol, "color": OTHER_COLOUR, "size": 8},
            "legend": "legend2",
        }
        traces.append(entry(label, "batch", "expected batch size", **look))
    for end, label in picture.ends.items():
        mark = _end_mark(end, "circle", OTHER_COLOUR, 9)
        look = {"mode": "markers", "marker": mark, "legend": "legend2"}
        traces.append(entry(label, "end", "where a trial ended", **look))
    return traces


def _hover(trial: TrialSummary | Configuration, point: Point | None) -> str:
    """What the pointer shows, in the little HTML that plotly knows."""
    numbers = trial.numbers if isinstance(trial, Configuration) else [trial.number]
    lines = [f"<b>{list_numbers(numbers)}</b>, {trial.state.lower()}"]
    if point is None:
        lines.append(f"would cost ε = {show_epsilon(trial.planned_epsilon)}")
    else:
        where = f"ε = {show_epsilon(point.report.epsilon)}, accuracy {show_accuracy(point.y)}"
        where += f" ± {show_accuracy(point.spread)}" if point.spread else ""
        lines.append(f"{where}, on the frontier" if point.is_ahead else where)
        lines.append(f"step {point.report.step} of {trial.end_step}")
    lines.append(_markup(describe_config(trial.config, separator="\n")))
    reason = one_line(trial.reason, 300)
    lines += [f"<i>{_markup(line)}</i>" for line in textwrap.wrap(reason, 60)]
    return "<br>".join(lines)


def _markup(text: str) -> str:
    """Plain text in the little HTML that plotly knows."""
    return html.escape(text, quote=False).replace("\n", "<br>")


# --- Layout --------------------------------------------------------------------------------


def _layout(picture: Picture) -> dict[str, Any]:
    legend = {"xanchor": "left", "x": 1.01, "yanchor": "top", "y": 1}
    legend |= {"tracegroupgap": 2, "font": {"size": 12}}
    # The second legend, which hides nothing, stands below the first.
    first_height = 20 * (len(picture.optimizers) + 4 + 2 * bool(picture.rejected))
    below_first = {"y": 1 - first_height / (_HEIGHT - _ABOVE - _BELOW)}
    return {
        "height": _HEIGHT,
        "margin": {"l": 70, "r": 20, "t": _ABOVE, "b": _BELOW},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {
            "family": "system-ui, -apple-system, Segoe UI, DejaVu Sans, sans-serif",
            "color": "#222222",
        },
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"color": "#222222"}},
        "xaxis": _x_axis(picture),
        "yaxis": _y_axis(picture),
        "legend": legend,
        "legend2": legend | below_first | {"itemclick": False, "itemdoubleclick": False},
        "shapes": _shapes(picture),
        "annotations": _annotations(picture),
    }


_AXIS = {"gridcolor": "#E8E8E8", "zeroline": False, "showline": True, "linecolor": "#444444"}


def _x_axis(picture: Picture) -> dict[str, Any]:
    x = picture.x
    axis = _AXIS | {
        "title": {"text": x.label},
        "type": "log" if x.log else "linear",
        "range": [math.log10(x.low), math.log10(x.end)] if x.log else [x.low, x.end],
        "ticks": "outside",
    }
    if x.log or x.strip_label:
        # The strip is not to scale, so plotly must not put numbers there.
        axis |= {"tickvals": list(x.ticks), "ticktext": list(x.ticks.values())}
    return axis


def _y_axis(picture: Picture) -> dict[str, Any]:
    return _AXIS | {
        "title": {"text": ACCURACY_LABEL},
        "labelalias": {f"{percent}%": "" for percent in range(101, 151)},
        "range": [picture.y.low, picture.y.high],
        "tickformat": ".0%" if picture.y.high - picture.y.low > 0.08 else ".1%",
        "showgrid": not picture.empty,
        "showticklabels": not picture.empty,
    }


def _shapes(picture: Picture) -> list[dict[str, Any]]:
    def band(low: float, high: float, colour: str, opacity: float) -> dict[str, Any]:
        place = {"yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1}
        look = {"fillcolor": colour, "opacity": opacity, "line": {"width": 0}}
        return {"type": "rect", "layer": "below"} | place | look

    budget = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "layer": "above"}
    budget |= {"x0": picture.budget, "x1": picture.budget}
    budget |= {"line": {"color": BUDGET_COLOUR, "width": 2}}
    shapes = [band(picture.budget, picture.x.high, BUDGET_COLOUR, 0.04), budget]
    if picture.x.strip_label:
        shapes.append(band(picture.x.high, picture.x.end, "#888888", 0.15))
    return shapes


def _annotations(picture: Picture) -> list[dict[str, Any]]:
    budget = Label(picture.budget, 1, f"budget ε = {show_value(picture.budget)}")
    notes = [
        _note(picture, budget)
        | {"text": f"<b>{budget.text}</b>", "yref": "paper", "yanchor": "bottom"}
        | {"showarrow": False, "font": {"color": BUDGET_COLOUR}}
    ]
    box = {"bgcolor": "white", "bordercolor": "#BBBBBB"}
    if picture.empty:
        notes.append(
            {"text": _markup(picture.empty), "showarrow": False, "font": {"size": 18}}
            | {"xref": "paper", "yref": "paper", "x": 0.5, "y": 0.55, "borderpad": 10}
            | box
        )
    if picture.best is not None:
        on_left = picture.x.part(picture.best.x) <= 0.42
        notes.append(
            _note(picture, picture.best)
            | {"showarrow": True, "arrowhead": 0, "arrowcolor": "#222222", "standoff": 6}
            | {"ax": 20 if on_left else -20, "ay": -52, "xanchor": "left" if on_left else "right"}
            | {"align": "left", "borderpad": 4}
            | box
            | {"bgcolor": "rgba(255,255,255,0.9)"}
        )
    return notes


def _note(picture: Picture, label: Label) -> dict[str, Any]:
    # Unlike shapes, annotations on a logarithmic axis are placed by exponent.
    x = math.log10(max(label.x, picture.x.low)) if picture.x.log else label.x
    return {"x": x, "y": label.y, "text": _markup(label.text)}
