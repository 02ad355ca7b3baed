"""The picture as an HTML file, and that nothing a person wrote runs in it."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly import graph_objects

from sweeps.database.states import TrialState
from sweeps.report.figure_html import plotly_figure, write_html
from sweeps.report.results import SweepResults
from tests.sweeps.report.example_results import CASES, SCRIPT, batch, curves, many, sweep, trial


def traces(results: SweepResults, meta: str) -> list[dict[str, Any]]:
    return [trace for trace in plotly_figure(results)["data"] if trace.get("meta") == meta]


def notes(results: SweepResults) -> list[str]:
    return [note["text"] for note in plotly_figure(results)["layout"]["annotations"]]


@pytest.mark.parametrize("results", CASES.values(), ids=CASES.keys())
def test_plotly_knows_every_word_of_the_figure(results):
    graph_objects.Figure(plotly_figure(results))  # refuses what it does not know


@settings(max_examples=25)
@given(st.lists(curves, max_size=4), st.floats(0.1, 100))
def test_every_number_of_the_figure_is_finite(drawn, budget):
    results = sweep(*(trial(k, points=tuple(points)) for k, points in enumerate(drawn)))
    results.privacy["target_epsilon"] = budget
    figure = plotly_figure(results)
    ranges = figure["layout"]["xaxis"]["range"] + figure["layout"]["yaxis"]["range"]
    assert all(math.isfinite(bound) for bound in ranges)
    for trace in figure["data"]:
        assert all(x is None or math.isfinite(x) for x in (*trace["x"], *trace["y"]))


def test_a_line_per_trial_in_a_trace_per_look():
    results = sweep(
        trial(0, config=batch(64.0)),
        trial(1, config=batch(128.0)),
        trial(2, config=batch(64.0, "sgd")),
        trial(3, config=batch(64.0)),
    )
    lines = traces(results, "line")
    assert [trace["customdata"] for trace in lines] == [
        [2, 2, None],
        [0, 0, None, 3, 3, None],
        [1, 1, None],
    ]
    assert lines[1]["x"] == [2.0, 4.0, None, 2.0, 4.0, None]
    assert lines[0]["line"]["color"] != lines[1]["line"]["color"] == lines[2]["line"]["color"]
    assert lines[1]["line"]["dash"] != lines[2]["line"]["dash"]
    names = [trace["name"] for trace in traces(results, "key")]
    assert names == ["sgd", "adam", "64", "128", "completed (4)"]


def test_ends_tell_states_apart():
    states = (
        TrialState.COMPLETED,
        TrialState.PRUNED,
        TrialState.DIVERGED,
        TrialState.FAILED,
        TrialState.RUNNING,
    )
    results = sweep(*(trial(number, state) for number, state in enumerate(states)))
    ends = {trace["customdata"][0]: trace["marker"]["symbol"] for trace in traces(results, "end")}
    assert ends == {
        0: "circle",
        1: "circle-open",
        2: "x-thin",
        3: "cross-thin",
        4: "triangle-right",
    }


def test_the_frontier_is_a_step_line():
    (line,) = traces(sweep(trial(0)), "frontier")
    assert (line["x"], line["y"]) == ([2.0, 4.0, 8.0], [0.5, 0.8, 0.8])
    assert line["line"]["shape"] == "hv"


def test_rejected_trials_stand_along_the_bottom():
    (rejected,) = traces(CASES["all rejected"], "rejected")
    assert rejected["customdata"] == [0, 1, 2]
    assert len(set(rejected["y"])) == 1
    assert rejected["text"][0].startswith("<b>trial 0</b>, rejected<br>would cost ε = 12<br>")
    assert rejected["text"][2].startswith("<b>trial 2</b>, rejected<br>would cost ε = ∞<br>")
    assert rejected["name"] == "rejected, never ran (3)<br>at what it would cost"


def test_budget_and_best_are_named():
    assert notes(many(12)) == [
        "<b>budget ε = 8</b>",
        "best: trial 10, 85.00% at ε = 3.834<br>nesterov, batch 42",
    ]


def test_an_empty_picture_says_why():
    assert any("All 3 trials were rejected" in note for note in notes(CASES["all rejected"]))


def test_hover_says_everything():
    results = sweep(trial(3, TrialState.PRUNED, reason="too slow"))
    (line,) = traces(results, "line")
    assert line["text"][1].split("<br>") == [
        "<b>trial 3</b>, pruned",
        "ε = 4, accuracy 80.00%, on the frontier",
        "step 20 of 100",
        "optimizer=adam",
        "learning_rate=0.5",
        "expected_batch_size=64",
        "iterations=100",
        "noise_multiplier=1.25",
        "l2_clip_norm=1",
        "<i>too slow</i>",
    ]


def test_html_is_one_file_and_sends_nothing_anywhere(tmp_path):
    write_html(many(12), tmp_path / "picture.html")
    text = (tmp_path / "picture.html").read_text(encoding="utf-8")
    assert len(text) > 1_000_000  # plotly.js is inside
    assert "<script src=" not in text
    assert "<link" not in text.split("<script", 1)[0]
    assert '"showSendToCloud": false' in text
    assert "does NOT cover choosing the best" in text


def test_nothing_that_a_person_wrote_becomes_markup(tmp_path):
    config = batch(64.0, SCRIPT)
    results = sweep(
        trial(0, TrialState.PRUNED, reason=SCRIPT, config=config),
        trial(1, TrialState.REJECTED, reason=SCRIPT, config=config),
        name=SCRIPT,
        dataset=SCRIPT,
    )
    write_html(results, tmp_path / "picture.html")
    assert SCRIPT not in (tmp_path / "picture.html").read_text(encoding="utf-8")
    # Nor within plotly's texts, which know a little HTML themselves.
    assert SCRIPT not in repr(plotly_figure(results))
    assert "&lt;script&gt;" in repr(plotly_figure(results))
