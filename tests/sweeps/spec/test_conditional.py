"""Fields that depend on another one, as a specification says them, and how others are refused."""

import copy
import json

import jsonschema
import pytest

from sweeps.errors import SpecError
from sweeps.spec.domains import ConditionalDomain, Domain
from sweeps.spec.reading import load_spec, parse_spec
from sweeps.spec.sweep_spec import json_schema
from tests.sweeps.spec.spec_text import GOOD_DATA, ROOT, good, refusal

RATE = "  learning_rate: {grid_search: [0.1, 1, 8]}"
SPEC = ROOT / "specs" / "digits_conditional.yaml"


def rate(text):
    """A specification whose learning rate is said so."""
    return good(RATE, f"  learning_rate: {text}")


def test_each_value_of_another_field_has_its_domain():
    spec = parse_spec(rate("{by: optimizer, sgd: {grid_search: [1, 8]}, adam: 0.1}"))
    domain = spec.search_space.learning_rate
    assert domain == ConditionalDomain(
        "optimizer",
        (("adam", Domain("constant", (0.1,))), ("sgd", Domain("grid_search", (1.0, 8.0)))),
    )
    assert domain.given({"optimizer": "adam"}) == Domain("constant", (0.1,))
    assert (domain.values, domain.bounds()) == ((0.1, 1.0, 8.0), (0.1, 8.0))
    assert parse_spec(spec.canonical_json()) == spec
    assert spec.num_listed == 2 * (2 + 1)


def test_else_is_for_the_values_that_are_left():
    spec = parse_spec(rate("{else: 0.1, by: optimizer, sgd: {uniform: [1, 8]}}"))
    domain = spec.search_space.learning_rate
    assert domain.given({"optimizer": "adam"}) == Domain("constant", (0.1,))
    assert domain.given({"optimizer": "sgd"}).kind == "uniform"


def test_numbers_are_told_apart_as_numbers():
    spec = parse_spec(rate("{by: expected_batch_size, 64.0: 1, 2.56e2: 4}"))
    domain = spec.search_space.learning_rate
    assert [domain.given({"expected_batch_size": size}).values for size in (64, 256.0)] == [
        (1.0,),
        (4.0,),
    ]
    same = parse_spec(rate("{by: expected_batch_size, 256: 4, '64': 1}"))
    assert same.spec_hash() == spec.spec_hash()


def test_the_example_is_read():
    spec = load_spec(SPEC)
    assert (spec.num_listed, spec.search.repeats) == (3 + 3 + 2, 3)


def test_what_reads_all_values_of_a_field_reads_those_of_all_branches():
    steps = "{by: optimizer, sgd: 20, adam: {grid_search: [50, 150]}}"
    text = refusal(good("iterations: 150", f"iterations: {steps}"))
    assert "report_every_steps: 25 exceeds the fewest iterations of a trial, 20" in text
    noise = "{by: optimizer, sgd: 2.0, adam: calibrated}"
    text = good("noise_multiplier: 2.0", f"noise_multiplier: {noise}")
    assert "privacy.trial_epsilon: is missing" in refusal(text.replace("per_trial", "declared", 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{by: 3, sgd: 1}", "14:23: search_space.learning_rate.by: 3 is not allowed; allowed: a "),
        (
            "{by: optimiser, sgd: 1}",
            "learning_rate.by: 'optimiser' is no field of search_space (did you mean optimizer?)",
        ),
        (
            "{by: learning_rate, 1: 1}",
            "learning_rate.by: learning_rate depends on a field, too; allowed: a field that is",
        ),
        (
            "{by: optimizer, sgd: 1}",
            "search_space.learning_rate: says nothing of optimizer adam; allowed: a domain for "
            "each value that optimizer may have, or else for the rest of them",
        ),
        ("{by: optimizer}", "learning_rate: says nothing of optimizer sgd, adam; allowed"),
        (
            "{by: optimizer, sgd: 1, adam: 1, lamb: 1}",
            "14:51: search_space.learning_rate.lamb: optimizer is never that; allowed: sgd, adam",
        ),
        (
            "{by: optimizer, sgd: 1, adam: 1, else: 1}",
            "learning_rate.else: is left with no value of optimizer; allowed: only what can be",
        ),
        (
            "{by: expected_batch_size, 64: 1, 64.0: 2, 256: 1}",
            "learning_rate.'64.0': is given twice; allowed: once for each value",
        ),
        (
            "{by: expected_batch_size, 64: 1, 256: {grid_search: [1, 2]}}",
            "learning_rate.256: grid_search is not allowed where expected_batch_size is drawn",
        ),
        (
            "{by: optimizer, sgd: {uniform: [2, 1]}, adam: -1}",
            "search_space.learning_rate.sgd.uniform: [2, 1] is not allowed; allowed: [low, high]",
        ),
        (
            "{by: optimizer, sgd: {uniform: [2, 1]}, adam: -1}",
            "search_space.learning_rate.adam: -1 is not allowed; allowed: a number > 0, or one",
        ),
        (
            "{by: optimizer, sgd: {by: iterations, 150: 1}, adam: 1}",
            "search_space.learning_rate.sgd: 2 domains are given (by, 150); allowed: a number",
        ),
    ],
)
def test_what_does_not_hold_together_is_refused_where_it_stands(text, message):
    assert message in refusal(rate(text))


