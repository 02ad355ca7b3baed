"""The clipping section: what it takes, what it refuses, and what a trial gets of it."""

import dataclasses

import pytest

from sweeps.errors import SpecError
from sweeps.search_space import expand, trial_config
from sweeps.spec.clipping_spec import ClippingSpec
from sweeps.spec.reading import parse_spec
from trainer.config import ClippingConfig
from trainer.errors import ConfigError

SPEC = """\
version: 1
name: s
data: {name: digits}
model: {name: mlp}
privacy: {policy: per_trial, target_epsilon: 8, target_delta: 1e-5}
search_space:
  optimizer: sgd
  learning_rate: 1
  expected_batch_size: 64
  iterations: 100
  noise_multiplier: 2
  l2_clip_norm: 1
"""


def parse(clipping):
    return parse_spec(f"{SPEC}clipping: {clipping}\n", source="x.yaml")


def config_of(spec, noise_multiplier=2.0):
    (setting,) = expand(spec)
    return trial_config(spec, setting, num_units=1437, noise_multiplier=noise_multiplier)


def test_left_out_it_is_flat():
    spec = parse_spec(SPEC)
    assert spec.clipping == ClippingSpec()
    assert config_of(spec).clipping == ClippingConfig()


def test_its_fields_and_defaults_are_those_of_a_trial():
    names = {field.name for field in dataclasses.fields(ClippingConfig)}
    assert set(ClippingSpec.model_fields) == names
    assert ClippingConfig(**ClippingSpec().model_dump()) == ClippingConfig()


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic", "quantile"])
def test_every_mode_reaches_the_trial(mode):
    spec = parse(f"{{mode: {mode}, engine: two_pass, microbatch_size: 16}}")
    assert config_of(spec).clipping == ClippingConfig(
        mode=mode, engine="two_pass", microbatch_size=16
    )
    assert parse_spec(spec.canonical_json()) == spec


def test_the_numbers_of_quantile_reach_the_trial():
    text = "{mode: quantile, target_quantile: 0.7, learning_rate: 0.1, count_noise_stddev: 5}"
    spec = parse(text)
    assert config_of(spec).clipping == ClippingConfig(
        mode="quantile", target_quantile=0.7, learning_rate=0.1, count_noise_stddev=5.0
    )
    assert parse_spec(spec.canonical_json()) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{mode: ghost}", "x.yaml:13:18: clipping.mode: 'ghost' is not allowed; allowed: one of "),
        ("{mod: flat}", "x.yaml:13:12: clipping.mod: unknown key (did you mean mode?); allowed: "),
        (
            "{mode: quantile, target_quantile: 1}",
            "clipping.target_quantile: 1 is not allowed; allowed: a number in (0, 1)",
        ),
        (
            "{mode: quantile, learning_rate: 0}",
            "clipping.learning_rate: 0 is not allowed; allowed: a number > 0",
        ),
        (
            "{mode: quantile, count_noise_stddev: -1}",
            "clipping.count_noise_stddev: -1 is not allowed; allowed: null or a number > 0",
        ),
        (
            "{mode: quantile, count_noise_stddev: .nan}",
            "clipping.count_noise_stddev: nan is not allowed; allowed: null or a number > 0",
        ),
        ("{engine: fast}", "clipping.engine: 'fast' is not allowed; allowed: one of auto, "),
        (
            "{microbatch_size: 0}",
            "clipping.microbatch_size: 0 is not allowed; allowed: null or a whole number >= 1",
        ),
        # What would have no effect.
        (
            "{mode: automatic, target_quantile: 0.7}",
            "x.yaml:13:46: clipping.target_quantile: 0.7 is not allowed with mode automatic, "
            "which does not read it; allowed: 0.5, or mode quantile",
        ),
        (
            "{count_noise_stddev: 3}",
            "clipping.count_noise_stddev: 3 is not allowed with mode flat, which does not read "
            "it; allowed: null, or mode quantile",
        ),
    ],
)
def test_what_is_not_allowed_is_said_with_its_place(text, message):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_a_misplaced_learning_rate_belongs_to_the_search_space():
    with pytest.raises(SpecError, match=r"did you mean search_space\.learning_rate\?"):
        parse_spec(SPEC + "learning_rate: 1\n")


def test_a_count_that_leaves_nothing_makes_no_trial():
    spec = parse("{mode: quantile, count_noise_stddev: 1}")
    with pytest.raises(ConfigError, match=r"clipping\.count_noise_stddev=1\.0: allowed is a num"):
        config_of(spec)
