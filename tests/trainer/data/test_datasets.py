"""Any prepared TFDS data set is found by name and read the same way; every mistake is named."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.trainer.data.prepared import FEATURES, IMAGES, LABELS, RNG, encoded, examples, prepare
from trainer.config import DataConfig
from trainer.data import dataset_location, datasets, reading
from trainer.errors import DatasetError


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    """No network, and TFDS's own data directory away from the user's."""

    def refuse(*_):
        pytest.fail("a data set must never be looked for on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    tfds.disable_progress_bar()


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


def config(**overrides) -> DataConfig:
    return DataConfig(**{"name": "shapes", "scaling": "divide_by_255", **overrides})


def pixels(part: datasets.Examples) -> np.ndarray:
    return np.rint(part.images * 255).astype(np.uint8)


# Finding and reading.


def test_importing_needs_neither_jax_nor_tfds():
    program = (
        "import sys, trainer.data.datasets\n"
        "print([n for n in ('jax', 'tensorflow', 'tensorflow_datasets') if n in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout == "[]\n"


@pytest.mark.parametrize("place", ["home", "tfds", "data_dir"])
def test_read_by_name_from_every_place(tmp_path, home, place):
    prepare(tmp_path / place)
    chosen = config(data_dir=str(tmp_path / place) if place == "data_dir" else None)
    data = datasets.load(chosen, home)
    assert np.array_equal(pixels(data.train), IMAGES[:24])
    assert np.array_equal(pixels(data.eval), IMAGES[24:])
    assert np.array_equal(data.train.labels, LABELS[:24])
    assert (data.train.images.dtype, data.train.labels.dtype) == (np.float32, np.int32)
    assert data.info == datasets.describe(chosen, home)
    assert data.info.image_shape == (4, 5, 3)
    assert (data.info.num_train, data.info.num_eval, data.info.num_classes) == (24, 6, 3)


def test_the_default_place_is_in_the_home_directory(monkeypatch, tmp_path, home):
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset_location.search_dirs(config(), home) == (home, tmp_path / "tensorflow_datasets")
    assert dataset_location.search_dirs(config(data_dir="~/x"), home) == (tmp_path / "x",)


def test_data_dir_is_the_only_place_where_it_is_given(tmp_path, home):
    prepare(home)
    with pytest.raises(DatasetError, match="not prepared in"):
        datasets.describe(config(data_dir=str(tmp_path / "other")), home)


def test_arrays_cannot_be_written_and_examples_are_not_printed(home):
    prepare(home)
    data = datasets.load(config(), home)
    with pytest.raises(ValueError, match="read-only"):
        data.train.images[0] = 0
    assert "Examples()" in repr(data)


def test_highest_version_unless_one_is_named(home):
    for version in ("1.9.0", "1.10.0", "1.2.0"):
        prepare(home, version=version)
    assert datasets.describe(config(), home).version == "1.10.0"
    assert datasets.describe(config(name="shapes:1.2.0"), home).version == "1.2.0"
    with pytest.raises(DatasetError, match=r"found there: shapes:1.2.0, shapes:1.9.0, shapes:1.1"):
        datasets.describe(config(name="shapes:3.0.0"), home)


def test_configs(home):
    prepare(home, config="small")
    info = datasets.describe(config(name="shapes/small:1.0.0"), home)
    assert (info.name, info.version) == ("shapes/small", "1.0.0")
    assert datasets.load(config(name="shapes"), home).info == info  # the noted default
    with pytest.raises(DatasetError, match=r"found there: shapes/small"):
        datasets.describe(config(name="shapes/large"), home)
    (home / "shapes" / ".config" / "metadata.json").write_text("damaged")
    with pytest.raises(DatasetError, match=r"found there: shapes/small"):
        datasets.describe(config(name="shapes"), home)


def test_a_name_that_tfds_knows_is_read_from_its_files(home):
    prepare(home, name="cifar10", version="0.0.1")
    assert datasets.load(config(name="cifar10"), home).info.num_train == 24


def test_several_files(home, monkeypatch):
    from tensorflow_datasets.core.utils import shard_utils

    monkeypatch.setattr(shard_utils.ShardConfig, "get_number_shards", lambda *_, **__: 5)
    path = prepare(home)
    assert len(list(path.glob("*-train*"))) == 5
    data = datasets.load(config(train_split="train[3:20]", eval_split="train[20:]"), home)
    assert np.array_equal(pixels(data.train), IMAGES[3:20])
    assert np.array_equal(pixels(data.eval), IMAGES[20:24])


def test_decoding_in_batches_changes_nothing(home, monkeypatch):
    prepare(home)
    whole = datasets.load(config(), home)
    monkeypatch.setattr(reading, "_BATCH_PIXELS", 7 * 60)
    batched = datasets.load(config(), home)
    assert np.array_equal(whole.train.images, batched.train.images)
    assert np.array_equal(whole.train.labels, batched.train.labels)


# Features.


def test_rank_two_and_float32(home):
    values = RNG.normal(size=(6, 4, 5)).astype(np.float32)
    rows = examples(values, LABELS[:6])
    features = {**FEATURES, "picture": tfds.features.Tensor(shape=(4, 5), dtype=np.float32)}
    prepare(home, features=features, splits={"train": rows[:4], "test": rows[4:]})
    data = datasets.load(config(), home)
    assert data.info.image_shape == (4, 5, 1)
    np.testing.assert_allclose(data.train.images[..., 0] * 255, values[:4], rtol=1e-6)


@pytest.mark.parametrize("shape", [(4, 5, 3), (None, None, 3), (4, 5, 1)])
def test_encoded_images(home, shape, capfd):
    images = IMAGES[..., : shape[2]]
    rows = examples([encoded(image) for image in images])
    features = {**FEATURES, "picture": tfds.features.Image(shape=shape, encoding_format="png")}
    prepare(home, features=features, splits={"train": rows[:24], "test": rows[24:]})
    capfd.readouterr()
    data = datasets.load(config(), home)
    assert data.info.image_shape == (4, 5, shape[2])
    assert np.array_equal(pixels(data.train), images[:24])
    assert capfd.readouterr() == ("", "")


def test_images_of_several_sizes_are_refused_without_showing_one(home):
    rows = examples([encoded(image) for image in IMAGES])
    rows[11]["picture"] = encoded(IMAGES[11, :3])
    features = {**FEATURES, "picture": tfds.features.Image(encoding_format="png")}
    prepare(home, features=features, splits={"train": rows[:24], "test": rows[24:]})
    with pytest.raises(DatasetError, match=r"not every image has shape \(4, 5, 3\)") as caught:
        datasets.load(config(), home)
    assert "11" not in str(caught.value)


def test_supervised_keys_choose_among_several(home):
    features = {
        **FEATURES,
        "mask": tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8),
        "colour": tfds.features.ClassLabel(num_classes=9),
    }
    rows = examples(mask=255 - IMAGES, colour=LABELS + 5)
    splits = {"train": rows[:24], "test": rows[24:]}
    prepare(home, features=features, splits=splits, version="1.0.0")
    with pytest.raises(DatasetError, match="2 usable image features and 2 class labels among"):
        datasets.describe(config(), home)
    chosen = ("mask", "colour")
    prepare(home, features=features, splits=splits, version="1.0.1", supervised_keys=chosen)
    data = datasets.load(config(), home)
    assert np.array_equal(pixels(data.eval), 255 - IMAGES[24:])
    assert np.array_equal(data.eval.labels, LABELS[24:] + 5)
    assert data.info.num_classes == 9


@pytest.mark.parametrize(
    ("features", "found"),
    [
        ({"kind": tfds.features.Tensor(shape=(), dtype=np.int64)}, "1 usable .* 0 class labels"),
        ({"picture": tfds.features.Tensor(shape=(4, 5, 3), dtype=np.int32)}, "0 usable"),
        ({"picture": tfds.features.Tensor(shape=(60,), dtype=np.uint8)}, "0 usable"),
    ],
)
def test_a_form_that_no_model_takes(home, features, found):
    shaped = {**FEATURES, **features}
    rows = [
        {**row, "picture": np.resize(row["picture"], shaped["picture"].shape)}
        for row in examples()
    ]
    rows = [{**row, "picture": row["picture"].astype(shaped["picture"].np_dtype)} for row in rows]
    prepare(home, features=shaped, splits={"train": rows[:24], "test": rows[24:]})
    with pytest.raises(DatasetError, match=f"'shapes' has {found}"):
        datasets.describe(config(), home)


def test_labels_that_mean_unlabelled(home):
    rows = examples(labels=[*LABELS[:24], *[-1] * 6])
    prepare(home, splits={"train": rows[:24], "test": rows[24:]})
    with pytest.raises(DatasetError, match=r"'test' has labels outside 0 to 2; -1 marks"):
        datasets.load(config(), home)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_pixel_that_is_not_finite(home, bad):
    values = IMAGES.astype(np.float32)
    values[5, 0, 0, 0] = bad
    features = {**FEATURES, "picture": tfds.features.Tensor(shape=(4, 5, 3), dtype=np.float32)}
    rows = examples(values)
    prepare(home, features=features, splits={"train": rows[:24], "test": rows[24:]})
    with pytest.raises(DatasetError, match="NaN or infinite"):
        datasets.load(config(), home)


# Absent, damaged, in another format.


def test_absent(tmp_path, home):
    with pytest.raises(DatasetError) as caught:
        datasets.load(config(name="nothing_such/v2:1.0.0"), home)
    message = str(caught.value)
    assert f"'nothing_such/v2:1.0.0' is not prepared in {home}, {tmp_path / 'tfds'}" in message
    assert (
        f"`tfds build nothing_such/v2:1.0.0 --file_format=array_record --data_dir {home}`"
        in message
    )
    assert not home.exists()


def test_a_name_that_tfds_could_download_is_absent_too(home):
    with pytest.raises(DatasetError, match="'mnist' is not prepared"):
        datasets.load(config(name="mnist"), home)


def test_a_name_cannot_leave_the_data_directory(tmp_path, home):
    prepare(tmp_path / "outside")
    name = config()
    for bad in ("../outside/shapes", "shapes/../..", "/shapes", "shapes\n", "shapes:1.0.0/.."):
        object.__setattr__(name, "name", bad)
        with pytest.raises(DatasetError, match="not a TFDS name"):
            datasets.describe(name, home)


def test_a_noted_default_config_cannot_leave_the_data_directory(tmp_path, home):
    prepare(tmp_path / "outside")
    (home / "shapes" / ".config").mkdir(parents=True)
    noted = {"default_config_name": "../../outside/shapes"}
    (home / "shapes" / ".config" / "metadata.json").write_text(json.dumps(noted))
    with pytest.raises(DatasetError, match="not prepared"):
        datasets.describe(config(), home)


def test_urls_are_refused(home):
    with pytest.raises(DatasetError, match="is a URL; allowed is a directory"):
        datasets.describe(config(data_dir="gs://bucket/data"), home)


def test_an_incomplete_version_is_passed_over(home):
    prepare(home, version="1.0.0")
    (prepare(home, version="1.1.0") / "dataset_info.json").unlink()
    assert datasets.describe(config(), home).version == "1.0.0"


def test_damaged_metadata(home):
    (prepare(home) / "dataset_info.json").write_text("{")
    with pytest.raises(DatasetError, match=r"'shapes' in .*1.0.0 cannot be opened"):
        datasets.describe(config(), home)


def test_a_missing_file(home):
    next(prepare(home).glob("*-train*")).unlink()
    with pytest.raises(DatasetError, match="Prepare it again"):
        datasets.load(config(), home)


def test_a_damaged_file(home):
    file = next(prepare(home).glob("*-train*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 4 :] = bytes(len(content) - len(content) // 4)
    file.write_bytes(content)
    with pytest.raises(DatasetError, match="Prepare it again"):
        datasets.load(config(), home)


@pytest.mark.parametrize("file_format", ["parquet", "tfrecord"])
def test_a_format_without_random_access(home, file_format):
    path = prepare(home, file_format="parquet")
    described = (path / "dataset_info.json").read_text()
    (path / "dataset_info.json").write_text(described.replace("parquet", file_format))
    with pytest.raises(DatasetError) as caught:
        datasets.load(config(), home)
    assert f"is stored as {file_format}" in str(caught.value)
    assert (
        f"`tfds convert_format --dataset_version_dir={path} --out_file_format=array_record`"
        in str(caught.value)
    )


def test_array_record_beside_another_format(home):
    path = prepare(home)
    described = json.loads((path / "dataset_info.json").read_text())
    described |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    (path / "dataset_info.json").write_text(json.dumps(described))
    assert np.array_equal(pixels(datasets.load(config(), home).train), IMAGES[:24])


# Splits.


@pytest.mark.parametrize("split", ["validation", "train[", "", "train[1:2:3]", "train[:999]"])
@pytest.mark.parametrize("field", ["train_split", "eval_split"])
def test_unknown_splits(home, field, split):
    prepare(home)
    with pytest.raises(DatasetError, match=rf"{field}=.* the splits train \(24\), test \(6\)"):
        datasets.describe(config(**{field: split}), home)


@pytest.mark.parametrize("split", ["train[5:5]", "train[:0%]", "train[9:3]"])
def test_empty_splits(home, split):
    prepare(home)
    with pytest.raises(DatasetError, match="selects no example"):
        datasets.describe(config(train_split=split, eval_split="train[20:]"), home)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train", "train[:10%]"),
        ("train", "train"),
        ("train[:13]", "train[12:]"),
        ("all", "test[-1:]"),
        ("train[:5]+train[10:15]", "test+train[14:16]"),
        ("train[:80%]", "train[75%:]"),
    ],
)
def test_held_out_examples_that_are_trained_on(home, train, held_out):
    prepare(home)
    with pytest.raises(DatasetError, match="overlaps train_split"):
        datasets.describe(config(train_split=train, eval_split=held_out), home)


@pytest.mark.parametrize("split", ["train+train", "train[:50%]+train[11:]", "all+train[:1]"])
@pytest.mark.parametrize("field", ["train_split", "eval_split"])
def test_examples_taken_twice(home, field, split):
    prepare(home)
    with pytest.raises(DatasetError, match="takes an example more than once"):
        datasets.describe(config(**{field: split}), home)


def test_parts_of_splits(home):
    prepare(home)
    parts = config(train_split="train[:25%]+train[50%:75%]", eval_split="train[25%:50%]+test[:2]")
    data = datasets.load(parts, home)
    assert np.array_equal(pixels(data.train), IMAGES[[*range(6), *range(12, 18)]])
    assert np.array_equal(pixels(data.eval), IMAGES[[*range(6, 12), 24, 25]])
    assert (data.info.num_train, data.info.num_eval) == (12, 8)


# Fingerprint.


def test_fingerprint_is_of_public_facts_alone(tmp_path, home):
    prepare(home)
    rows = examples(255 - IMAGES, (LABELS + 1) % 3)
    prepare(tmp_path / "other", splits={"train": rows[:23], "test": rows[24:]})
    first = datasets.load(config(), home)
    second = datasets.load(config(data_dir=str(tmp_path / "other")), home)
    assert first.info.fingerprint == second.info.fingerprint
    assert first.info.num_train != second.info.num_train
    assert not np.array_equal(first.train.images[:23], second.train.images)
    assert not np.array_equal(first.train.labels[:23], second.train.labels)
    other_view = config(train_split="train[:5]", eval_split="train[5:]", scaling="unit_norm")
    assert datasets.describe(other_view, home).fingerprint == first.info.fingerprint


def test_fingerprint_tells_data_sets_apart(home):
    prepare(home)
    prepare(home, version="1.0.1")
    prepare(home, name="other")
    prepare(home, name="smaller", splits={"train": examples()[:23], "test": examples()[24:]})
    names = ["shapes:1.0.0", "shapes:1.0.1", "other", "smaller"]
    found = {datasets.describe(config(name=name), home).fingerprint for name in names}
    assert len(found) == 4
    assert all(len(fingerprint) == 32 for fingerprint in found)
