"""The table and the JSON: what a terminal and a program get to read."""

import dataclasses
import io
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sweeps.database.states import TrialState
from sweeps.report.documents import results_json
from sweeps.report.results import CurvePoint, TrialSummary
from sweeps.report.table import (
    CheckRow,
    brief_config,
    check_table,
    flat_config,
    fold_reasons,
    list_numbers,
    one_line,
    results_table,
    show_epsilon,
    show_value,
    varying_names,
)
from tests.sweeps.report.example_results import sweep

CONFIG: dict[str, Any] = {
    "optimizer": "adam",
    "learning_rate": 0.5,
    "expected_batch_size": 64.0,
    "iterations": 100,
    "noise_multiplier": 1.25,
    "l2_clip_norm": 1.0,
    "sampling_prob": 0.05,
}
TOO_DEAR = (
    "epsilon {} exceeds the budget of 8 at delta 1e-05; noise_multiplier >= {} would fit; "
    "iterations <= 60 would fit as well"
)


def trial(
    number: int,
    state: TrialState = TrialState.COMPLETED,
    accuracy: float | None = 0.8,
    reason: str = "",
    epsilon: float | None = 7.5,
    **config: Any,
) -> TrialSummary:
    curve = (CurvePoint(50, 50, 4.0, 0.5, 0.7), CurvePoint(100, 100, epsilon, accuracy, 0.3))
    if accuracy is None:
        curve = ()
    return TrialSummary(
        trial_id=f"t{number}",
        number=number,
        state=state,
        reason=reason,
        config=CONFIG | config,
        planned_iterations=100,
        planned_epsilon=epsilon,
        charged_iterations=100 if curve else 0,
        curve=curve,
        mlflow_run_id=None,
    )


EXAMPLE = sweep(
    trial(0, accuracy=0.8123, optimizer="adam", learning_rate=0.5),
    trial(1, accuracy=0.9042, epsilon=7.9991, optimizer="momentum", learning_rate=0.05),
    trial(2, TrialState.PRUNED, 0.41, "at step 100: below the best quarter", learning_rate=3.0),
    trial(3, TrialState.REJECTED, None, TOO_DEAR.format(12.34, 1.618), 12.34, optimizer="sgd"),
    trial(4, TrialState.REJECTED, None, "the privacy cost is not known", None, optimizer="sgd"),
)


def printed(renderable: Any, width: int = 80, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **options).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


# --- The table -----------------------------------------------------------------------------


def test_table_at_80_columns():
    text = printed(results_table(EXAMPLE))
    assert text.startswith(GOLDEN)
    # The wording of the guarantee is accounting's.
    assert " ".join(text.removeprefix(GOLDEN).split()) == EXAMPLE.guarantee


GOLDEN = """\
digits: completed; 5 trials: 2 completed, 2 rejected, 1 pruned

                                     learning
trial  accuracy        ε  optimizer      rate  state        steps  why
──────────────────────────────────────────────────────────────────────
    1    90.42%        8  momentum       0.05  completed  100/100
    0    81.23%      7.5  adam            0.5  completed  100/100
    2    41.00%      7.5  adam              3  pruned     100/100  a
    3         -  (12.34)  sgd             0.5  rejected         -  b
    4         -      (∞)  sgd             0.5  rejected         -  c

a at step 100: below the best quarter
b epsilon 12.34 exceeds the budget of 8 at delta 1e-05; noise_multiplier >=
  1.618 would fit; iterations <= 60 would fit as well
c the privacy cost is not known

All trials: expected_batch_size=64, iterations=100, noise_multiplier=1.25,
l2_clip_norm=1
ε in parentheses: what it would have cost; not spent
Policy per_trial: budget ε = 8, δ = 1e-05; accountant pld
"""