def test_a_field_cannot_depend_on_one_that_depends_or_that_is_a_range():
    chain = rate("{by: optimizer, sgd: 1, adam: 2}").replace(
        "l2_clip_norm: 1.0", "l2_clip_norm: {by: learning_rate, 1: 1, 2: 1}"
    )
    assert "l2_clip_norm.by: learning_rate depends on a field, too; allowed" in refusal(chain)
    drawn = good("iterations: 150", "iterations: {randint: [100, 200]}").replace(
        "l2_clip_norm: 1.0", "l2_clip_norm: {by: iterations, else: 1}"
    )
    assert "l2_clip_norm.by: iterations is drawn from a range; allowed" in refusal(drawn)


def test_a_cycle_is_refused():
    text = rate("{by: l2_clip_norm, 1: 1}")
    text = text.replace("l2_clip_norm: 1.0", "l2_clip_norm: {by: learning_rate, 1: 1}")
    found = refusal(text)
    assert "learning_rate.by: l2_clip_norm depends on a field, too" in found
    assert "l2_clip_norm.by: learning_rate depends on a field, too" in found


def searching(search, space=None):
    data = copy.deepcopy(GOOD_DATA)
    data["search_space"].update(
        {
            "optimizer": {"choice": ["sgd", "adam"]},
            "learning_rate": {"by": "optimizer", "sgd": {"uniform": [1, 4]}, "adam": 0.5},
            "expected_batch_size": 64,
            **(space or {}),
        }
    )
    data["scheduler"] = {"name": "fifo"}
    return json.dumps({**data, "search": search})


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"optimizer": "sgd", "learning_rate": 2}, ""),
        ({"optimizer": "adam", "learning_rate": 0.5}, ""),
        (
            {"optimizer": "adam", "learning_rate": 2},
            "points_to_evaluate[0].learning_rate: 2 is not in the search space where optimizer is "
            "adam; allowed: in 0.5",
        ),
        # It would have to hold whichever is drawn.
        (
            {"learning_rate": 2},
            "points_to_evaluate[0].learning_rate: 2 is not in the search space where optimizer is "
            "adam; allowed: in 0.5",
        ),
        (
            {"optimizer": "lamb", "learning_rate": 2},
            'points_to_evaluate[0].optimizer: "lamb" is not in the search space; allowed: in',
        ),
    ],
)
def test_a_point_lies_in_the_branch_that_it_chooses(point, message):
    text = searching({"num_samples": 2, "points_to_evaluate": [point]})
    if message:
        with pytest.raises(SpecError) as caught:
            parse_spec(text)
        assert message in str(caught.value)
    else:
        assert parse_spec(text).num_listed == 2


def test_a_search_that_learns_takes_no_grid_in_a_branch():
    space = {"optimizer": "sgd", "learning_rate": {"by": "optimizer", "sgd": {"grid_search": [1]}}}
    with pytest.raises(SpecError, match=r"learning_rate\.sgd: grid_search is not allowed with op"):
        parse_spec(searching({"name": "optuna", "num_samples": 2}, space))


def test_the_schema_describes_it():
    validator = jsonschema.Draft202012Validator(json_schema())
    good_data = copy.deepcopy(GOOD_DATA)
    for value, fits in [
        ({"by": "optimizer", "sgd": {"uniform": [1, 2]}, "else": 1}, True),
        ({"by": "optimizer", "sgd": {"uniform": [1]}}, False),
        ({"by": "optimizer"}, False),
        ({"by": "optimizer", "sgd": {"by": "iterations", "150": 1}}, False),
        ({"sgd": 1, "adam": 1}, False),
    ]:
        good_data["search_space"]["learning_rate"] = value
        assert validator.is_valid(good_data) == fits, value
