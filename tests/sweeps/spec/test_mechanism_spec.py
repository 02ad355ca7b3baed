"""Mechanism, augmentation, averaging and full batches: what a spec takes, and what it refuses."""

import dataclasses

import pytest

from accounting import BandedMatrixFactorizationMechanism, DpSgdMechanism, TruncatedDpSgdMechanism
from sweeps.errors import SpecError
from sweeps.search_space import expand, trial_config
from sweeps.spec.augmentation_spec import AugmentationSpec
from sweeps.spec.averaging_spec import AveragingSpec
from sweeps.spec.mechanism_spec import MechanismSpec
from sweeps.spec.reading import parse_spec
from trainer.config import DataConfig
from trainer.config_sections import AugmentationConfig, AveragingConfig, MechanismConfig
from trainer.training.plan import mechanism_of

SPEC = """\
version: 1
name: s
data: {data}
model: {{name: mlp}}
privacy: {{policy: per_trial, target_epsilon: 8, target_delta: 1e-5{privacy}}}
search_space:
  optimizer: {optimizer}
  learning_rate: 1
  expected_batch_size: {batch}
  iterations: {iterations}
  noise_multiplier: 2
  l2_clip_norm: 1
"""


def text(
    more="", *, data="{name: digits}", privacy="", optimizer="sgd", batch="64", iterations="100"
):
    head = SPEC.format(
        data=data, privacy=privacy, optimizer=optimizer, batch=batch, iterations=iterations
    )
    return f"{head}{more}\n"


def parse(*args, **kwargs):
    spec = parse_spec(text(*args, **kwargs), source="x.yaml")
    assert parse_spec(spec.canonical_json()) == spec
    return spec


def config_of(spec, num_units: int | None = 1437):
    (setting,) = expand(spec)
    return trial_config(spec, setting, num_units=num_units, noise_multiplier=2.0)


def test_left_out_they_do_nothing():
    config = config_of(parse())
    assert config.mechanism == MechanismConfig()
    assert config.augmentation == AugmentationConfig()
    assert config.averaging == AveragingConfig()


@pytest.mark.parametrize(
    ("section", "config", "beyond"),
    [
        (MechanismSpec, MechanismConfig, {"num_units"}),  # of the data, which the spec names
        (AugmentationSpec, AugmentationConfig, set()),
        (AveragingSpec, AveragingConfig, set()),
    ],
)
def test_their_fields_and_defaults_are_those_of_a_trial(section, config, beyond):
    names = {field.name for field in dataclasses.fields(config)}
    assert set(section.model_fields) == names - beyond
    assert config(**section().model_dump()) == config()


def test_all_of_it_reaches_the_trial():
    spec = parse(
        "mechanism: {bands: 4}\n"
        "augmentation: {views: 8, flip: true, crop_padding: 4}\n"
        "averaging: {ema_decay: 0.99, polyak: true}",
        data="{name: digits, placement: streamed}",
        optimizer="scale_then_privatize",
    )
    config = config_of(spec)
    assert config.data == DataConfig(name="digits", placement="streamed")
    assert config.mechanism == MechanismConfig(bands=4)
    assert config.augmentation == AugmentationConfig(views=8, flip=True, crop_padding=4)
    assert config.averaging == AveragingConfig(ema_decay=0.99, polyak=True)
    assert config.optimizer == "scale_then_privatize"


def test_a_mirrored_example_needs_no_second_view():
    assert config_of(parse("augmentation: {flip: true}")).augmentation.views == 1


def test_bands_draw_from_one_group_after_the_other():
    config = config_of(parse("mechanism: {bands: 3}", iterations="101"))
    assert config.expected_batch_size == 64
    assert config.sampling_prob == 64 * 3 / 1437
    assert mechanism_of(config) == BandedMatrixFactorizationMechanism(
        noise_multiplier=2.0,
        sampling_prob=64 * 3 / 1437,
        iterations=101,
        bands=3,
        neighboring_relation="zero_out",
    )


