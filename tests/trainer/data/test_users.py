"""Whose examples are where: by a feature whose values never come out."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.trainer.data.prepared import FEATURES, examples, prepare
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import MechanismConfig
from trainer.data import datasets, users
from trainer.errors import DatasetError
from trainer.weights.checkpoints import config_digest

TEXT = tfds.features.Text()
WHOLE = tfds.features.Scalar(dtype=np.int64)
TRAIN = ["bea", "al", "bea", "cy", "al", "bea"] * 4
HELD_OUT = ["dee", "eve"] * 3
NUMBERS = {name: 1000 + i for i, name in enumerate(("al", "bea", "cy", "dee", "eve"))}


@pytest.fixture(autouse=True)
def silent():
    tfds.disable_progress_bar()


def write(home, train, held_out, kind=TEXT):
    rows = examples(patient=[*train, *held_out])
    splits = {"train": rows[:24], "test": rows[24:]}
    return prepare(home, features={**FEATURES, "patient": kind}, splits=splits)


def config(**more):
    return DataConfig(name="shapes", user_feature="patient", **more)


@pytest.mark.parametrize("kind", [TEXT, WHOLE], ids=["text", "whole number"])
def test_positions_of_everybody(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(users, "_BATCH", 5)
    train, held_out = (
        [NUMBERS[name] for name in column] if kind is WHOLE else column
        for column in (TRAIN, HELD_OUT)
    )
    write(tmp_path, train, held_out, kind)
    opened = datasets.open_examples(config(), tmp_path)
    positions = opened.user_positions
    assert opened.info.num_users == 3
    assert positions is not None
    assert (positions.dtype, positions.shape) == (np.int32, (3, 12))
    for row, name in zip(positions, ("bea", "al", "cy"), strict=True):
        expected = [i for i, owner in enumerate(TRAIN) if owner == name]
        assert row.tolist() == expected + [-1] * (12 - len(expected))
    loaded = datasets.load(config(), tmp_path).user_positions
    assert loaded is not None
    assert np.array_equal(loaded, positions)


def test_without_a_feature_nobody_is_told_apart(tmp_path):
    write(tmp_path, TRAIN, HELD_OUT)
    opened = datasets.open_examples(DataConfig(name="shapes"), tmp_path)
    assert opened.info.num_users is opened.user_positions is None
    described = datasets.describe(config(), tmp_path)
    assert described.num_users == 3
    assert described.fingerprint == opened.info.fingerprint


def test_people_of_a_part_of_a_split(tmp_path):
    write(tmp_path, TRAIN, HELD_OUT)
    opened = datasets.open_examples(config(train_split="train[1:4]"), tmp_path)
    assert opened.user_positions is not None
    assert opened.user_positions.tolist() == [[0], [1], [2]]


def test_splits_that_share_somebody_are_refused_without_a_name(tmp_path):
    write(tmp_path, TRAIN, [*HELD_OUT[:5], "cy"])
    with pytest.raises(DatasetError, match="eval_split has examples of people") as caught:
        datasets.describe(config(), tmp_path)
    assert caught.value.field == "eval_split"
    assert not any(name in str(caught.value).split() for name in (*TRAIN, *HELD_OUT))
    assert not any(character.isdigit() for character in str(caught.value))


@pytest.mark.parametrize("key", ["picture", "kindly", "", "patient/x"])
def test_a_feature_that_names_nobody(tmp_path, key):
    write(tmp_path, TRAIN, HELD_OUT)
    with pytest.raises(DatasetError, match=r"a whole number among \['kind', 'patient'") as caught:
        datasets.describe(DataConfig(name="shapes", user_feature=key), tmp_path)
    assert caught.value.field == "user_feature"


def test_an_example_of_nobody(tmp_path):
    write(tmp_path, [*TRAIN[:23], ""], HELD_OUT)
    with pytest.raises(DatasetError, match="an example is nobody's"):
        datasets.describe(config(), tmp_path)


def test_a_trial_without_the_feature_keeps_its_digest():
    def digest(data, examples_per_user=None):
        return config_digest(
            TrialConfig(
                data=data,
                model=ModelConfig(name="logistic_regression"),
                optimizer="sgd",
                learning_rate=1.0,
                l2_clip_norm=1.0,
                noise_multiplier=1.0,
                sampling_prob=0.1,
                expected_batch_size=10.0,
                iterations=10,
                report_every_steps=5,
                target_delta=1e-5,
                mechanism=MechanismConfig(examples_per_user=examples_per_user),
            )
        )

    plain = digest(DataConfig(name="shapes"))
    assert plain == "6727c14937f1011446ad763fc9860bb763c6ff9d3ae72808f9b22adb13af1194"
    assert digest(config(), 1) != plain
