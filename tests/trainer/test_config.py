import dataclasses
import json
import math

import pytest

from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.errors import ConfigError

CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="mlp", hidden_sizes=(8, 4)),
    optimizer="adam",
    learning_rate=0.1,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=0.1,
    expected_batch_size=64,
    iterations=10,
    report_every_steps=5,
    target_delta=1e-5,
)

NOT_POSITIVE = [0, -1.0, math.nan, math.inf, "1", True, None]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("learning_rate", "l2_clip_norm", "noise_multiplier", "expected_batch_size")
        for value in NOT_POSITIVE
    ]
    + [("sampling_prob", value) for value in (*NOT_POSITIVE, 1.5)]
    + [("target_delta", value) for value in (*NOT_POSITIVE, 1e-11, 1.0, 1.5)]
    + [
        (field, value)
        for field in ("iterations", "report_every_steps")
        for value in (0, -1, 1.0, True, "3")
    ]
    + [
        ("optimizer", "sdg"),
        ("accountant", "gdp"),
        ("neighboring_relation", "replace_one"),
        ("learning_rate_schedule", "step"),
    ]
    + [("weight_decay", value) for value in (-1e-4, math.inf, math.nan, "0", True)]
    + [(field, value) for field in ("seed", "warmup_steps") for value in (-1, 1.0, True)],
)
def test_a_field_that_is_not_allowed_is_named_with_its_value(field, value):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(CONFIG, **{field: value})
    assert str(caught.value).startswith(f"{field}={value!r}: allowed is")


@pytest.mark.parametrize("name", ["../etc", "Digits", "digits\n", "a/../b", "", "gs://x", "a b"])
def test_data_set_names_cannot_leave_their_folder(name):
    with pytest.raises(ConfigError, match="allowed is a TFDS name"):
        DataConfig(name=name)


@pytest.mark.parametrize("sizes", [(), (0,), (1.5,), [8]])
def test_layer_sizes_are_whole_and_positive(sizes):
    with pytest.raises(ConfigError, match="hidden_sizes"):
        ModelConfig(name="mlp", hidden_sizes=sizes)


@pytest.mark.parametrize(
    ("field", "value"),
    [("trainable", "half"), ("trainable", None)]
    + [("lora_rank", value) for value in (0, -1, 2.0, True, "8")]
    + [("head_init_scale", value) for value in (-0.5, math.nan, math.inf, "1", True, None)]
    + [(field, value) for field in ("init_is_public", "fresh_head") for value in (1, "no", None)],
)
def test_a_field_of_the_model_that_is_not_allowed_is_named_with_its_value(field, value):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(name="mlp", **{field: value})
    assert str(caught.value).startswith(f"model.{field}={value!r}: allowed is")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": 4}, r"model.lora_rank=4: nothing reads it with trainable all; allowed: 8"),
        ({"lora_rank": 4, "trainable": "head"}, "with trainable head"),
        ({"fresh_head": True}, "model.fresh_head=True: nothing reads it without init_from"),
        ({"init_is_public": True}, "model.init_is_public=True: nothing reads it without init_f"),
    ],
)
def test_what_would_have_no_effect_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(name="mlp", **fields)


def test_a_model_without_layers_to_update_is_refused_when_it_is_read():
    with pytest.raises(ConfigError, match=r"model.trainable='lora': resnet18 has no dense layer"):
        ModelConfig(name="resnet18", trainable="lora")


def test_what_is_trained_survives_json():
    model = ModelConfig(
        name="mlp",
        trainable="lora",
        lora_rank=2,
        head_init_scale=0.0,
        init_from="weights.npz",
        init_is_public=True,
        fresh_head=True,
    )
    config = dataclasses.replace(CONFIG, model=model)
    assert TrialConfig.from_json(config.to_json()) == config


def test_json_round_trip():
    data = json.loads(json.dumps(CONFIG.to_json()))
    assert TrialConfig.from_json(data) == CONFIG


@pytest.mark.parametrize(("optimizer", "decay"), [("adamw", 1e-4), ("lamb", 0.0)])
def test_a_configuration_from_before_weight_decay_was_a_choice(optimizer, decay):
    data = dataclasses.replace(CONFIG, optimizer=optimizer).to_json()
    for field in ("weight_decay", "learning_rate_schedule", "warmup_steps"):
        del data[field]
    want = dataclasses.replace(CONFIG, optimizer=optimizer, weight_decay=decay)
    assert TrialConfig.from_json(data) == want


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("noise_multiplier"),
        lambda data: data.update(extra=1),
        lambda data: data["model"].pop("name"),
        lambda data: data.update(data=None),
    ],
)
def test_json_of_something_else_is_refused(change):
    data = CONFIG.to_json()
    change(data)
    with pytest.raises(ConfigError):
        TrialConfig.from_json(data)
