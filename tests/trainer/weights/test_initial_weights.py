"""Weights from files: what is taken, what stays fresh, and what is refused."""

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from trainer.config import ModelConfig
from trainer.errors import CheckpointError
from trainer.models import VisionTransformer, init_params
from trainer.models.network import Network
from trainer.weights.checkpoints import architecture, save_checkpoint
from trainer.weights.initial_weights import check_initial_weights, load_initial_weights

ROOT = Path(__file__).resolve().parents[3]
SHAPE = (8, 8, 1)
PROTECTED, PUBLIC = "f" * 32, "0" * 32


class Model(nn.Module):
    classes: int = 3

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Dense(4, name="first")(images.reshape(len(images), -1)))
        return nn.Dense(self.classes, name="head")(nn.Dense(4, name="second")(hidden))


FRESH = init_params(Model(), SHAPE, 0)
# What the files hold: other numbers.
STORED = jax.device_get(init_params(Model(), SHAPE, 1))
ARCHITECTURE = architecture(ModelConfig(name="mlp"), SHAPE, 3)


def flat(tree):
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}


def nested(leaves):
    return unflatten_dict({tuple(name.split("/")): leaf for name, leaf in leaves.items()})


def own(path, leaves):
    save_checkpoint(
        path / "own",
        params=nested(leaves),
        opt_state=(np.ones(3, np.float32),),
        step=5,
        architecture=ARCHITECTURE,
        dataset_fingerprint=PUBLIC,
        config_digest="c" * 64,
    )
    return path / "own"


def orbax(path, leaves):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "orbax", nested(leaves))
    return path / "orbax"


def orbax_of_a_training_state(path, leaves):
    adam = {"mu": nested(leaves), "count": jnp.int32(4)}
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = {"params": nested(leaves), "opt_state": [adam, ()], "step": 7, "note": "hello"}
        checkpointer.save(path / "state", tree)
    return path / "state"


def npz(path, leaves):
    np.savez(path / "w.npz", **leaves)
    return path / "w.npz"


def safe(path, leaves):
    safetensors.numpy.save_file(leaves, path / "w.safetensors")
    return path / "w.safetensors"


def safe_of_another_library(path, leaves):
    return safe(path, {f"model.params.{k}".replace("/", "."): v for k, v in leaves.items()})


def npz_with_a_prefix(path, leaves):
    return npz(path, {f"params/{name}": leaf for name, leaf in leaves.items()})


WRITERS = [
    own,
    orbax,
    orbax_of_a_training_state,
    npz,
    npz_with_a_prefix,
    safe,
    safe_of_another_library,
]


def config(path, **fields):
    foreign = not (Path(path) / "checkpoint.json").exists()
    return ModelConfig(name="mlp", init_from=str(path), **{"init_is_public": foreign, **fields})


def load(path, fresh=FRESH, **fields):
    return load_initial_weights(config(path, **fields), fresh, ARCHITECTURE, PROTECTED)


def assert_same(one, two):
    assert flat(one).keys() == flat(two).keys()
    for name, leaf in flat(one).items():
        np.testing.assert_array_equal(leaf, flat(two)[name], err_msg=name)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_everything_that_fits_is_loaded(tmp_path, write):
    params, report = load(write(tmp_path, flat(STORED)))
    assert_same(params, STORED)
    assert report.loaded == {name: leaf.shape for name, leaf in flat(FRESH).items()}
    assert (report.fresh, report.reshaped) == ({}, {})
    # Of a training state, the rest is said to be there and not used.
    rest = "opt_state/0/mu/head/bias" in report.unused
    assert rest == (write is orbax_of_a_training_state)
    assert bool(report.unused) == rest


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_a_head_for_other_classes_starts_afresh(tmp_path, write):
    leaves = flat(STORED)
    leaves["head/kernel"], leaves["head/bias"] = np.ones((4, 7), "f4"), np.ones(7, "f4")
    params, report = load(write(tmp_path, leaves))
    assert_same(params["head"], FRESH["head"])
    assert_same(params["first"], STORED["first"])
    assert report.fresh == {"head/kernel": (4, 3), "head/bias": (3,)}
    assert report.reshaped == {"head/kernel": (4, 7), "head/bias": (7,)}
    assert "fresh   head/kernel (4, 3); the file has (4, 7)" in str(report)
    assert f"initial weights {report.path!r}: 4 arrays loaded, 2 fresh" in str(report)


@pytest.mark.parametrize("missing", [["head/kernel", "head/bias"], ["head/bias"]])
def test_a_head_is_loaded_whole_or_not_at_all(tmp_path, missing):
    leaves = {name: leaf for name, leaf in flat(STORED).items() if name not in missing}
    params, report = load(npz(tmp_path, leaves))
    assert_same(params["head"], FRESH["head"])
    assert set(report.fresh) == {"head/kernel", "head/bias"}
    assert report.reshaped == {}
    assert set(report.unused) == {"head/kernel", "head/bias"} - set(missing)