def test_reasons_stand_in_the_row_where_they_fit():
    lines = printed(results_table(EXAMPLE), width=200).splitlines()
    (row,) = [line for line in lines if "12.34)" in line]
    assert row.endswith(TOO_DEAR.format(12.34, 1.618))


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
@pytest.mark.parametrize("count", [1, 40])
def test_table_fits_its_width_and_loses_no_number(width, count):
    results = sweep(
        *(
            trial(
                n,
                accuracy=0.5 + n / 100,
                epsilon=7.111,
                optimizer=("momentum", "adam")[n % 2],
                learning_rate=0.0123 + n,
                expected_batch_size=100.0 + n,
                noise_multiplier=1.001 + n,
                l2_clip_norm=0.1 + n,
            )
            for n in range(count)
        ),
        trial(count, TrialState.REJECTED, None, TOO_DEAR.format(12.34, 1.6), 12.34),
    )
    text = printed(results_table(results), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "7.111" in text
    assert "50.00%" in text
    assert "(12.34)" in text
    assert "…" not in text


def test_the_best_comes_first_and_the_rest_is_counted():
    text = printed(results_table(EXAMPLE, max_rows=1))
    assert "90.42%" in text
    assert "81.23%" not in text
    assert "and 4 more: 2 rejected, 1 completed, 1 pruned" in text


def test_what_does_not_vary_is_said_once():
    text = printed(results_table(sweep(trial(0), trial(1))), width=140)
    assert "All trials: optimizer=adam, learning_rate=0.5, expected_batch_size=64" in text
    assert "optimizer" not in text.split("All trials")[0]


@pytest.mark.parametrize("results", [sweep(), sweep(trial(0, TrialState.QUEUED, None))])
def test_tables_of_little(results):
    assert "Policy per_trial: budget ε = 8" in printed(results_table(results))


def test_no_terminal_gets_no_codes_and_text_is_never_markup():
    dirty = "[red]no[/red] \x1b[31mno\x07 \n<script>alert(1)</script>"
    results = sweep(trial(0, TrialState.FAILED, 0.5, dirty, optimizer="[b]x"), name="a\x1b[2Jb")
    text = printed(results_table(results), width=120)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]no[/red]" in text
    coloured = printed(results_table(results), width=120, force_terminal=True, color_system="256")
    assert "\x1b[31mno" not in coloured
    assert "\x1b[2J" not in coloured


def test_check_table_shows_costs_and_why_not():
    rows = [
        CheckRow(config=CONFIG, epsilon=7.2, decision="admitted", reason="it fits"),
        CheckRow(
            config=CONFIG | {"noise_multiplier": 0.7, "sampling_prob": 0.1},
            epsilon=12.34,
            decision="rejected",
            reason=TOO_DEAR.format(12.34, 1.6),
        ),
        CheckRow(
            config=CONFIG | {"noise_multiplier": "calibrated"},
            epsilon=None,
            decision="rejected",
            reason="no noise is enough",
        ),
    ]
    text = printed(check_table(rows, title="digits", guarantee="Each trial is private."))
    assert text.startswith("digits: 3 trials: 2 rejected, 1 admitted\n")
    assert "it fits" not in text
    assert "12.34" in text
    assert "∞" in text
    assert "calibrated" in text
    assert "sampling" not in text
    assert "b no noise is enough" in text
    assert text.endswith("Each trial is private.")
    assert "and 2 more: 2 rejected" in printed(check_table(rows, max_rows=1))


# --- Words ---------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e6))
def test_epsilon_is_never_shown_smaller_than_it_is(epsilon):
    # The tolerance is that of a float printed with four digits and of the guard against 8.000...1.
    assert float(show_epsilon(epsilon)) >= epsilon * (1 - 1e-9)


def test_epsilon_words():
    shown = [show_epsilon(value) for value in (8.0, 7.9991, 0.0, None, math.inf, 123.41)]
    assert shown == ["8", "8", "0", "∞", "∞", "123.5"]


def test_value_words():
    shown = [show_value(value) for value in (64.0, 0.12345678, 100, "adam", 1e-7, 2.0e9, True)]
    assert shown == ["64", "0.1235", "100", "adam", "1e-07", "2e+09", "True"]


def test_nested_configurations_are_flat():
    assert flat_config({"model": {"name": "mlp"}, "optimizer": "sgd"}) == {
        "optimizer": "sgd",
        "model.name": "mlp",
    }
    assert varying_names([{"model": {"name": "mlp"}}, {"model": {"name": "cnn"}}]) == (
        "model.name",
    )
    assert brief_config(CONFIG, ["optimizer", "learning_rate"]) == ["adam", "rate 0.5"]