def test_a_whole_group_may_be_the_batch_and_no_more():
    assert config_of(parse("mechanism: {bands: 3}", batch="479")).sampling_prob == 1
    with pytest.raises(SpecError) as caught:
        config_of(parse("mechanism: {bands: 3}", batch="480"))
    assert str(caught.value) == (
        "search_space.expected_batch_size: expected_batch_size 480 exceeds a group, one of 3 into "
        "which mechanism.bands splits the 1437 examples of digits train; allowed: at most 479"
    )


def test_truncation_reckons_with_the_public_number():
    config = config_of(parse("mechanism: {truncated_batch_size: 128}"))
    assert config.mechanism.num_units == 1437
    assert mechanism_of(config) == TruncatedDpSgdMechanism(
        noise_multiplier=2.0,
        sampling_prob=64 / 1437,
        iterations=100,
        num_examples=1437,
        truncated_batch_size=128,
    )


def test_users_are_counted_where_users_are_protected():
    data = "{name: digits, user_feature: patient}"
    spec = parse("mechanism: {examples_per_user: 4, truncated_batch_size: 128}", data=data)
    assert spec.privacy_unit == "user"
    config = config_of(spec, num_units=500)
    assert config.data.user_feature == "patient"
    assert (config.sampling_prob, config.mechanism.num_units) == (64 / 500, 500)
    assert config.mechanism.examples_per_user == 4
    assert mechanism_of(config).privacy_unit == "user"
    hidden = parse(
        "mechanism: {examples_per_user: 4}",
        data="{name: digits, user_feature: patient, declared_num_examples: 640}",
        privacy=", neighboring_relation: add_or_remove_one",
    )
    assert config_of(hidden, num_units=None).sampling_prob == 0.1


def test_full_is_everybody_in_every_step():
    config = config_of(parse(batch="full"))
    assert (config.expected_batch_size, config.sampling_prob) == (1437.0, 1.0)
    assert mechanism_of(config) == DpSgdMechanism.full_batch(
        noise_multiplier=2.0, iterations=100, neighboring_relation="zero_out"
    )
    declared = parse(
        batch="full",
        data="{name: digits, declared_num_examples: 1000}",
        privacy=", neighboring_relation: add_or_remove_one",
    )
    config = config_of(declared, num_units=None)
    assert (config.expected_batch_size, config.sampling_prob) == (1000.0, 1.0)


def test_full_stands_in_lists_beside_numbers():
    spec = parse(batch="{grid_search: [64, full]}")
    assert [setting.expected_batch_size for setting in expand(spec)] == [64.0, "full"]
    assert [
        trial_config(spec, setting, num_units=1437, noise_multiplier=2.0).sampling_prob
        for setting in expand(spec)
    ] == [64 / 1437, 1.0]
    (drawn,) = expand(parse(batch="{choice: [full]}"))
    assert drawn.expected_batch_size == "full"


