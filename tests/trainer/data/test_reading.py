"""Examples by position: what TFDS itself would read, bit for bit, from several threads."""

import concurrent.futures
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.trainer.data.prepared import FEATURES, IMAGES, LABELS, RNG, encoded, examples, prepare
from trainer.config import DataConfig
from trainer.data import datasets, reading
from trainer.errors import DatasetError

CONFIG = DataConfig(name="shapes", scaling="divide_by_255")


@pytest.fixture(autouse=True)
def silent():
    tfds.disable_progress_bar()


def tensor(shape: Any = (4, 5, 3), dtype: Any = np.uint8, encoding: str = "none") -> Any:
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)


def image(shape: Any = (4, 5, 3), file_format: str | None = "png") -> Any:
    return tfds.features.Image(shape=shape, encoding_format=file_format)


FLOATS = RNG.normal(size=IMAGES.shape).astype(np.float32)
GREY = IMAGES[..., :1]
FORMS = {
    "numbers": (tensor(), IMAGES),
    "bytes": (tensor(encoding="bytes"), IMAGES),
    "zlib": (tensor(encoding="zlib"), IMAGES),
    "unknown height": (tensor((None, 5, 3)), IMAGES),
    "unknown height in bytes": (tensor((None, 5, 3), encoding="bytes"), IMAGES),
    "unknown shape": (tensor((None, None, 3), encoding="zlib"), IMAGES),
    "floats": (tensor(dtype=np.float32), FLOATS),
    "floats in bytes": (tensor(dtype=np.float32, encoding="bytes"), FLOATS),
    "grey matrix": (tensor((4, 5)), IMAGES[..., 0]),
    "png": (image(), [encoded(picture) for picture in IMAGES]),
    "any png": (image((None, None, 3), None), [encoded(picture) for picture in IMAGES]),
    "grey png": (image((4, 5, 1)), [encoded(picture) for picture in GREY]),
    "grey png in colours": (image(), [encoded(picture) for picture in GREY]),
    "jpeg": (image(file_format="jpeg"), [encoded(picture, "jpeg") for picture in IMAGES]),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_bits_as_from_tfds(tmp_path, form):
    feature, pictures = FORMS[form]
    rows = examples(pictures)
    path = prepare(
        tmp_path,
        features={**FEATURES, "picture": feature},
        splits={"train": rows[:24], "test": rows[24:]},
    )
    builder: Any = tfds.builder_from_directory(path)
    expected = [row["picture"] for row in builder.as_data_source(split="train")]
    opened = datasets.open_examples(CONFIG, tmp_path)
    pixels, labels = opened.train._decode(np.arange(24))
    assert pixels.dtype == expected[0].dtype
    assert np.array_equal(pixels.reshape(np.shape(expected)), expected)
    assert np.array_equal(labels, LABELS[:24])


@pytest.fixture
def opened(tmp_path):
    prepare(tmp_path)
    return datasets.open_examples(CONFIG, tmp_path)


def test_any_positions_in_any_order(opened):
    positions = np.array([23, 0, 7, 7, 3], np.int32)
    found = opened.train.read(positions)
    assert np.array_equal(np.rint(found.images * 255), IMAGES[positions])
    assert np.array_equal(found.labels, LABELS[positions])
    assert (found.images.dtype, found.labels.dtype) == (np.float32, np.int32)
    assert (opened.train.num_examples, opened.eval.num_examples) == (24, 6)
    assert np.array_equal(np.rint(opened.eval.read(np.array([1])).images * 255), IMAGES[25:26])


def test_no_positions(opened):
    found = opened.train.read(np.zeros(0, np.int32))
    assert found.images.shape == (0, 4, 5, 3)
    assert found.labels.shape == (0,)


@pytest.mark.parametrize("position", [-1, 24])
def test_positions_outside_are_refused_and_not_shown(opened, position):
    with pytest.raises(IndexError) as caught:
        opened.train.read(np.array([3, position]))
    assert str(position) not in str(caught.value)


def test_loading_is_reading_everything(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_BATCH_PIXELS", 7 * 60)
    found = opened.train.read(np.arange(24))
    loaded = datasets.load(CONFIG, tmp_path)
    assert np.array_equal(loaded.train.images, found.images)
    assert np.array_equal(loaded.train.labels, found.labels)
    assert loaded.info == opened.info


def test_threads_share_a_reader(opened):
    def read(seed: int) -> bool:
        positions = np.random.default_rng(seed).integers(0, 24, 50)
        found = opened.train.read(positions)
        return np.array_equal(np.rint(found.images * 255), IMAGES[positions])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(64)))


def test_nothing_of_an_undecodable_example_is_shown(tmp_path):
    rows = examples([encoded(picture) for picture in IMAGES])
    features = {**FEATURES, "picture": image()}
    path = prepare(tmp_path, features=features, splits={"train": rows[:24], "test": rows[24:]})
    opened = datasets.open_examples(CONFIG, tmp_path)
    file = next(path.glob("*-train*"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3] + bytes(len(content) - len(content) // 3))
    with pytest.raises(DatasetError, match="missing, damaged or not decodable") as caught:
        opened.train.read(np.arange(24))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