def test_a_head_that_fits_starts_afresh_where_that_is_asked_for(tmp_path):
    params, report = load(npz(tmp_path, flat(STORED)), fresh_head=True)
    assert_same(params["head"], FRESH["head"])
    assert_same(params["second"], STORED["second"])
    assert report.unused == {"head/bias": (3,), "head/kernel": (4, 3)}
    assert "unused  head/bias (3,)" in str(report)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, jnp.bfloat16])
def test_every_floating_point_type_becomes_float32(tmp_path, dtype):
    leaves = {name: leaf.astype(dtype) for name, leaf in flat(STORED).items()}
    params, _ = load(safe(tmp_path, leaves))
    assert {leaf.dtype for leaf in flat(params).values()} == {np.dtype("float32")}
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype("f4"), STORED))


def changed(**leaves):
    """The stored leaves with some replaced; None takes one out."""
    replaced = flat(STORED) | leaves
    return {name: leaf for name, leaf in replaced.items() if leaf is not None}


KERNEL = np.ones((4, 4), np.float32)


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        (
            changed(**{"first/bias": None, "second/kernel": np.ones((4, 9), "f4"), "x": KERNEL}),
            r"does not fit the model: first/bias \(4,\) is missing; second/kernel \(4, 4\) is "
            r"\(4, 9\) in the file; it also has x \(4, 4\)\. Allowed",
        ),
        (
            changed(**{f"{x}/{y}": None for x in ("first", "second") for y in ("kernel", "bias")}),
            r"first/bias \(4,\) is missing; .*second/kernel \(4, 4\) is missing",
        ),
        (changed(**{"second/kernel": KERNEL.astype(int)}), "second/kernel is of type int64"),
        (changed(**{"second/kernel": KERNEL * 1j}), "second/kernel is of type complex"),
        (changed(**{"second/kernel": KERNEL * np.nan}), "second/kernel holds numbers that are"),
        (changed(**{"second/kernel": KERNEL * np.inf}), "second/kernel holds numbers that are"),
        (changed(**{"second/kernel": KERNEL.astype(float) * 1e300}), "beyond float32"),
        (changed(**{"second.kernel": KERNEL}), "are both the parameter second/kernel"),
        (changed(**{"params/second/kernel": KERNEL}), "'params/second/kernel' are both the"),
        (changed(**{"second/lora_a": KERNEL}), "second/lora_b are no update of second/kernel"),
        (
            changed(**{"second/lora_a": KERNEL[:1], "second/lora_b": KERNEL}),
            "second/lora_b are no update of second/kernel",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_named(tmp_path, leaves, message):
    with pytest.raises(CheckpointError, match=message):
        load(npz(tmp_path, leaves))


def test_position_embeddings_of_another_image_size_are_not_interpolated(tmp_path):
    model = VisionTransformer(3, width=4, heads=1, depth=1, patch_size=2)
    shapes = [jax.eval_shape(lambda s=s: init_params(model, (s, s, 1), 0)) for s in (8, 16)]
    small, large = (jax.tree.map(lambda leaf: np.ones(leaf.shape, "f4"), tree) for tree in shapes)
    with pytest.raises(CheckpointError, match=r"positions \(1, 17, 4\) is \(1, 65, 4\) in the f"):
        load(npz(tmp_path, flat(large)), fresh=small)


def test_where_nothing_would_be_loaded_the_file_is_refused(tmp_path):
    fresh = {"head": FRESH["head"]}
    path = npz(tmp_path, flat({"head": STORED["head"]}))
    assert_same(load(path, fresh=fresh)[0], {"head": STORED["head"]})
    with pytest.raises(CheckpointError, match="nothing of it would be used"):
        load(path, fresh=fresh, fresh_head=True)


@pytest.mark.parametrize("write", [own, safe], ids=["own", "safe"])
def test_low_rank_updates_are_added(tmp_path, write):
    network = Network(Model(), "lora", lora_rank=2)
    parameters = network.init(SHAPE, 1)
    moved = jax.tree.map(lambda leaf: leaf + 0.1, parameters)
    params, report = load(write(tmp_path, flat(network.joined(*moved))))
    want = flat(network.merged(*moved))
    for name, leaf in flat(params).items():
        np.testing.assert_allclose(leaf, want[name], atol=1e-6)
    assert report.unused == {}


def test_loaded_weights_are_what_training_starts_with(tmp_path):
    network = Network(Model(), "lora", head_init_scale=0.0)
    fresh = network.fresh(SHAPE, 0)
    params, _ = load(npz(tmp_path, flat(STORED)), fresh=fresh, fresh_head=True)
    started = network.merged(*network.init(SHAPE, 0, initial=params))
    assert_same(started, {**STORED, "head": fresh["head"]})
    assert not np.any(started["head"]["kernel"])


@pytest.mark.parametrize("write", [orbax, npz, safe], ids=["orbax", "npz", "safe"])
def test_weights_without_provenance_need_somebodys_word(tmp_path, write):
    model = config(write(tmp_path, flat(STORED)), init_is_public=False)
    with pytest.raises(CheckpointError, match=r"nobody accounts for.*model\.init_is_public: true"):
        check_initial_weights(model, ARCHITECTURE, PROTECTED)


@pytest.mark.parametrize("word", [True, False])
def test_own_checkpoints_tell_what_they_were_trained_on(tmp_path, word):
    model = config(own(tmp_path, flat(STORED)), init_is_public=word)
    assert check_initial_weights(model, ARCHITECTURE, PROTECTED) == "checkpoint"
    with pytest.raises(CheckpointError, match="trained on the data set that this trial protects"):
        check_initial_weights(model, ARCHITECTURE, PUBLIC)
    for check in (
        check_initial_weights,
        lambda *args: load_initial_weights(args[0], FRESH, *args[1:]),
    ):
        with pytest.raises(CheckpointError, match="image_shape"):
            check(model, {**ARCHITECTURE, "image_shape": [4, 4, 1]}, PROTECTED)


def test_a_part_of_an_own_checkpoint_does_not_pass_for_a_foreign_one(tmp_path, monkeypatch):
    checkpoint = own(tmp_path, flat(STORED))
    (tmp_path / "link").symlink_to(checkpoint / "params")
    monkeypatch.chdir(checkpoint / "params")
    for path in (checkpoint / "params", tmp_path / "link", "."):
        with pytest.raises(CheckpointError, match=r"a part of a checkpoint; allowed is '.*/own'"):
            load(path)


class Unpickled:
    ran = False

    def __reduce__(self):
        return (setattr, (Unpickled, "ran", True))


def pickled_npz(path):
    return npz(path, {**flat(STORED), "extra": np.array([Unpickled()], object)})


def pickle_named_npz(path):
    (path / "w.npz").write_bytes(pickle.dumps(Unpickled()))
    return path / "w.npz"


def zip_of_something_else(path):
    with zipfile.ZipFile(path / "w.npz", "w") as archive:
        archive.writestr("first/kernel.npy", b"hello")
    return path / "w.npz"


def npy_named_npz(path):
    buffer = io.BytesIO()
    np.save(buffer, KERNEL)
    (path / "w.npz").write_bytes(buffer.getvalue())
    return path / "w.npz"


def truncated(write):
    def write_less(path):
        file = write(path, flat(STORED))
        file.write_bytes(file.read_bytes()[:-5])
        return file

    return write_less


def orbax_without_its_structure(path):
    checkpoint = orbax(path, flat(STORED))
    (checkpoint / "_METADATA").write_text("{")
    return checkpoint


def text(path):
    (path / "w.bin").write_text("hello")
    return path / "w.bin"


def empty_directory(path):
    (path / "empty").mkdir()
    return path / "empty"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (pickled_npz, r"w.npz'.*not a whole .npz file: extra.npy: holds Python objects"),
        (pickle_named_npz, r"w.npz'.*not a whole .npz file: "),
        (zip_of_something_else, "not a whole .npz file: first/kernel.npy: "),
        (npy_named_npz, "not a whole .npz file: "),
        (truncated(npz), "not a whole .npz file: "),
        (truncated(safe), r"w.safetensors'.*not a whole .safetensors file: .*not fully covered"),
        (orbax_without_its_structure, "not a whole Orbax checkpoint"),
        (text, "not a file of weights; allowed is one in .npz or .safetensors"),
        (empty_directory, "neither checkpoint.json nor Orbax's _METADATA"),
        (lambda path: path / "absent; touch gone", "no such directory or file"),
    ],
)
def test_what_is_no_file_of_weights_is_refused_by_its_headers(tmp_path, write, message):
    path = write(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        check_initial_weights(config(path), ARCHITECTURE, PROTECTED)
    with pytest.raises(CheckpointError, match=message):
        load(path)
    assert not Unpickled.ran


def test_a_flipped_bit_in_an_archive_is_found(tmp_path):
    file = npz(tmp_path, flat(STORED))
    raw = bytearray(file.read_bytes())
    at = raw.find(STORED["second"]["kernel"].tobytes())
    raw[at] ^= 1
    file.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=r"not a whole .npz file: .*CRC"):
        load(file)


def test_checking_needs_no_jax(tmp_path):
    paths = [str(write(tmp_path, flat(STORED))) for write in (own, orbax, npz, safe)]
    code = f"""
import sys
from trainer.config import ModelConfig
from trainer.weights.initial_weights import check_initial_weights
for path in {paths!r}:
    model = ModelConfig(name="mlp", init_from=path, init_is_public=True)
    print(check_initial_weights(model, {ARCHITECTURE!r}, {PROTECTED!r}))
assert "jax" not in sys.modules
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["checkpoint", "orbax", "npz", "safetensors"]