BAD = [
    # Of a section by itself.
    (text("mechanism: {bands: 0}"), "mechanism.bands: 0 is not allowed; allowed: a whole number"),
    (text("mechanism: {bands: 2.0}"), "mechanism.bands: 2.0 is not allowed; allowed: a whole n"),
    (text("mechanism: {band: 2}"), "mechanism.band: unknown key (did you mean bands?)"),
    (
        text("mechanism: {num_units: 5}"),
        "mechanism.num_units: unknown key",
    ),
    (
        text("mechanism: {truncated_batch_size: 0}"),
        "mechanism.truncated_batch_size: 0 is not allowed; allowed: null or a whole number >= 1",
    ),
    (
        text("mechanism: {bands: 2, truncated_batch_size: 128}"),
        "x.yaml:13:45: mechanism.truncated_batch_size: 128 is not allowed with 2 bands, for their",
    ),
    (
        text("augmentation: {views: 2}"),
        "x.yaml:13:23: augmentation.views: 2 is not allowed without flip and crop_padding, for",
    ),
    (
        text("augmentation: {crop_padding: 65}"),
        "augmentation.crop_padding: 65 is not allowed; allowed: a whole number from 0 to 64",
    ),
    (text("augmentation: {flip: 1}"), "augmentation.flip: 1 is not allowed; allowed: true or f"),
    (
        text("averaging: {ema_decay: 1}"),
        "averaging.ema_decay: 1 is not allowed; allowed: null or a number in (0, 1)",
    ),
    (text("averaging: {ema_decay: .nan}"), "averaging.ema_decay: nan is not allowed; allowed"),
    (
        text(data="{name: digits, placement: gpu}"),
        "x.yaml:3:33: data.placement: 'gpu' is not allowed; allowed: one of auto, device, stre",
    ),
    (
        text(data='{name: digits, user_feature: ""}'),
        "x.yaml:3:36: data.user_feature: '' is not allowed; allowed: null or a feature's name",
    ),
    (text(batch="all"), "'all' is not allowed; allowed: a number >= 1 or the word full, or one"),
    (text(batch="{uniform: [1, full]}"), "expected_batch_size.uniform[1]: 'full' is not allowed"),
    # Of what does not go together.
    (
        text("mechanism: {bands: 8}\nreport_every_steps: 5", iterations="{choice: [100, 7]}"),
        "mechanism.bands: 8 exceeds the fewest iterations of a trial, 7; allowed: a whole number",
    ),
    (
        text("mechanism: {bands: 2}\nclipping: {mode: quantile}"),
        "x.yaml:14:18: clipping.mode: quantile is not allowed with 2 bands, for it reckons with",
    ),
    (
        text("mechanism: {bands: 2}", optimizer="{choice: [sgd, dp_adam_bc]}"),
        "search_space.optimizer: dp_adam_bc is not allowed with 2 bands, for it reckons with",
    ),
    (
        text("mechanism: {bands: 2}", batch="{choice: [64, full]}"),
        "search_space.expected_batch_size: full is not allowed with 2 bands, for each step draws",
    ),
    (
        text("mechanism: {truncated_batch_size: 1437}", batch="full"),
        "search_space.expected_batch_size: full is not allowed with truncated_batch_size 1437",
    ),
    (
        text("mechanism: {truncated_batch_size: 128}", privacy=", accountant: rdp"),
        "mechanism.truncated_batch_size: 128 is not allowed with accountant rdp, which has no "
        "cost of truncated batches; allowed: null, or pld in privacy.accountant",
    ),
    (
        text("mechanism: {truncated_batch_size: 128}").replace("per_trial", "open"),
        "which has no cost of truncated batches; allowed: null, or per_trial or declared in ",
    ),
    (
        text(
            "mechanism: {truncated_batch_size: 128}",
            data="{name: digits, declared_num_examples: 1400}",
            privacy=", neighboring_relation: add_or_remove_one",
        ),
        "mechanism.truncated_batch_size: 128 is not allowed under add_or_remove_one, which protec",
    ),
    (
        text("mechanism: {examples_per_user: 3}"),
        "mechanism.examples_per_user: 3 is not allowed, for without data.user_feature nobody's",
    ),
    (
        text(data="{name: digits, user_feature: patient}"),
        "mechanism.examples_per_user: is missing; allowed: a whole number >= 1. With data.user_fe",
    ),
    (
        text(
            "mechanism: {examples_per_user: 3}",
            data="{name: digits, user_feature: patient, declared_num_examples: 50}",
            privacy=", neighboring_relation: add_or_remove_one",
            batch="{choice: [full, 64]}",
        ),
        "search_space.expected_batch_size: 64 exceeds the 50 declared users; allowed: at most",
    ),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=[message[:70] for _, message in BAD])
def test_what_is_not_allowed_is_said_with_its_place(spec, message):
    with pytest.raises(SpecError) as caught:
        parse_spec(spec, source="x.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("policy", ["open", "private_selection"])
def test_bands_go_with_every_policy(policy):
    more = "mechanism: {bands: 2}"
    selection = "" if policy == "open" else ", selection: {distribution: geometric, mean: 3}"
    source = text(more, privacy=selection).replace("per_trial", policy)
    assert parse_spec(source).mechanism.bands == 2