def test_one_line_drops_control_characters():
    assert one_line("a\x1b[31m\n\tb\u202ec") == "a [31m b c"
    assert one_line("abcdefgh", 6) == "abc..."


def test_lists_of_trials():
    assert list_numbers([3]) == "trial 3"
    assert list_numbers(range(10), limit=3) == "trials 0, 1, 2 and 7 more"


def test_few_reasons_stay_as_they_are():
    folded = fold_reasons([(2, "b 1"), (0, "a 1"), (1, "b 1"), (3, "")])
    assert [(reason.text, reason.numbers) for reason in folded] == [
        ("b 1", (1, 2)),
        ("a 1", (0,)),
    ]


def test_reasons_that_differ_in_numbers_become_one_with_ranges():
    reasons = [(n, TOO_DEAR.format(9 + n, f"1.{n}")) for n in range(9)]
    folded = fold_reasons([*reasons, (9, "something else")])
    assert [reason.text for reason in folded] == [
        TOO_DEAR.format("9 to 17", "1.0 to 1.8"),
        "something else",
    ]
    assert folded[0].numbers == tuple(range(9))


@given(st.lists(st.tuples(st.integers(0, 99), st.text(max_size=20)), max_size=20))
def test_folding_keeps_every_trial(reasons):
    folded = fold_reasons(reasons, limit=3)
    kept = sorted(number for reason in folded for number in reason.numbers)
    assert kept == sorted(number for number, text in reasons if one_line(text))


# --- JSON ----------------------------------------------------------------------------------


def test_a_forks_steps_are_counted_on_from_its_parents():
    fork = dataclasses.replace(
        trial(0), planned_iterations=40, parent_trial_id="t9", parent_step=60
    )
    (item,) = results_json(sweep(fork), report={})["trials"]
    assert (item["parent_trial_id"], item["parent_step"], item["iterations"]) == ("t9", 60, 40)
    assert "100/100" in printed(results_table(sweep(fork)))


def test_json_shape():
    document = results_json(EXAMPLE, report={"png": "/r/p.png"})
    assert list(document) == [
        "sweep_id",
        "name",
        "state",
        "mlflow_run_id",
        "report",
        "policy",
        "target_epsilon",
        "target_delta",
        "accountant",
        "neighboring_relation",
        "privacy_unit",
        "sampling",
        "guarantee",
        "configurations",
        "trials",
    ]
    assert document["report"] == {"png": "/r/p.png"}
    assert [item["trial_id"] for item in document["trials"]] == ["t1", "t0", "t2", "t3", "t4"]
    assert document["trials"][0] == {
        "trial_id": "t1",
        "state": "COMPLETED",
        "config": CONFIG | {"optimizer": "momentum", "learning_rate": 0.05},
        "epsilon": 7.9991,
        "planned_epsilon": 7.9991,
        "delta": 1e-5,
        "eval_accuracy": 0.9042,
        "eval_loss": 0.3,
        "ema_eval_accuracy": None,
        "ema_eval_loss": None,
        "polyak_eval_accuracy": None,
        "polyak_eval_loss": None,
        "step": 100,
        "iterations": 100,
        "repeat_of": None,
        "parent_trial_id": None,
        "parent_step": None,
        "reason": "",
        "mlflow_run_id": None,
        "curve": [
            {"step": 50, "epsilon": 4.0, "eval_accuracy": 0.5},
            {"step": 100, "epsilon": 7.9991, "eval_accuracy": 0.9042},
        ],
    }
    rejected = document["trials"][3]
    assert (rejected["epsilon"], rejected["eval_accuracy"], rejected["step"]) == (12.34, None, 0)


def test_json_holds_no_number_that_json_lacks():
    nan = math.nan
    broken = trial(0, accuracy=nan, epsilon=math.inf, learning_rate=math.inf, sizes=(1, nan))
    text = json.dumps(results_json(sweep(broken), report={}), allow_nan=False)
    (item,) = json.loads(text)["trials"]
    assert item["epsilon"] is item["eval_accuracy"] is item["config"]["learning_rate"] is None
    assert item["config"]["sizes"] == [1, None]
