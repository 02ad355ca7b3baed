"""Random data sets: ordinary for TFDS, the same for the same request, whole or not there."""

import hashlib
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from trainer.config import DataConfig
from trainer.data import datasets
from trainer.data.synthetic import preparation
from trainer.data.synthetic.preparation import prepare_synthetic
from trainer.data.synthetic.request import Synthetic
from trainer.errors import DatasetError


def request(**changes: Any) -> Synthetic:
    return Synthetic(
        **{"name": "tiny", "num_examples": 300, "shape": (8, 6, 3), "num_classes": 4, **changes}
    )


def load(home, **more):
    config = DataConfig(name="synthetic_tiny", scaling="divide_by_255", **more)
    return datasets.load(config, home)


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("shape", [(8, 6, 3), (5, 5, 1)])
def test_tfds_reads_it_by_name(tmp_path, encoding, shape):
    path = prepare_synthetic(request(encoding=encoding, shape=shape), tmp_path)
    assert path == tmp_path / "synthetic_tiny" / "1.0.0"
    source: Any = tfds.data_source("synthetic_tiny", data_dir=str(tmp_path), split="train")
    rows = list(source)
    data = load(tmp_path)
    assert (data.info.num_train, data.info.num_eval) == (len(rows), 60) == (300, 60)
    assert (data.info.image_shape, data.info.num_classes) == (shape, 4)
    expected = np.stack([row["image"] for row in rows])
    assert np.array_equal(np.rint(data.train.images * 255), expected)
    assert data.train.labels.tolist() == [row["label"] for row in rows]


def test_encodings_hold_the_same_pixels(tmp_path):
    found = []
    for encoding in ("raw", "png"):
        prepare_synthetic(request(encoding=encoding), tmp_path / encoding)
        found.append(load(tmp_path / encoding))
    assert np.array_equal(found[0].train.images, found[1].train.images)


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*-of-*")
    }


def test_the_same_request_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "_FILE_BYTES", 8 * 6 * 3 * 70)
    found = [
        digests(prepare_synthetic(request(seed=seed, num_users=9), tmp_path / str(place)))
        for place, seed in enumerate((0, 0, 1))
    ]
    assert len(found[0]) == 5 + 1
    assert found[0] == found[1] != found[2]
    assert len(set(found[0].values())) == 6  # no file repeats another
    assert load(tmp_path / "0").info.num_train == 300


def test_a_model_can_learn_it(tmp_path):
    from sklearn.linear_model import LogisticRegression

    prepare_synthetic(request(num_examples=1000, shape=(16, 16, 1)), tmp_path)
    data = load(tmp_path)
    model = LogisticRegression(C=0.1).fit(data.train.images.reshape(1000, -1), data.train.labels)
    assert model.score(data.eval.images.reshape(200, -1), data.eval.labels) > 0.8


def test_everybody_has_an_example_and_nobody_is_in_both_splits(tmp_path):
    prepare_synthetic(request(num_users=50), tmp_path)
    data = load(tmp_path, user_feature="user")
    assert data.info.num_users == 50
    assert data.user_positions is not None
    assert sorted(data.user_positions[data.user_positions >= 0]) == list(range(300))


def test_progress_counts_every_example(tmp_path):
    counts = []
    prepare_synthetic(request(), tmp_path, counts.append)
    assert sum(counts) == 360


def test_again_writes_nothing_and_something_else_is_refused(tmp_path, monkeypatch):
    path = prepare_synthetic(request(), tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(preparation, "_build", lambda *_: pytest.fail("written again"))
        assert prepare_synthetic(request(), tmp_path) == path
        with pytest.raises(DatasetError, match=r"exists in .* with other contents"):
            prepare_synthetic(request(seed=1), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["synthetic_tiny"]


def test_an_error_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(preparation, "_record", fail)
    with pytest.raises(DatasetError, match=r"cannot be prepared in .*disk full"):
        prepare_synthetic(request(), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "../out"},
        {"name": "a\n"},
        {"name": ""},
        {"num_examples": 0},
        {"shape": (0, 4, 3)},
        {"shape": (4, 4, 2)},
        {"shape": (4, 5000, 3)},
        {"num_classes": 1},
        {"num_classes": 100_000, "shape": (224, 224, 3)},
        {"num_users": 301},
        {"num_users": 0},
        {"encoding": "gif"},
        {"seed": -1},
    ],
)
def test_what_cannot_be_drawn(bad):
    with pytest.raises(DatasetError, match="allowed") as caught:
        request(**bad)
    assert caught.value.field in bad
