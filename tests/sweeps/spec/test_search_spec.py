"""Where configurations come from and when a sweep stops: what is allowed, and what is not."""

import json

import pytest

from sweeps.errors import SpecError
from sweeps.spec.reading import parse_spec
from sweeps.spec.search_spec import OptunaSpec, QuasiRandomSpec, RandomSpec

SPEC = {
    "version": 1,
    "name": "s",
    "data": {"name": "digits"},
    "model": {"name": "mlp"},
    "privacy": {"policy": "open", "target_epsilon": 8, "target_delta": 1e-5},
    "search_space": {
        "optimizer": {"choice": ["sgd", "adam"]},
        "learning_rate": {"loguniform": [0.01, 10]},
        "expected_batch_size": {"quniform": [32, 128, 32]},
        "iterations": {"randint": [25, 101]},
        "noise_multiplier": 2,
        "l2_clip_norm": {"uniform": [0.5, 1.5]},
    },
}
GRID = {"search_space": {**SPEC["search_space"], "noise_multiplier": {"grid_search": [1, 2]}}}
SELECTION = {
    "policy": "private_selection",
    "selection": {"distribution": "geometric", "mean": 5},
}


def parsed(**sections):
    privacy = {**SPEC["privacy"], **sections.pop("privacy", {})}
    return parse_spec(json.dumps({**SPEC, **sections, "privacy": privacy}))


def optuna(**fields):
    return {"name": "optuna", "num_samples": 20, **fields}


def points(*given, **fields):
    return {"num_samples": 20, "points_to_evaluate": list(given), **fields}


def test_a_search_without_a_name_is_random():
    assert parsed().search == RandomSpec()
    assert parsed(search={"num_samples": 3}).search == RandomSpec(num_samples=3)
    quasi = parsed(search={"name": "quasi_random"}).search
    assert quasi == QuasiRandomSpec(name="quasi_random")
    assert isinstance(parsed(search=optuna()).search, OptunaSpec)


@pytest.mark.parametrize(
    "point",
    [
        {"optimizer": "adam"},
        {"learning_rate": 10, "l2_clip_norm": 0.5},
        {"expected_batch_size": 96},
        {"iterations": 100},
        {"noise_multiplier": 2.0, "weight_decay": 0},
    ],
)
@pytest.mark.parametrize("name", ["random", "quasi_random", "optuna"])
def test_points_of_the_space_are_allowed(point, name):
    assert parsed(search=points(point, name=name)).search.points_to_evaluate == (point,)


@pytest.mark.parametrize(
    ("sections", "where", "message"),
    [
        (
            {"search": {"name": "bayes"}},
            "search.name",
            "'bayes' is not allowed; allowed: one of optuna, quasi_random, random",
        ),
        (
            {"search": {"repeats": 0}},
            "search.repeats",
            "0 is not allowed; allowed: a whole number from 1 to 100000",
        ),
        (
            {"search": {"num_samples": 40_000, "repeats": 3}},
            "search_space",
            "the grid times search.num_samples times search.repeats gives 120000 trials; allowed",
        ),
        (
            {"search": optuna(num_samples=40_000, repeats=3)},
            "search.repeats",
            "3 is not allowed with num_samples 40000; allowed: at most 100000 trials in all",
        ),
        (
            {"search": {"name": "random", "n_startup_trials": 3}},
            "search.n_startup_trials",
            "unknown key; allowed: num_samples, repeats, seed, points_to_evaluate, name",
        ),
        ({"search": {"name": "optuna"}}, "search.num_samples", "is missing; allowed: a whole"),
        ({"search": optuna(max_refused=0)}, "search.max_refused", "0 is not allowed; allowed: a"),
        (
            {"search": optuna(objective="loss")},
            "search.objective",
            "'loss' is not allowed; allowed: one of utility, epsilon, frontier",
        ),
        (
            {"search": optuna(objective="epsilon")},
            "search.min_utility",
            "null is not allowed with epsilon; allowed: a number from 0 to 1",
        ),
        (
            {"search": optuna(min_utility=0.5)},
            "search.min_utility",
            "0.5 is not allowed with utility; allowed: null",
        ),
        (
            {"search": points({"learning_rates": 1.0})},
            "search.points_to_evaluate[0].learning_rates",
            "unknown key (did you mean learning_rate?); allowed: optimizer, learning_rate, ",
        ),
        (
            {"search": points({}, {"learning_rate": 1.0})},
            "search.points_to_evaluate[0]",
            "{} is not allowed; allowed: a list of mappings",
        ),
        (
            {"search": points({"learning_rate": 1.0}, {"learning_rate": 11})},
            "search.points_to_evaluate[1].learning_rate",
            '11 is not in the search space; allowed: in {"loguniform": [0.01, 10.0]}',
        ),
        (
            {"search": points({"expected_batch_size": 100})},
            "search.points_to_evaluate[0].expected_batch_size",
            "100 is not in the search space; allowed: in ",
        ),
        (
            {"search": points({"iterations": 101})},
            "search.points_to_evaluate[0].iterations",
            "101 is not in the search space; allowed: in ",
        ),
        (
            {"search": points({"optimizer": True})},
            "search.points_to_evaluate[0].optimizer",
            "true is not",
        ),
        (
            {"search": points({"noise_multiplier": 1}, {"noise_multiplier": 2}, num_samples=1)},
            "search.points_to_evaluate",
            "2 points are more than num_samples; allowed: at most 1",
        ),
        (
            {**GRID, "search": optuna()},
            "search_space.noise_multiplier",
            "grid_search is not allowed with optuna, which goes through no grid; allowed: choice",
        ),
        (
            {"search": optuna(), "privacy": {"policy": "declared"}},
            "search.name",
            "optuna is not allowed under declared, whose list of trials is fixed before the ",
        ),
        (
            {"search": {"name": "quasi_random"}, "privacy": SELECTION},
            "search.name",
            "is not allowed under private_selection, whose trials are drawn independently",
        ),
        (
            {"search": points({"learning_rate": 1.0}, num_samples=1), "privacy": SELECTION},
            "search.points_to_evaluate",
            "is not allowed under private_selection, whose trials are drawn independently",
        ),
        (
            {"stop": {"utility": 1.5}},
            "stop.utility",
            "1.5 is not allowed; allowed: null or a number above 0, up to 1",
        ),
        (
            {"stop": {"time_budget_s": 0}},
            "stop.time_budget_s",
            "0 is not allowed; allowed: null or a number > 0",
        ),
        ({"stop": {"time": 5}}, "stop.time", "unknown key; allowed: utility, epsilon, budget_l"),
        (
            {"stop": {"budget_left": 0.1}, "privacy": {"policy": "per_trial"}},
            "stop.budget_left",
            "0.1 is not allowed under per_trial, where nothing adds up; allowed: null",
        ),
        (
            {"stop": {"trials": 3}, "privacy": SELECTION},
            "stop",
            "is not allowed under private_selection, whose number of trials is drawn in secret",
        ),
    ],
)
def test_what_is_not_allowed_is_named_with_what_is(sections, where, message):
    with pytest.raises(SpecError) as caught:
        parsed(**sections)
    found = {problem.key_path: problem.message for problem in caught.value.problems}
    assert where in found, found
    assert found[where].startswith(message)


def test_a_search_that_learns_goes_with_open_and_per_trial():
    for policy in ("open", "per_trial"):
        assert parsed(search=optuna(), privacy={"policy": policy}).num_listed == 10
    assert parsed(search=optuna(num_samples=100_000)).num_listed == 10
