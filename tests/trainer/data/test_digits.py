"""The built-in data set against scikit-learn's original, and its preparation under races."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from trainer.config import DataConfig
from trainer.data import datasets
from trainer.data.digits import builder, preparation
from trainer.errors import DatasetError

CONFIG = DataConfig(name="digits", scaling="divide_by_255")


@pytest.fixture(autouse=True)
def isolated(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds-default"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    preparation.prepare(home)
    return home


def rows(examples: datasets.Examples) -> list[tuple[int, ...]]:
    """Each example as its 64 pixels and its label; no two digits are equal."""
    pixels = np.rint(examples.images * 255).astype(int).reshape(len(examples.labels), 64)
    return [(*image, label) for image, label in zip(pixels.tolist(), examples.labels, strict=True)]


def originals(positions) -> set[tuple[int, ...]]:
    digits: Any = load_digits()
    return {(*digits.data[i].astype(int).tolist(), int(digits.target[i])) for i in positions}


def test_constants_agree_with_the_builder():
    assert builder.Digits.name == preparation.NAME
    assert str(builder.Digits.VERSION) == preparation.VERSION


def test_split_is_a_fixed_permutation():
    train, test = builder.split_positions()
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(train + test) == list(range(1797))
    # Another split would be another data set under the same name and version.
    assert test[:8] == (1254, 1459, 1000, 883, 1538, 1497, 1478, 155)
    assert train[:4] == (1697, 1790, 578, 557)


def test_every_example_is_the_original(home):
    data = datasets.load(CONFIG, home)
    positions = builder.split_positions()
    for examples, expected in zip((data.train, data.eval), positions, strict=True):
        found = rows(examples)
        assert set(found) == originals(expected)
        assert len(found) == len(expected)
        assert set(examples.labels.tolist()) == set(range(10))
    assert not set(rows(data.train)) & set(rows(data.eval))


def test_facts(home):
    info = datasets.describe(CONFIG, home)
    assert (info.name, info.version) == ("digits", "1.0.0")
    assert (info.num_train, info.num_eval, info.num_classes) == (1437, 360, 10)
    assert info.image_shape == (8, 8, 1)
    # The database knows the data set by it: it may change with the version alone.
    assert info.fingerprint == "8dc456d2aae44281aa7c0985dbcdd659"


def test_documentation_is_complete(home):
    import tensorflow_datasets as tfds

    info: Any = tfds.builder_from_directory(home / "digits" / "1.0.0").info
    assert "handwritten digits" in info.description
    assert "Alpaydin" in info.citation
    assert info.homepage.startswith("https://archive.ics.uci.edu/")
    assert info.supervised_keys == ("image", "label")
    assert info.release_notes["1.0.0"]


def test_any_tfds_user_reads_it_by_name(home, tmp_path):
    program = f"""
import socket, sys

def refuse(*_):
    raise AssertionError("nothing is downloaded")

socket.socket.connect = socket.getaddrinfo = refuse
import tensorflow_datasets as tfds

source = tfds.data_source("digits", data_dir={str(home)!r}, split="test")
print([(*example["image"].ravel().tolist(), int(example["label"])) for example in source])
assert not {{"trainer", "tensorflow"}} & set(sys.modules)
"""
    # Away from this code, which a TFDS user does not have.
    found = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval(found.stdout) == rows(datasets.load(CONFIG, home).eval)


def test_two_preparations_give_the_same_data_in_the_same_order(home, tmp_path):
    first, second = datasets.load(CONFIG, home), datasets.load(CONFIG, tmp_path)
    for ours, theirs in ((first.train, second.train), (first.eval, second.eval)):
        assert np.array_equal(ours.images, theirs.images)
        assert np.array_equal(ours.labels, theirs.labels)
    assert first.info == second.info


def test_prepared_once_and_silently(tmp_path, monkeypatch, capfd):
    home = tmp_path / "new" / "home"
    datasets.load(CONFIG, home)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    monkeypatch.setattr(preparation, "_build", lambda _: pytest.fail("prepared again"))
    datasets.load(CONFIG, home)
    preparation.prepare(home)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before
    assert [path.name for path in home.iterdir()] == ["digits"]
    assert capfd.readouterr() == ("", "")


def test_prepared_where_data_dir_says(tmp_path):
    config = DataConfig(name="digits:1.0.0", data_dir=str(tmp_path / "mine"))
    assert datasets.load(config, tmp_path / "home").info.num_train == 1437
    assert (tmp_path / "mine" / "digits" / "1.0.0").is_dir()
    assert not (tmp_path / "home").exists()


def test_a_copy_that_is_already_somewhere_is_used(home, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(home))
    assert datasets.describe(CONFIG, tmp_path / "home").num_train == 1437
    assert not (tmp_path / "home").exists()


def test_another_version_does_not_exist(tmp_path):
    with pytest.raises(DatasetError, match=r"'digits:2.0.0' is not prepared.*'digits:1.0.0'"):
        datasets.describe(DataConfig(name="digits:2.0.0"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_loser_of_a_race_takes_the_winners_copy(tmp_path, monkeypatch):
    build = preparation._build
    winner_inode = []

    def overtaken(scratch: str) -> None:
        monkeypatch.setattr(preparation, "_build", build)
        winner_inode.append(preparation.prepare(tmp_path).stat().st_ino)
        build(scratch)

    monkeypatch.setattr(preparation, "_build", overtaken)
    assert preparation.prepare(tmp_path).stat().st_ino == winner_inode[0]
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_an_interrupted_preparation_leaves_nothing_in_the_way(tmp_path, monkeypatch):
    build = preparation._build

    def interrupted(scratch: str) -> None:
        build(scratch)
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "_build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preparation.prepare(tmp_path)
    monkeypatch.setattr(preparation, "_build", build)
    assert datasets.load(CONFIG, tmp_path).info.num_train == 1437


def test_an_incomplete_copy_in_the_way_is_named(tmp_path):
    target = tmp_path / "digits" / "1.0.0"
    target.mkdir(parents=True)
    (target / "features.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"cannot be prepared in .*Remove what is in the way"):
        datasets.load(CONFIG, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="a directory that can be written"):
        datasets.load(CONFIG, tmp_path / "file")


def test_describing_writes_nothing(home, tmp_path):
    described = datasets.describe(CONFIG, tmp_path / "home")
    assert not list(tmp_path.iterdir())
    assert described == datasets.load(CONFIG, home).info


@pytest.mark.slow
def test_processes_that_prepare_at_the_same_time(tmp_path):
    program = (
        "import sys, pathlib\n"
        "from trainer.data.digits import builder, preparation\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(preparation.prepare(pathlib.Path(sys.argv[1])))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert printed == f"{tmp_path / 'digits' / '1.0.0'}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert datasets.load(CONFIG, tmp_path).info.num_train == 1437
