"""The search space: how many settings, in which order, and what a trial is then given."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.errors import SpecError
from sweeps.search_space import (
    Hyperparameters,
    candidates,
    expand,
    public_num_units,
    trial_config,
    value_at,
)
from sweeps.spec.domains import Domain, step_indices
from sweeps.spec.reading import load_spec, parse_spec
from trainer.config import DataConfig, ModelConfig, TrialConfig

DIGITS = Path(__file__).resolve().parents[2] / "specs" / "digits.yaml"

FIELDS = {
    "optimizer": "sgd",
    "learning_rate": "1",
    "expected_batch_size": "64",
    "iterations": "100",
    "noise_multiplier": "2",
    "l2_clip_norm": "1",
}


def spec_of(num_samples=1, seed=0, relation="zero_out", declared="null", **fields):
    space = "\n".join(f"  {name}: {text}" for name, text in {**FIELDS, **fields}.items())
    return parse_spec(
        f"""
version: 1
name: s
data: {{name: digits, declared_num_examples: {declared}}}
model: {{name: mlp, hidden_sizes: [8], dtype: bfloat16}}
privacy:
  policy: per_trial
  target_epsilon: 8
  target_delta: 1e-5
  neighboring_relation: {relation}
search_space:
{space}
search: {{num_samples: {num_samples}, seed: {seed}}}
report_every_steps: 1
"""
    )


def test_constants_give_one_setting():
    assert expand(spec_of()) == [
        Hyperparameters(
            optimizer="sgd",
            learning_rate=1.0,
            expected_batch_size=64.0,
            iterations=100,
            noise_multiplier=2.0,
            l2_clip_norm=1.0,
        )
    ]


def test_the_grid_is_ordered_with_learning_rate_fastest():
    settings = expand(
        spec_of(
            optimizer="{grid_search: [adam, sgd]}",
            learning_rate="{grid_search: [8, 1]}",
            expected_batch_size="{grid_search: [64, 32]}",
            noise_multiplier="{grid_search: [2, calibrated]}",
        )
    )
    found = [
        (s.noise_multiplier, s.expected_batch_size, s.optimizer, s.learning_rate) for s in settings
    ]
    assert found == [
        (noise, batch, optimizer, rate)
        for noise in (2.0, "calibrated")
        for batch in (64.0, 32.0)
        for optimizer in ("adam", "sgd")
        for rate in (8.0, 1.0)
    ]


def test_repeats_of_a_grid_are_kept():
    settings = expand(spec_of(num_samples=3, learning_rate="{grid_search: [1, 2]}"))
    assert [s.learning_rate for s in settings] == [1.0, 2.0] * 3


def test_random_domains_are_drawn_anew_for_each_setting():
    settings = expand(
        spec_of(
            num_samples=3,
            optimizer="{grid_search: [sgd, adam]}",
            learning_rate="{loguniform: [0.01, 10]}",
        )
    )
    assert [s.optimizer for s in settings] == ["sgd", "adam"] * 3
    assert len({s.learning_rate for s in settings}) == 6


def test_draws_depend_on_the_seed_alone():
    domain = "{loguniform: [0.01, 10]}"
    first = expand(spec_of(num_samples=5, learning_rate=domain))
    assert expand(spec_of(num_samples=5, learning_rate=domain)) == first
    assert expand(spec_of(num_samples=5, learning_rate=domain, seed=1)) != first
    assert expand(spec_of(num_samples=3, learning_rate=domain)) == first[:3]


def test_a_change_to_one_field_leaves_the_draws_of_others():
    def rates(**fields):
        found = expand(spec_of(num_samples=5, learning_rate="{uniform: [1, 2]}", **fields))
        return [s.learning_rate for s in found]

    assert rates(l2_clip_norm="{uniform: [1, 2]}", iterations="{randint: [5, 9]}") == rates()


def test_types_are_those_of_a_trial():
    (setting,) = expand(
        spec_of(expected_batch_size="{randint: [32, 64]}", iterations="{lograndint: [10, 20]}")
    )
    assert type(setting.expected_batch_size) is float
    assert type(setting.iterations) is int
    assert type(setting.learning_rate) is float


def test_nothing_is_drawn_from_a_grid():
    with pytest.raises(ValueError, match=r"domain\.kind='grid_search'"):
        value_at(Domain("grid_search", (1.0,)), 0.5)


def test_whole_domains_exclude_high_and_reach_both_ends():
    for kind in ("randint", "lograndint"):
        rng = np.random.default_rng(0)
        drawn = {value_at(Domain(kind, (3, 7)), rng.random()) for _ in range(300)}
        assert drawn == {3, 4, 5, 6}


def test_quniform_reaches_every_multiple_alike():
    rng = np.random.default_rng(0)
    drawn = [value_at(Domain("quniform", (0.25, 0.5, 0.1)), rng.random()) for _ in range(3000)]
    counts = {value: drawn.count(value) for value in set(drawn)}
    assert set(counts) == {0.3, 0.4, 0.5}
    # Each count has mean 1000 and standard deviation 26; 5 of those do not occur by chance.
    assert all(abs(count - 1000) < 5 * 26 for count in counts.values())


def test_loguniform_is_even_in_the_logarithm():
    rng = np.random.default_rng(0)
    drawn = [value_at(Domain("loguniform", (0.01, 100.0)), rng.random()) for _ in range(3000)]
    below = sum(float(value) < 1 for value in drawn)
    # Half of them, give or take 5 standard deviations of 27.
    assert abs(below - 1500) < 5 * 27


positive = st.floats(1e-6, 1e6)
pairs = st.tuples(positive, positive).filter(lambda p: p[0] < p[1])
whole_pairs = st.tuples(st.integers(1, 10**9), st.integers(1, 10**9)).filter(lambda p: p[0] < p[1])


@st.composite
def quantized(draw_):
    low, high = draw_(pairs)
    step = draw_(st.floats(1e-3, 1e3))
    try:
        step_indices(low, high, step)
    except ValueError:
        step = low
    return Domain("quniform", (low, high, step))


@settings(derandomize=True, deadline=None)
@given(
    st.one_of(
        st.builds(Domain, st.sampled_from(["uniform", "loguniform"]), pairs),
        st.builds(Domain, st.sampled_from(["randint", "lograndint"]), whole_pairs),
        quantized(),
    ),
    st.integers(0, 2**31 - 1),
)
def test_draws_stay_inside_their_bounds(domain, seed):
    low, high = domain.bounds()
    rng = np.random.default_rng(seed)
    for _ in range(10):
        value = value_at(domain, rng.random())
        assert low <= value <= high
        if domain.kind == "quniform":
            multiple = value / domain.values[2]
            # Twelve digits are kept, and an end may be off the grid by what Ray Tune forgives.
            assert math.isclose(multiple, round(multiple), rel_tol=1e-8, abs_tol=1e-8)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    st.lists(st.sampled_from(["sgd", "adam", "lamb"]), min_size=1, unique=True),
    st.integers(1, 4),
)
def test_the_count_is_the_product(rates, iterations, optimizers, num_samples):
    spec = spec_of(
        num_samples=num_samples,
        learning_rate=f"{{grid_search: {rates}}}",
        iterations=f"{{grid_search: {iterations}}}",
        optimizer=f"{{grid_search: [{', '.join(optimizers)}]}}",
        l2_clip_norm="{uniform: [1, 2]}",
    )
    product = len(rates) * len(iterations) * len(optimizers) * num_samples
    found = expand(spec)
    assert len(found) == spec.num_listed == product
    assert len(set(found)) == product  # the drawn clip norm tells repeats apart


def test_trial_config():
    spec = spec_of()
    (setting,) = expand(spec)
    assert trial_config(spec, setting, num_units=1437, noise_multiplier=2.0) == TrialConfig(
        data=DataConfig(name="digits"),
        model=ModelConfig(name="mlp", hidden_sizes=(8,), dtype="bfloat16"),
        optimizer="sgd",
        learning_rate=1.0,
        l2_clip_norm=1.0,
        noise_multiplier=2.0,
        sampling_prob=64 / 1437,
        expected_batch_size=64.0,
        iterations=100,
        report_every_steps=1,
        target_delta=1e-5,
        accountant="pld",
        neighboring_relation="zero_out",
        seed=0,
    )


def test_what_is_trained_and_from_where_reaches_the_trial():
    chosen = {
        "trainable": "lora",
        "lora_rank": 4,
        "head_init_scale": 0.0,
        "init_from": "weights.npz",
        "init_is_public": True,
        "fresh_head": True,
    }
    spec = spec_of()
    spec = spec.model_copy(update={"model": spec.model.model_copy(update=chosen)})
    (setting,) = expand(spec)
    config = trial_config(spec, setting, num_units=1437, noise_multiplier=2.0)
    assert config.model == ModelConfig(
        name="mlp", hidden_sizes=(8,), dtype=spec.model.dtype, **chosen
    )


def test_how_the_learning_rate_moves_and_weights_decay_reaches_the_trial():
    spec = spec_of(
        learning_rate_schedule="{grid_search: [cosine, linear]}",
        warmup_steps="{grid_search: [0, 5]}",
        weight_decay="{choice: [0.1]}",
    )
    found = [
        trial_config(spec, setting, num_units=1437, noise_multiplier=2.0)
        for setting in expand(spec)
    ]
    assert [(c.learning_rate_schedule, c.warmup_steps, c.weight_decay) for c in found] == [
        ("cosine", 0, 0.1),
        ("cosine", 5, 0.1),
        ("linear", 0, 0.1),
        ("linear", 5, 0.1),
    ]


def test_a_calibrated_setting_takes_the_noise_it_is_given():
    spec = spec_of(noise_multiplier="calibrated")
    (setting,) = expand(spec)
    config = trial_config(spec, setting, num_units=1437, noise_multiplier=1.25)
    assert config.noise_multiplier == 1.25


def test_noise_that_is_not_the_settings_own_is_refused():
    spec = spec_of()
    (setting,) = expand(spec)
    with pytest.raises(ValueError, match=r"noise_multiplier=1\.0: the setting says 2\.0"):
        trial_config(spec, setting, num_units=1437, noise_multiplier=1.0)


def test_a_batch_larger_than_the_data_set_is_refused():
    spec = spec_of(expected_batch_size="2000")
    (setting,) = expand(spec)
    with pytest.raises(SpecError) as caught:
        trial_config(spec, setting, num_units=1437, noise_multiplier=2.0)
    assert str(caught.value) == (
        "search_space.expected_batch_size: expected_batch_size 2000 exceeds the 1437 examples of "
        "digits train; allowed: at most 1437"
    )


def test_the_whole_data_set_may_be_the_batch():
    spec = spec_of(expected_batch_size="1437")
    (setting,) = expand(spec)
    assert trial_config(spec, setting, num_units=1437, noise_multiplier=2.0).sampling_prob == 1


@pytest.mark.parametrize("size", [None, 0, -1, True, 1.5])
def test_a_public_size_must_be_given(size):
    with pytest.raises(ValueError, match="num_units="):
        public_num_units(spec_of(), size)


def test_a_protected_size_never_reaches_a_config():
    spec = spec_of(relation="add_or_remove_one", declared="1400")
    (setting,) = expand(spec)
    configs = [
        trial_config(spec, setting, num_units=size, noise_multiplier=2.0)
        for size in (None, 10, 1437)
    ]
    assert configs[0].sampling_prob == 64 / 1400
    assert configs[0].neighboring_relation == "add_or_remove_one"
    assert configs[1:] == configs[:1] * 2


def test_every_setting_of_the_example_is_a_trial():
    spec = load_spec(DIGITS)
    for setting in expand(spec):
        config = trial_config(spec, setting, num_units=1437, noise_multiplier=2.0)
        assert config.expected_batch_size == setting.expected_batch_size


def test_settings_are_frozen():
    (setting,) = expand(spec_of())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setting.learning_rate = 2.0  # pyright: ignore[reportAttributeAccessIssue]


def searching(search, **fields):
    """The settings of a specification that searches in some way."""
    text = spec_of(**fields).model_dump(mode="json")
    return parse_spec(json.dumps({**text, "search": search}))


def test_points_come_first_and_the_rest_is_as_without_them():
    fields = {"learning_rate": "{uniform: [1, 2]}", "optimizer": "{grid_search: [sgd, adam]}"}
    points = [{"learning_rate": 1.5}, {"optimizer": "adam", "l2_clip_norm": 1}]
    spec = searching({"num_samples": 4, "points_to_evaluate": points}, **fields)
    found = [(s.optimizer, s.learning_rate) for s in expand(spec)]
    assert len(found) == spec.num_listed == 2 + 1 + 2 * 2
    assert found[:2] == [("sgd", 1.5), ("adam", 1.5)]
    assert [optimizer for optimizer, _ in found[2:]] == ["adam", "sgd", "adam", "sgd", "adam"]
    without = [s.learning_rate for s in expand(searching({"num_samples": 4}, **fields))]
    assert [rate for _, rate in found[2:]] == without[2:7]


def test_quasi_random_draws_cover_each_field_evenly():
    fields = {"learning_rate": "{uniform: [1, 2]}", "l2_clip_norm": "{loguniform: [1, 16]}"}
    spec = searching({"name": "quasi_random", "num_samples": 64, "seed": 3}, **fields)
    rates = [s.learning_rate - 1 for s in expand(spec)]
    norms = [math.log2(s.l2_clip_norm) / 4 for s in expand(spec)]
    for values in (rates, norms):
        # A shifted net: of 64 points each of 16 equal parts has 4, but for those on its borders.
        counts, _ = np.histogram(values, bins=16, range=(0, 1))
        assert counts.min() >= 3
        assert counts.max() <= 5
    both, _, _ = np.histogram2d(rates, norms, bins=4, range=[[0, 1], [0, 1]])
    assert both.min() >= 1, "the fields are not drawn in step"
    shorter = searching({"name": "quasi_random", "num_samples": 5, "seed": 3}, **fields)
    assert expand(shorter) == expand(spec)[:5]
    other = searching({"name": "quasi_random", "num_samples": 5, "seed": 4}, **fields)
    assert expand(other) != expand(shorter)


def test_a_search_that_learns_lists_what_it_begins_with():
    fields = {"learning_rate": "{uniform: [1, 2]}"}
    search = {"name": "optuna", "num_samples": 50, "points_to_evaluate": [{"learning_rate": 1.25}]}
    settings = expand(searching(search, **fields))
    assert len(settings) == 10
    assert settings[0].learning_rate == 1.25
    assert len({s.learning_rate for s in settings}) == 10
    assert len(expand(searching({**search, "num_samples": 3}, **fields))) == 3
    assert len(expand(searching({**search, "n_startup_trials": 2}, **fields))) == 2


@given(
    st.sampled_from(["uniform", "loguniform", "quniform", "randint", "lograndint", "choice"]),
    st.floats(0, 1, exclude_max=True),
)
def test_a_domain_contains_what_it_gives(kind, chance):
    values = {"quniform": (0.1, 0.9, 0.1), "choice": ("a", 2.0)}.get(kind, (3, 9))
    domain = Domain(kind, values)
    assert domain.contains(value_at(domain, chance))
    assert not domain.contains(100.0)
    assert not domain.contains("b")


# --- Fields that depend on another one -----------------------------------------------------

PARENTS = {
    "optimizer": ["sgd", "adam", "lamb"],
    "learning_rate_schedule": ["constant", "cosine"],
    "expected_batch_size": [16, 64, "full"],
}
CHILDREN = ["learning_rate", "noise_multiplier", "l2_clip_norm", "weight_decay"]
DRAWN = st.sampled_from(
    [{"uniform": [1, 2]}, {"loguniform": [3, 9]}, {"choice": [4, 5]}, {"quniform": [6, 8, 0.5]}]
)
LISTED = st.one_of(
    st.sampled_from([1, 7.5]),
    st.lists(st.integers(1, 20), min_size=1, max_size=3, unique=True).map(
        lambda values: {"grid_search": values}
    ),
)

ANY = st.one_of(LISTED, DRAWN)


@st.composite
def conditional_spaces(draw_, only_listed=False):
    """Fields of a space, some of which depend on others."""
    fields = {}
    for name, values in PARENTS.items():
        some = draw_(st.lists(st.sampled_from(values), min_size=1, unique=True))
        kinds = ["grid_search"] if only_listed else ["grid_search", "choice"]
        fields[name] = {draw_(st.sampled_from(kinds)): some}
    for name in draw_(st.lists(st.sampled_from(CHILDREN), min_size=1, unique=True)):
        by = draw_(st.sampled_from(sorted(PARENTS)))
        ((kind, values),) = fields[by].items()
        domains = (
            LISTED if only_listed else DRAWN if kind == "choice" else st.one_of(LISTED, DRAWN)
        )
        fields[name] = {"by": by} | {str(value): draw_(domains) for value in values}
    return fields


def space_of(fields, search):
    return searching(search, **{name: json.dumps(domain) for name, domain in fields.items()})


def branch_of(fields, name, values):
    """The domain of a field, as it is stated, where others have some values."""
    domain = fields[name]
    if not isinstance(domain, dict) or "by" not in domain:
        return domain
    value = values[domain["by"]]
    return domain[value if isinstance(value, str) else f"{value:g}"]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(conditional_spaces(), st.sampled_from(["random", "quasi_random"]), st.integers(1, 3))
def test_a_dependent_field_lies_in_its_branch(fields, name, num_samples):
    spec = space_of(fields, {"name": name, "num_samples": num_samples})
    found = expand(spec)
    assert len(found) == spec.num_listed
    for setting in found:
        values = dataclasses.asdict(setting)
        for field, domain in spec.search_space.domains():
            part = domain.given(values)
            assert part.contains(values[field]), (field, values)
            assert part.plain() == branch_of({**spec.model_dump()["search_space"]}, field, values)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(conditional_spaces(only_listed=True))
def test_a_grid_is_the_union_over_the_branches(fields):
    spec = space_of(fields, {"num_samples": 1})
    union = set()
    for parents in itertools.product(*(fields[by]["grid_search"] for by in PARENTS)):
        values = dict(zip(PARENTS, parents, strict=True))
        one = {name: branch_of(fields, name, values) for name in fields} | values
        union.update(expand(space_of(one, {"num_samples": 1})))
    found = expand(spec)
    assert len(found) == len(union) == spec.num_listed
    assert set(found) == union


@settings(derandomize=True, deadline=None, max_examples=60)
@given(conditional_spaces(), st.sampled_from(["random", "quasi_random"]), st.integers(0, 9))
def test_what_depends_on_nothing_is_drawn_as_if_nothing_did(fields, name, seed):
    fields = {**fields, "iterations": {"randint": [10, 1000]}}
    search = {"name": name, "num_samples": 8, "seed": seed}
    alone = {name: domain for name, domain in fields.items() if "by" not in domain}
    free = [name for name, domain in alone.items() if "grid_search" not in domain]

    def drawn(setting):
        return [getattr(setting, name) for name in free]

    with_them, without = expand(space_of(fields, search)), expand(space_of(alone, search))
    assert len(with_them) >= len(without)
    for dependent, other in zip(with_them, without, strict=False):
        assert drawn(dependent) == drawn(other)


def test_quasi_random_covers_each_branch_evenly():
    fields = {
        "optimizer": {"choice": ["sgd", "adam"]},
        "learning_rate": {
            "by": "optimizer",
            "sgd": {"uniform": [1, 2]},
            "adam": {"uniform": [5, 9]},
        },
    }
    found = expand(space_of(fields, {"name": "quasi_random", "num_samples": 64, "seed": 3}))
    sgd = [s.learning_rate - 1 for s in found if s.optimizer == "sgd"]
    adam = [(s.learning_rate - 5) / 4 for s in found if s.optimizer == "adam"]
    for values in (sgd, adam):
        # Half of the points, but for those on the border, and of them a quarter in each quarter.
        counts, _ = np.histogram(values, bins=4, range=(0, 1))
        assert counts.sum() == len(values)
        assert counts.min() >= 7
        assert counts.max() <= 9


def test_a_point_takes_the_place_of_a_dependent_field():
    fields = {
        "optimizer": {"grid_search": ["sgd", "adam"]},
        "learning_rate": {"by": "optimizer", "sgd": {"grid_search": [1, 2, 3]}, "adam": 2},
    }
    points = [{"optimizer": "sgd"}, {"learning_rate": 2}, {"optimizer": "adam"}]
    spec = space_of(fields, {"num_samples": 4, "points_to_evaluate": points})
    found = [(s.optimizer, s.learning_rate) for s in expand(spec)]
    first = [("sgd", 1.0), ("sgd", 2.0), ("sgd", 3.0)]
    assert found == [*first, ("sgd", 2), ("adam", 2), ("adam", 2.0), *first, ("adam", 2.0)]
    assert spec.num_listed == len(found)


def test_the_field_that_others_depend_on_comes_before_them_in_the_grid():
    fields = {
        "optimizer": {"grid_search": ["sgd", "adam"]},
        "noise_multiplier": {"by": "optimizer", "sgd": {"grid_search": [2, 3]}, "adam": 5},
        "l2_clip_norm": {"grid_search": [1, 4]},
    }
    found = expand(space_of(fields, {"num_samples": 1}))
    assert [(s.optimizer, s.noise_multiplier, s.l2_clip_norm) for s in found] == [
        ("sgd", 2.0, 1.0),
        ("sgd", 2.0, 4.0),
        ("sgd", 3.0, 1.0),
        ("sgd", 3.0, 4.0),
        ("adam", 5.0, 1.0),
        ("adam", 5.0, 4.0),
    ]


def test_a_selection_is_reckoned_with_every_branch_that_costs_something():
    fields = {
        "optimizer": {"choice": ["sgd", "adam", "lamb"]},
        "learning_rate": {"by": "optimizer", "sgd": {"uniform": [1, 2]}, "else": 1},
        "noise_multiplier": {"by": "optimizer", "sgd": {"uniform": [3, 4]}, "else": 2},
        "iterations": {"choice": [50, 100]},
    }
    spec = space_of(fields, {})
    privacy = {
        **spec.model_dump(mode="json")["privacy"],
        "policy": "private_selection",
        "accountant": "rdp",
        "selection": {"distribution": "geometric", "mean": 3},
    }
    spec = parse_spec(json.dumps({**spec.model_dump(mode="json"), "privacy": privacy}))
    found = {(s.noise_multiplier, s.iterations) for s in candidates(spec)}
    assert found == {(3.0, 50), (3.0, 100), (2.0, 50), (2.0, 100)}
