import dataclasses
import json
import time
from typing import get_args

import numpy as np
import pytest

from tests.trainer.killed_trial import arrays
from trainer.config import ClippingConfig, DataConfig, ModelConfig, ModelName, TrialConfig
from trainer.errors import CheckpointError
from trainer.weights.checkpoints import (
    architecture,
    check_initial_params,
    config_digest,
    load_opt_state,
    load_params,
    read_manifest,
    save_checkpoint,
    write_anew,
)

PARAMS = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
OPT_STATE = ({"momentum": np.ones(3, np.float32)}, ())
UNCHANGED = ("step", "architecture", "dataset_fingerprint", "config_digest")
SHAPE = architecture(ModelConfig(name="mlp"), (8, 8, 1), 10)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "step-00000005"
    save_checkpoint(
        path,
        params=PARAMS,
        opt_state=OPT_STATE,
        step=5,
        architecture=SHAPE,
        dataset_fingerprint="f" * 32,
        config_digest="c" * 64,
    )
    return path


def test_what_was_saved_comes_back(saved):
    manifest = read_manifest(saved)
    assert (manifest.step, manifest.architecture) == (5, SHAPE)
    np.testing.assert_array_equal(
        load_params(saved, PARAMS)["layer"]["kernel"], PARAMS["layer"]["kernel"]
    )
    np.testing.assert_array_equal(load_opt_state(saved, OPT_STATE)[0]["momentum"], np.ones(3))


def test_the_clip_norm_comes_back_to_the_bit(tmp_path):
    clip_norm = float(np.float32(0.1))
    save_checkpoint(
        tmp_path / "step",
        params=PARAMS,
        opt_state=OPT_STATE,
        step=5,
        architecture=SHAPE,
        dataset_fingerprint="f" * 32,
        config_digest="c" * 64,
        l2_clip_norm=clip_norm,
    )
    assert read_manifest(tmp_path / "step").l2_clip_norm == clip_norm


def test_a_checkpoint_from_before_clip_norms_moved_is_read(saved):
    file = saved / "checkpoint.json"
    raw = json.loads(file.read_text())
    del raw["l2_clip_norm"]
    file.write_text(json.dumps({**raw, "format": 1}))
    assert read_manifest(saved).l2_clip_norm is None


def test_a_copy_is_the_same_and_was_written_now(saved, tmp_path):
    many = tuple(np.full(2, index, np.float32) for index in range(12))
    save_checkpoint(
        saved,
        params=PARAMS,
        opt_state=many,
        averages={"ema": PARAMS},
        l2_clip_norm=0.3,
        **{name: getattr(read_manifest(saved), name) for name in UNCHANGED},
    )
    before = time.time_ns()
    copy = tmp_path / "elsewhere" / "step-00000005"
    write_anew(saved, copy)
    ours, theirs = (dataclasses.asdict(read_manifest(path)) for path in (copy, saved))
    assert ours.pop("files") != theirs.pop("files")
    assert ours == theirs
    assert arrays(copy) == arrays(saved)
    for mine, written in zip(load_opt_state(copy, many), many, strict=True):
        np.testing.assert_array_equal(mine, written)
    for path in copy.rglob("_CHECKPOINT_METADATA"):
        told = json.loads(path.read_text())
        assert told["init_timestamp_nsecs"] > before, path
    assert len(list(copy.rglob("_CHECKPOINT_METADATA"))) == 3


def test_a_damaged_checkpoint_is_not_copied(saved, tmp_path):
    (saved / "checkpoint.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is damaged"):
        write_anew(saved, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_nothing_else_is_left_beside_it(saved):
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_again_replaces(saved):
    save_checkpoint(
        saved,
        params=PARAMS,
        opt_state=(),
        step=6,
        architecture=SHAPE,
        dataset_fingerprint="f" * 32,
        config_digest="c" * 64,
    )
    assert read_manifest(saved).step == 6
    assert load_opt_state(saved, ((),)) == ((),)


def test_it_holds_no_key(saved):
    text = "".join(path.read_text(errors="replace") for path in saved.rglob("*") if path.is_file())
    assert "key" not in json.loads((saved / "checkpoint.json").read_text())
    assert "secret" not in text


def flip_a_byte(path):
    file = next(file for file in sorted((path / "params").rglob("*")) if file.stat().st_size > 40)
    raw = bytearray(file.read_bytes())
    raw[20] ^= 1
    file.write_bytes(bytes(raw))


def edit_manifest(**changes):
    def edit(path):
        file = path / "checkpoint.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "damaged, its files differ"),
        (lambda path: (path / "params" / "extra").write_text("x"), "damaged, its files differ"),
        (lambda path: (path / "checkpoint.json").unlink(), "holds no checkpoint.json"),
        (lambda path: (path / "checkpoint.json").write_text("{"), "is damaged"),
        (lambda path: (path / "checkpoint.json").write_text("[1]"), "is damaged"),
        (lambda path: (path / "checkpoint.json").write_bytes(b"\xff\x00"), "is damaged"),
        (edit_manifest(format=99), "has format 99"),
        (edit_manifest(surprise=1), "is damaged"),
    ],
)
def test_damage_is_found(saved, damage, message):
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(saved)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "file").write_text("hello")
    with pytest.raises(CheckpointError, match="no such directory"):
        read_manifest(tmp_path / "file")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        read_manifest(tmp_path)


