"""Repeats of one configuration: their mean is what is compared, and it stands on all of them."""

import dataclasses
import json
import statistics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.database.states import TrialState
from sweeps.report.documents import results_json
from sweeps.report.figure_html import plotly_figure
from sweeps.report.figure_png import write_png
from sweeps.report.picture import make_picture, pareto_frontier
from sweeps.report.results import SweepResults, TrialSummary
from sweeps.report.table import results_table, show_mean
from tests.sweeps.report.example_results import batch, curves, sweep, trial
from tests.sweeps.report.test_table import printed


def repeats(first: int, *ends: float | None, **changes: Any) -> list[TrialSummary]:
    """A configuration whose repeats end with these accuracies, as `trial` has it."""
    return [
        trial(
            number,
            points=((2.0, 0.5), (4.0, end)),
            repeat_of=f"t{first}" if number > first else None,
            **changes,
        )
        for number, end in enumerate(ends, start=first)
    ]


STEADY = repeats(0, 0.80, 0.81, 0.82, config=batch(64.0))
LUCKY = repeats(3, 0.70, 0.90, 0.71, config=batch(128.0))
RESULTS = sweep(*STEADY, *LUCKY)


def test_the_best_of_several_lucky_seeds_does_not_win():
    best, other = RESULTS.configurations
    assert best.numbers == [0, 1, 2]
    assert best.eval_accuracy == pytest.approx(0.81)
    assert best.eval_accuracy_std == pytest.approx(0.01)
    assert other.eval_accuracy == pytest.approx(0.77)
    assert RESULTS.best is best
    assert [t.number for t in RESULTS.best_first] == [2, 1, 0, 4, 5, 3]
    frontier = pareto_frontier(RESULTS)
    assert [(p.epsilon, round(p.eval_accuracy, 9), p.trial) for p in frontier] == [
        (2.0, 0.5, 0),
        (4.0, 0.81, 0),
    ]


def test_one_trial_is_its_configuration():
    one = trial(0)
    (configuration,) = sweep(one).configurations
    assert configuration.curve is one.curve
    assert (configuration.eval_accuracy, configuration.epsilon) == (one.eval_accuracy, one.epsilon)
    assert configuration.eval_accuracy_std is None
    assert show_mean(configuration) == "80.00%"


def test_a_mean_goes_as_far_as_all_have_come():
    pruned = trial(2, TrialState.PRUNED, ((2.0, 0.3),), repeat_of="t0")
    (configuration,) = sweep(*repeats(0, 0.8, 0.9), pruned).configurations
    (point,) = configuration.curve
    assert (point.step, point.epsilon) == (10, 2.0)
    assert point.eval_accuracy == pytest.approx((0.5 + 0.5 + 0.3) / 3)
    assert configuration.state is TrialState.PRUNED
    assert configuration.epsilon == 4.0, "the most that one of them has spent"


def test_who_was_never_measured_does_not_count_and_that_is_said():
    lost = trial(2, TrialState.FAILED, (), repeat_of="t0", reason="lost")
    results = sweep(*repeats(0, 0.8, 0.9), lost)
    (configuration,) = results.configurations
    assert show_mean(configuration) == "85.00% ± 7.07% (2 of 3)"
    (document,) = results_json(results, report={})["configurations"]
    assert document["num_measured"] == 2
    assert configuration.reason == "lost"


def test_a_configuration_that_has_yet_to_end_runs():
    running = trial(1, TrialState.RUNNING, ((2.0, 0.7),), repeat_of="t0")
    (configuration,) = sweep(trial(0), running).configurations
    assert configuration.state is TrialState.RUNNING
    assert configuration.eval_accuracy == pytest.approx(0.6)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(curves, min_size=2, max_size=4), st.randoms())
