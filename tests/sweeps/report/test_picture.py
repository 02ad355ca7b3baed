"""The utility-privacy picture: what is in it, where, and in which words."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.database.states import SweepState, TrialState
from sweeps.report.picture import MAX_DRAWN, Picture, make_picture, pareto_frontier
from tests.sweeps.report.example_results import BUDGET, CASES, batch, curves, many, sweep, trial

# --- The frontier --------------------------------------------------------------------------


@given(st.lists(curves, max_size=6))
def test_frontier_rises_and_nothing_is_above_it(drawn):
    results = sweep(*(trial(k, points=tuple(points)) for k, points in enumerate(drawn)))
    frontier = pareto_frontier(results)
    for before, after in itertools.pairwise(frontier):
        assert before.epsilon < after.epsilon
        assert before.eval_accuracy < after.eval_accuracy
    placed = [(e, a) for points in drawn for e, a in points if e is not None and a is not None]
    assert bool(frontier) == bool(placed)
    for epsilon, accuracy in placed:
        within = [point.eval_accuracy for point in frontier if point.epsilon <= epsilon]
        assert max(within) >= accuracy
    if placed:
        assert frontier[-1].eval_accuracy == max(accuracy for _, accuracy in placed)


def test_frontier_spans_trials_and_says_where_it_comes_from():
    results = sweep(
        trial(0, points=((1.0, 0.5), (2.0, 0.6), (6.0, 0.9))), trial(1, points=((1.5, 0.7),))
    )
    found = [(p.epsilon, p.eval_accuracy, p.trial, p.step) for p in pareto_frontier(results)]
    assert found == [(1.0, 0.5, 0, 10), (1.5, 0.7, 1, 10), (6.0, 0.9, 0, 30)]
    picture = make_picture(results)
    ahead = {
        line.configuration.number: [p.is_ahead for p in line.points] for line in picture.lines
    }
    assert ahead == {0: [True, False, True], 1: [True]}


def test_frontier_holds_on_to_the_budget():
    results = sweep(trial(0, points=((1.0, 0.5), (6.0, 0.9))))
    assert make_picture(results).frontier_path == ([1.0, 6.0, BUDGET], [0.5, 0.9, 0.9])
    assert make_picture(sweep()).frontier_path == ([], [])


# --- Lines ---------------------------------------------------------------------------------


def test_the_best_trial_comes_first():
    accuracies = (0.3, 0.9, 0.6)
    results = sweep(*(trial(n, points=((1.0, a),)) for n, a in enumerate(accuracies)))
    assert [line.configuration.number for line in make_picture(results).lines] == [1, 2, 0]


@pytest.mark.parametrize(
    ("state", "end"),
    [
        (TrialState.COMPLETED, TrialState.COMPLETED),
        (TrialState.PRUNED, TrialState.PRUNED),
        (TrialState.DIVERGED, TrialState.DIVERGED),
        (TrialState.FAILED, TrialState.FAILED),
        (TrialState.CANCELLED, TrialState.FAILED),
        (TrialState.RUNNING, TrialState.RUNNING),
        (TrialState.PAUSED, TrialState.RUNNING),
    ],
)
def test_how_a_line_ends(state, end):
    assert make_picture(sweep(trial(0, state))).lines[0].end is end


def test_ends_are_counted():
    assert list(make_picture(many(12)).ends.values()) == [
        "completed (3)",
        "pruned (3)",
        "diverged (3)",
    ]


def test_a_diverged_trial_ends_where_it_was_last_measured():
    results = sweep(trial(0, TrialState.DIVERGED, ((1.0, 0.5), (2.0, None))))
    (line,) = make_picture(results).lines
    assert [(point.x, point.y) for point in line.points] == [(1.0, 0.5)]


def test_an_unknown_epsilon_stands_in_the_strip_and_is_not_joined():
    picture = make_picture(CASES["some epsilons"])
    line = next(line for line in picture.lines if line.configuration.number == 0)
    assert [point.x for point in line.joined] == [1.0]
    assert picture.x.high < line.points[-1].x < picture.x.end
    assert picture.x.ticks[line.points[-1].x] == "∞"


def test_optimizers_keep_their_order_and_unknown_ones_come_last():
    names = ("zeta", "adam", "alpha", "sgd")
    results = sweep(*(trial(n, config=batch(64.0, name)) for n, name in enumerate(names)))
    assert make_picture(results).optimizers == ("sgd", "adam", "alpha", "zeta")


@pytest.mark.parametrize(
    ("sizes", "names", "groups"),
    [
        ((64, 32, 64), ("32", "64"), (1, 0, 1)),
        ((1, 2, 3, 4), ("1", "2", "3", "4"), (0, 1, 2, 3)),
        (
            (8, 7, 6, 5, 4, 3, 2, 1),
            ("1 to 2", "3 to 4", "5 to 6", "7 to 8"),
            (3, 3, 2, 2, 1, 1, 0, 0),
        ),
        # Most trials have one size, so there are fewer groups.
        ((1, 1, 1, 1, 1, 1, 2, 3, 4, 5), ("1 to 2", "3 to 5"), (0, 0, 0, 0, 0, 0, 0, 1, 1, 1)),
    ],
)
def test_batch_sizes_are_grouped(sizes, names, groups):
    results = sweep(*(trial(n, config=batch(float(size))) for n, size in enumerate(sizes)))
    picture = make_picture(results)
    assert picture.batches == names
    by_number = sorted(picture.lines, key=lambda line: line.configuration.number)
    assert tuple(line.batch for line in by_number) == groups


def test_a_trial_without_a_batch_size_or_an_optimizer_is_drawn():
    (line,) = make_picture(sweep(trial(0, config={}))).lines
    assert (line.optimizer, line.batch) == ("?", 0)


def test_a_huge_sweep_keeps_the_best_and_the_frontier():
    trials = [trial(n, points=((2.0, 0.5 + n / 1e5),)) for n in range(MAX_DRAWN + 10)]
    # Last by accuracy, first on the frontier.
    trials[0] = trial(0, points=((0.5, 0.4), (1.0, 0.1)))
    picture = make_picture(sweep(*trials))
    drawn = {line.configuration.number for line in picture.lines}
    assert len(drawn) == MAX_DRAWN + 1
    assert {0, MAX_DRAWN + 9} <= drawn
    assert picture.notes == ("the best 2001 of 2010 measured configurations are drawn",)


@pytest.mark.parametrize(("count", "crowd"), [(1, 0), (15, 0), (16, 1), (60, 1), (61, 2)])
def test_the_more_lines_the_thinner(count, crowd):
    assert make_picture(sweep(*map(trial, range(count)))).crowd == crowd


# --- Axes ----------------------------------------------------------------------------------


def test_axis_is_logarithmic_only_where_epsilons_span_magnitudes():
    linear, log = make_picture(many(12)).x, make_picture(CASES["tiny epsilons"]).x
    assert not linear.log
    assert linear.low == 0
    assert log.log
    assert log.label == "privacy spent: ε (logarithmic)"


@pytest.mark.parametrize("results", CASES.values(), ids=CASES.keys())
def test_everything_to_scale_is_on_the_axes(results):
    picture = make_picture(results)
    x, y = picture.x, picture.y
    assert x.low < picture.budget < x.high <= x.end
    assert all(x.low <= tick <= x.end for tick in x.ticks)
    assert all(y.low <= tick <= min(y.high, 1.0) for tick in y.ticks)
    assert 2 <= len(y.ticks) <= 12
    for point in (point for line in picture.lines for point in line.points):
        assert point.x <= x.end
        assert y.low < point.y < y.high
        assert 0 <= x.part(point.x) <= 1


def rejected_at(*costs: float | None) -> Picture:
    rejected = (
        trial(n, TrialState.REJECTED, planned_epsilon=cost) for n, cost in enumerate(costs, 1)
    )
    return make_picture(sweep(trial(0), *rejected))


def test_rejected_trials_stand_at_their_cost_or_in_the_strip():
    picture = rejected_at(9.0, 500.0, None)
    near, far, unbounded = (picture.x.place(trial.planned_epsilon) for trial in picture.rejected)
    assert near == 9.0
    assert picture.x.high < far == unbounded < picture.x.end
    assert picture.x.ticks[far] == "> 9.45, ∞"
    assert picture.rejected_label.startswith("rejected, never ran (3)")


def test_the_strip_says_what_is_in_it():
    assert rejected_at(9.0).x.strip_label == ""
    assert rejected_at(500.0).x.strip_label == "> 8.4"
    assert rejected_at(None).x.strip_label == "∞"


# --- Words ---------------------------------------------------------------------------------


def texts(**changes: Any) -> tuple[str, str]:
    picture = make_picture(sweep(trial(0), **changes))
    return picture.title, picture.subtitle


def test_title_and_subtitle():
    assert texts() == (
        "digits: accuracy against privacy spent",
        "digits:1.0.0   ·   δ = 1e-05   ·   accountant pld   ·   policy per_trial   ·   "
        "neighbours: zero_out",
    )
    assert texts(state=SweepState.CANCELLED)[0].endswith("spent (sweep cancelled)")
    assert texts(name="two\nlines")[0].startswith("two lines:")


def test_the_best_trial_is_named():
    best = make_picture(many(12)).best
    assert best is not None
    assert best.text == "best: trial 10, 85.00% at ε = 3.834\nnesterov, batch 42"
    assert (best.x, best.y) == (3 + 10 / 12, 0.6 + 0.3 * 10 / 12)


def test_no_trial_is_best_where_none_ended_with_an_accuracy():
    results = sweep(trial(0, TrialState.DIVERGED, ((1.0, 0.5), (2.0, None))))
    assert make_picture(results).best is None


def test_what_is_not_drawn_is_counted():
    silent = [trial(n, TrialState.ADMITTED, ()) for n in (1, 2)]
    assert make_picture(sweep(trial(0), *silent)).notes == (
        "not drawn, no accuracy yet or ever: 2 admitted",
    )
    assert make_picture(many(12)).notes == ()


@pytest.mark.parametrize(
    ("results", "words"),
    [
        (CASES["all rejected"], "All 3 trials were rejected before the start:"),
        (sweep(trial(0, TrialState.REJECTED)), "The only trial was rejected before the start:"),
        (CASES["none yet"], "No trial has reported an accuracy yet."),
        (CASES["no trials"], "No trial has reported an accuracy yet."),
        (CASES["one"], ""),
    ],
)
def test_an_empty_picture_says_why(results, words):
    assert make_picture(results).empty.split("\n")[0] == words
