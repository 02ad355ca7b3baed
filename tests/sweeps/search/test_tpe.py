"""The search that learns: what it is told, that it learns, and that it needs no memory."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.search.tpe import propose
from sweeps.search.tried import Tried
from sweeps.search_space import hyperparameters
from sweeps.spec.reading import parse_spec

SPACE = {
    "optimizer": {"choice": ["sgd", "adam"]},
    "learning_rate": {"loguniform": [0.01, 10.0]},
    "expected_batch_size": {"lograndint": [16, 257]},
    "iterations": {"randint": [10, 100]},
    "noise_multiplier": {"uniform": [1.0, 4.0]},
    "l2_clip_norm": {"quniform": [0.1, 2.0, 0.1]},
}


def spec_of(space=None, **search):
    return parse_spec(
        json.dumps(
            {
                "version": 1,
                "name": "s",
                "data": {"name": "digits"},
                "model": {"name": "mlp"},
                "privacy": {"policy": "per_trial", "target_epsilon": 8, "target_delta": 1e-5},
                "search_space": {**SPACE, **(space or {})},
                "search": {"name": "optuna", "num_samples": 100, **search},
                "report_every_steps": 1,
            }
        )
    )


def one_of(spec, number, **fields):
    return Tried(values=propose(spec, [], number), **{"outcome": "completed", **fields})


@settings(max_examples=20)
@given(number=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_what_is_proposed_lies_in_the_space_and_makes_a_setting(number, seed):
    spec = spec_of(seed=seed)
    tried = [
        one_of(spec, 1, utility=0.5, epsilon=1.0, step=10),
        one_of(spec, 2, outcome="running"),
        one_of(spec, 3, outcome="refused", excess=0.5),
        one_of(spec, 4, outcome="pruned", utility=0.2, epsilon=0.5, step=5),
        one_of(spec, 5, outcome="failed"),
        one_of(spec, 6, outcome="diverged"),
    ]
    values = propose(spec, tried, number)
    for name, domain in spec.search_space.domains():
        assert domain.given(values).contains(values[name]), (name, values[name])
    setting = hyperparameters(values)
    assert type(setting.iterations) is int
    assert type(setting.expected_batch_size) is float
    # Nothing but its arguments: a driver that comes back proposes the same.
    assert propose(spec, tried, number) == values
    assert propose(spec, tried, number + 1) != values


def searched(spec, count, outcome_of):
    tried = []
    for number in range(count):
        tried.append(outcome_of(propose(spec, tried, number)))
    return tried


def only(**domains):
    constants = {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "expected_batch_size": 64,
        "iterations": 20,
        "noise_multiplier": 2.0,
        "l2_clip_norm": 1.0,
    }
    return {**constants, **domains}


def test_it_comes_to_what_is_best():
    spec = spec_of(only(learning_rate={"uniform": [0.5, 10.5]}))

    def outcome_of(values):
        utility = -abs(values["learning_rate"] - 3.0)
        return Tried(values=values, outcome="completed", utility=utility, epsilon=1.0, step=20)

    rates = [each.values["learning_rate"] for each in searched(spec, 40, outcome_of)]
    late = sorted(abs(rate - 3.0) for rate in rates[20:])
    # Drawn blindly, half of them would be more than 2.5 away.
    assert late[10] < 1.0


def test_it_keeps_away_from_what_is_refused_and_from_what_is_pruned():
    spec = spec_of(only(noise_multiplier={"uniform": [1.0, 11.0]}))

    def refusing(values):
        noise = values["noise_multiplier"]
        if noise < 9.0:
            return Tried(values=values, outcome="refused", excess=9.0 - noise)
        return Tried(values=values, outcome="completed", utility=0.5, epsilon=1.0, step=20)

    refused = [each.outcome == "refused" for each in searched(spec, 40, refusing)]
    assert sum(refused[20:]) < 10, "blindly it would be 16 of 20"

    def pruning(values):
        noise = values["noise_multiplier"]
        end = {"outcome": "pruned", "step": 5} if noise < 9.0 else {"outcome": "completed"}
        return Tried(**{"values": values, "utility": 0.5, "epsilon": 1.0, "step": 20, **end})

    pruned = [each.outcome == "pruned" for each in searched(spec, 40, pruning)]
    assert sum(pruned[20:]) < 10


def test_the_smallest_epsilon_that_reaches_a_utility():
    space = only(noise_multiplier={"uniform": [1.0, 11.0]})
    spec = spec_of(space, objective="epsilon", min_utility=0.5)

    def outcome_of(values):
        noise = values["noise_multiplier"]  # more noise: less utility, and less epsilon
        return Tried(
            values=values,
            outcome="completed",
            utility=1.0 - noise / 12,
            epsilon=10.0 / noise,
            step=20,
        )

    noises = [each.values["noise_multiplier"] for each in searched(spec, 50, outcome_of)]
    best = max(noise for noise in noises if noise <= 6.0)
    assert best > 5.5
    # Blindly it would be 6 of 30, and 12 or more once in a hundred times.
    assert sum(abs(noise - 5.5) < 1.0 for noise in noises[20:]) >= 12


def test_the_frontier_is_searched_at_more_than_one_place():
    space = only(noise_multiplier={"uniform": [1.0, 11.0]}, learning_rate={"uniform": [1, 11]})
    spec = spec_of(space, objective="frontier")

    def outcome_of(values):
        noise, rate = values["noise_multiplier"], values["learning_rate"]
        utility = 1.0 - noise / 12 - abs(rate - 4.0) / 10
        return Tried(
            values=values, outcome="completed", utility=utility, epsilon=10.0 / noise, step=20
        )

    late = searched(spec, 60, outcome_of)[30:]
    rates = sorted(abs(each.values["learning_rate"] - 4.0) for each in late)
    assert rates[15] < 1.5, "blindly, half of them would be more than 2.75 away"
    noises = [each.values["noise_multiplier"] for each in late]
    assert min(noises) < 4.0
    assert max(noises) > 8.0


@pytest.mark.parametrize("objective", ["utility", "frontier", "epsilon"])
def test_a_search_that_has_only_been_refused_goes_on(objective):
    more = {"min_utility": 0.5} if objective == "epsilon" else {}
    spec = spec_of(objective=objective, **more)
    tried = [one_of(spec, n, outcome="refused", excess=1e6) for n in range(20)]
    assert propose(spec, tried, 20)


# --- Fields that depend on another one -----------------------------------------------------

BRANCHES = {
    "optimizer": {"choice": ["sgd", "adam", "lamb"]},
    "learning_rate": {
        "by": "optimizer",
        "sgd": {"uniform": [1.0, 9.0]},
        "adam": {"loguniform": [0.001, 0.1]},
        "lamb": 0.5,
    },
}
# Where each branch is best; sgd is better than adam on the whole.
BEST = {"sgd": 3.0, "adam": 0.02}


def branched(values):
    rate, best = values["learning_rate"], BEST.get(values["optimizer"])
    if best is None:
        return Tried(values=values, outcome="refused", excess=1.0)
    utility = 0.5 - 0.3 * (abs(rate - best) / best) - 0.1 * (values["optimizer"] == "adam")
    return Tried(values=values, outcome="completed", utility=utility, epsilon=1.0, step=20)


@settings(max_examples=20, deadline=None)
@given(number=st.integers(0, 10**6), seed=st.integers(0, 100))
def test_a_dependent_field_is_proposed_within_its_branch(number, seed):
    spec = spec_of({**BRANCHES, "iterations": {"randint": [10, 100]}}, seed=seed)
    tried = searched(spec, 4, branched)
    values = propose(spec, tried, number)
    for name, domain in spec.search_space.domains():
        assert domain.given(values).contains(values[name]), (name, values)
    hyperparameters(values)
    assert propose(spec, tried, number) == values


def test_each_branch_comes_to_what_is_best_in_it():
    tried = searched(spec_of(only(**BRANCHES)), 60, branched)
    late = [each.values for each in tried[20:]]
    rates = {by: [v["learning_rate"] for v in late if v["optimizer"] == by] for by in BEST}
    near = [abs(rate - 3.0) < 1.0 for rate in rates["sgd"]]
    assert sum(near) > len(near) / 2, "blindly it would be a quarter"
    assert len(rates["sgd"]) > 40 / 3, "blindly it would be a third"