def test_a_mean_lies_between_its_repeats_and_knows_no_order(drawn, random):
    trials = [
        trial(number, points=tuple(points), repeat_of="t0" if number else None)
        for number, points in enumerate(drawn)
    ]
    (configuration,) = sweep(*trials).configurations
    for point in configuration.curve:
        there = [r.eval_accuracy for t in trials for r in t.curve if r.step == point.step]
        found = [accuracy for accuracy in there if accuracy is not None]
        assert point.eval_accuracy == pytest.approx(statistics.fmean(found))
        assert len(found) == len(configuration.measured)
    assert len(configuration.curve) <= min(
        (len(t.curve) for t in configuration.measured), default=0
    )
    random.shuffle(trials)
    (shuffled,) = sweep(*trials).configurations
    assert shuffled.curve == configuration.curve


def test_the_table_has_trials_below_their_configuration():
    text = printed(results_table(RESULTS), width=120)
    lines = [line.split() for line in text.splitlines() if line.endswith("20/100")]
    assert lines[0] == [
        "3",
        "trials",
        "81.00%",
        "±",
        "1.00%",
        "4",
        "64",
        "3",
        "completed",
        "20/100",
    ]
    assert [line[0] for line in lines] == ["3", "2", "1", "0", "3", "4", "5", "3"]
    assert lines[1] == ["2", "82.00%", "4", "completed", "20/100"]
    assert "digits: completed; 6 trials: 6 completed" in text
    assert "mean ± standard deviation at the last step that all" in text
    assert "mean ±" not in printed(results_table(sweep(trial(0))))


def test_a_refused_configuration_is_in_parentheses_with_its_reason():
    refused = [
        trial(n, TrialState.REJECTED, repeat_of="t0" if n else None, reason="too dear")
        for n in range(3)
    ]
    text = printed(results_table(sweep(*refused)), width=120)
    assert text.count("(12)") == 4
    assert text.count("too dear") == 3
    assert "3 rejected" in text


def test_the_json_has_configurations_best_first():
    document = json.loads(json.dumps(results_json(RESULTS, report={}), allow_nan=False))
    best, other = document["configurations"]
    assert best == {
        "trial_ids": ["t2", "t1", "t0"],
        "config": batch(64.0),
        "state": "COMPLETED",
        "num_measured": 3,
        "eval_accuracy_mean": pytest.approx(0.81),
        "eval_accuracy_std": pytest.approx(0.01),
        "epsilon": 4.0,
        "step": 20,
    }
    assert other["trial_ids"] == ["t4", "t5", "t3"]
    by_id = {one["trial_id"]: one["repeat_of"] for one in document["trials"]}
    assert by_id == {"t0": None, "t1": "t0", "t2": "t0", "t3": None, "t4": "t3", "t5": "t3"}


def test_the_picture_draws_a_line_for_each_configuration_with_its_spread(tmp_path):
    picture = make_picture(RESULTS)
    assert [line.configuration.number for line in picture.lines] == [0, 3]
    assert [point.spread for point in picture.lines[0].points] == [0.0, pytest.approx(0.01)]
    assert picture.best is not None
    assert picture.best.text.startswith("best: trials 0, 1, 2, 81.00% ± 1.00% at ε = 4")
    assert "means over repeats" in picture.notes[0]
    assert picture.y.high > 0.77 + statistics.stdev([0.70, 0.90, 0.71])
    figure = plotly_figure(RESULTS)
    bands = [trace for trace in figure["data"] if trace["meta"] == "band"]
    assert [len(band["x"]) for band in bands] == [5, 5]
    assert bands[0]["y"] == pytest.approx([0.5, 0.82, 0.80, 0.5, None])
    texts = [text for t in figure["data"] if t["meta"] == "end" for text in t["text"]]
    assert any("trials 0, 1, 2" in text and "81.00% ± 1.00%" in text for text in texts)
    write_png(RESULTS, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 0


def test_without_repeats_there_is_no_band():
    single: SweepResults = dataclasses.replace(RESULTS, trials=(trial(0),))
    assert not [t for t in plotly_figure(single)["data"] if t["meta"] == "band"]
    assert make_picture(single).notes == ()