def test_initial_params_must_fit_and_be_public(saved):
    check_initial_params(saved, SHAPE, "0" * 32)
    with pytest.raises(CheckpointError, match="budget that nobody accounts for"):
        check_initial_params(saved, SHAPE, "f" * 32)
    # A head for other classes starts afresh.
    check_initial_params(saved, {**SHAPE, "num_classes": 3}, "0" * 32)
    for other in (
        architecture(ModelConfig(name="mlp", hidden_sizes=(3,)), (8, 8, 1), 10),
        architecture(ModelConfig(name="mlp"), (8, 8, 3), 10),
        architecture(ModelConfig(name="cnn"), (8, 8, 1), 3),
    ):
        with pytest.raises(CheckpointError, match="hidden_sizes"):
            check_initial_params(saved, other, "0" * 32)


def test_parameters_of_another_form_are_refused(saved):
    with pytest.raises(CheckpointError, match="does not fit"):
        load_params(
            saved, {"layer": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3)}}
        )


def test_parameters_from_before_a_layer_was_renamed_are_refused(saved):
    renamed = {"head": PARAMS["layer"]}
    with pytest.raises(CheckpointError) as refused:
        load_params(saved, renamed)
    assert str(refused.value).endswith(
        "does not fit: it has layer/kernel (2, 3) where head/kernel (2, 3) is needed; allowed is "
        "one whose layers have the same names and shapes"
    )


def test_parameters_of_another_shape_are_refused(saved):
    with pytest.raises(
        CheckpointError, match=r"has layer/kernel \(2, 3\) where layer/kernel \(2, 4"
    ):
        load_params(saved, {"layer": {"kernel": np.zeros((2, 4), np.float32)}})


def test_many_names_that_differ_are_cut(saved):
    with pytest.raises(CheckpointError, match=r"a \(\), b \(\), c \(\) and 2 more is needed"):
        load_params(saved, {name: np.zeros(()) for name in "abcde"})


@pytest.mark.parametrize("name", [*get_args(ModelName), "package.module:Model"])
def test_every_model_has_an_architecture(name):
    found = architecture(ModelConfig(name=name), (8, 8, 1), 10)
    assert (found["model"], found["image_shape"], found["num_classes"]) == (name, [8, 8, 1], 10)


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


def digest(clipping, **changes):
    return config_digest(dataclasses.replace(CONFIG, clipping=clipping, **changes))


def test_flat_trials_of_format_1_can_go_on():
    # What format 1 wrote for this configuration.
    assert (
        digest(ClippingConfig())
        == "ad11f7e8ee197574419a68e255c838cf4ca3f538ed235ff28e9463b410584cf1"
    )


@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic", "quantile"])
def test_how_the_same_is_computed_makes_no_other_trial(mode):
    plain = digest(ClippingConfig(mode=mode))
    assert digest(ClippingConfig(mode=mode, engine="two_pass", microbatch_size=8)) == plain
    assert digest(ClippingConfig(mode=mode), iterations=20, report_every_steps=2) == plain
    # The default, spelled out.
    assert digest(ClippingConfig(mode=mode, count_noise_stddev=64 / 20)) == plain
    for other in (
        ClippingConfig(mode=mode, target_quantile=0.7),
        ClippingConfig(mode=mode, learning_rate=0.1),
        ClippingConfig(mode=mode, count_noise_stddev=4.0),
    ):
        assert (digest(other) == plain) == (mode != "quantile")


def test_the_type_that_is_computed_in_makes_another_trial():
    narrow = dataclasses.replace(CONFIG.model, dtype="bfloat16")
    spelled_out = dataclasses.replace(CONFIG.model, dtype="float32")
    assert digest(ClippingConfig(), model=spelled_out) == digest(ClippingConfig())
    assert digest(ClippingConfig(), model=narrow) != digest(ClippingConfig())


def test_every_clipping_mode_is_another_trial():
    modes = ("flat", "per_layer", "automatic", "quantile")
    assert len({digest(ClippingConfig(mode=mode)) for mode in modes}) == 4


def test_what_is_trained_and_from_where_makes_another_trial():
    changes = [
        {},
        {"trainable": "head"},
        {"trainable": "lora"},
        {"trainable": "lora", "lora_rank": 4},
        {"head_init_scale": 0.0},
        {"init_from": "w.npz"},
        {"init_from": "w.npz", "fresh_head": True},
        {"init_from": "w.npz", "init_is_public": True},
    ]
    models = [dataclasses.replace(CONFIG.model, **change) for change in changes]
    assert len({digest(ClippingConfig(), model=model) for model in models}) == len(changes)


def test_a_schedule_and_weight_decay_make_another_trial():
    changes = [
        {},
        {"learning_rate_schedule": "cosine"},
        {"learning_rate_schedule": "linear"},
        {"warmup_steps": 3},
        {"weight_decay": 0.1},
    ]
    assert len({digest(ClippingConfig(), **change) for change in changes}) == len(changes)
