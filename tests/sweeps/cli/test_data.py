"""The commands about data sets: what they write, show, hide and refuse."""

import json
import socket
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.sweeps.cli.spec_files import write
from tests.trainer.data.prepared import FEATURES, encoded, examples, prepare
from trainer.data.declaration import FILE_NAME

SMALL = ("--examples", "40", "--shape", "6x5x3", "--classes", "3")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        pytest.fail("nothing is to be downloaded here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """TFDS's own data directory."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    tfds.disable_progress_bar()
    return tmp_path / "tfds"


def document(command, *arguments):
    code, out, err = command("data", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


# --- prepare -------------------------------------------------------------------------------


def test_prepare_digits(command, home):
    shown = document(command, "prepare", "digits")
    assert shown["path"] == str(home / "data" / "digits" / "1.0.0")
    assert shown["splits"] == [
        {"split": "train", "num_examples": 1437},
        {"split": "test", "num_examples": 360},
    ]
    assert shown["fingerprint"] == "8dc456d2aae44281aa7c0985dbcdd659"
    assert document(command, "prepare", "digits:1.0.0") == shown


def test_prepare_synthetic(command, home, tmp_path):
    shown = document(command, "prepare", "synthetic", *SMALL, "--users", "4", "--name", "tiny")
    assert (shown["name"], shown["image_shape"]) == ("synthetic_tiny", [6, 5, 3])
    assert (shown["num_classes"], shown["readable"]) == (3, True)
    assert shown["path"].startswith(str(home / "data"))
    there = ("--data-dir", tmp_path / "there", "--encoding", "png", "--seed", "3")
    code, out, _ = command("data", "prepare", "synthetic", *SMALL, *there)
    assert code == 0
    assert "synthetic_blobs:1.0.0" in out
    assert (tmp_path / "there" / "synthetic_blobs" / "1.0.0").is_dir()


def test_a_sweep_is_decided_on_a_synthetic_data_set(command, tmp_path):
    arguments = ("--examples", "2000", "--shape", "4x4", "--classes", "2")
    document(command, "prepare", "synthetic", *arguments)
    code, out, _ = command("check", write(tmp_path, {"data.name": "synthetic_blobs"}), "--json")
    assert json.loads(out)["num_train"] == 2000
    assert code in (0, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("synthetic",), "--examples, --shape, --classes: missing"),
        (("synthetic", "--examples", "9"), "--shape, --classes: missing"),
        (("synthetic", *SMALL, "--shape", "6by5"), "--shape '6by5': allowed is HxWxC"),
        (("synthetic", *SMALL, "--shape", "6x5x2"), "--shape: (6, 5, 2): allowed"),
        (("synthetic", *SMALL, "--examples", "0"), "--examples: 0: allowed"),
        (("synthetic", *SMALL, "--users", "41"), "--users: 41: allowed"),
        (("synthetic", *SMALL, "--name", "../x"), "--name: '../x': allowed"),
        (("synthetic", *SMALL, "--data-dir", "gs://x/y"), "is a URL"),
        (("digits", "--seed", "1"), "--seed: allowed for synthetic alone"),
        (("digits:2.0.0",), "'digits:2.0.0' is not prepared"),
        (("../x",), "'../x'"),
        (("no_such_set_anywhere",), "TFDS knows none of that name"),
    ],
)
def test_what_cannot_be_prepared(command, home, arguments, words):
    code, out, err = command("data", "prepare", *arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_name_that_is_taken(command):
    document(command, "prepare", "synthetic", *SMALL)
    code, _, err = command("data", "prepare", "synthetic", *SMALL, "--seed", "1")
    assert code == 2
    assert "with other contents" in err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "No module named 'tensorflow'"),
        (ConnectionError("x"), "cannot be reached over the network"),
        (AssertionError("no manual_dir"), "AssertionError: no manual_dir"),
    ],
)
def test_a_builder_that_cannot_run_here_says_where_it_could(command, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tfds, "builder", fail)
    code, out, err = command("data", "prepare", "mnist")
    assert (code, out) == (1, "")
    assert words in err
    assert "`tfds build mnist --file_format=array_record --data_dir DIR`" in err


def test_a_builder_of_tfds_writes_what_is_read(command, monkeypatch, tmp_path):
    class Builder:
        def download_and_prepare(self, **_):
            sys.stdout.write("TFDS says a lot")
            prepare(tmp_path, name="mnist")

    monkeypatch.setattr(tfds, "builder", lambda *_, **__: Builder())
    shown = document(command, "prepare", "mnist", "--data-dir", tmp_path)
    assert (shown["name"], shown["formats"]) == ("mnist", ["array_record"])


# --- list and show -------------------------------------------------------------------------


def test_list_shows_every_place_and_what_cannot_be_read(command, home, elsewhere):
    code, out, _ = command("data", "list")
    assert code == 0
    assert "no data set is prepared" in out
    document(command, "prepare", "digits")
    prepare(elsewhere, name="scans", version="1.2.0")
    prepare(elsewhere, name="scans", version="1.10.0", config="small")
    prepare(elsewhere, name="tables", file_format="parquet")
    damaged = prepare(elsewhere, name="worn")
    (damaged / "dataset_info.json").write_text("{")
    assert (elsewhere / "downloads").is_dir()  # TFDS's own; no data set
    found = {each["name"]: each for each in document(command, "list")["datasets"]}
    assert list(found) == ["digits", "scans", "scans/small", "tables", "worn"]
    assert found["scans/small"]["version"] == "1.10.0"
    assert found["scans"]["readable"]
    assert found["scans"]["privacy_unit"] is None
    assert "is stored as parquet" in found["tables"]["problem"]
    assert "cannot be opened" in found["worn"]["problem"]
    code, out, _ = command("data", "list", "--data-dir", elsewhere)
    assert code == 0
    assert "digits" not in out
    assert "train 24, test 6" in out


def test_show(command, elsewhere):
    path = prepare(
        elsewhere,
        name="scans",
        features={**FEATURES, "picture": tfds.features.Image(encoding_format="png")},
        splits={"train": examples([encoded(np.zeros((2, 2, 3), np.uint8))], [0]) * 2}
        | {"test": examples([encoded(np.zeros((2, 2, 3), np.uint8))], [0])},
    )
    code, out, err = command("data", "show", "scans:1.0.0")
    assert (code, err) == (0, "")
    for words in ("scans:1.0.0", str(path), "train 2, test 1", "?x?x3", "not declared"):
        assert "".join(words.split()) in "".join(out.split())  # however lines are broken
    assert document(command, "show", "scans")["image_shape"] == [None, None, 3]


@pytest.mark.parametrize("name", ["nothing", "../x", "a;rm -rf", "digits:9.9.9"])
@pytest.mark.parametrize("verb", [("show",), ("declare", "--unit", "example", "--size", "public")])
def test_names_of_no_data_set(command, name, verb):
    code, out, err = command("data", verb[0], name, *verb[1:])
    assert (code, out) == (2, "")
    assert repr(name) in err
    assert "Traceback" not in err


# --- declare -------------------------------------------------------------------------------

PROTECTED = ("--unit", "example", "--size", "protected", "--declared-num-examples", "1400")


@pytest.fixture
def digits(command, home):
    return document(command, "prepare", "digits")


def test_a_declared_size_is_shown_nowhere(command, digits):
    shown = document(command, "declare", "digits", *PROTECTED)
    assert (shown["size"], shown["declared_num_examples"]) == ("protected", 1400)
    assert shown["fingerprint"] == digits["fingerprint"]
    for verb in (("show", "digits"), ("list",)):
        _, out, _ = command("data", *verb)
        assert "train, test (sizes protected)" in out
        _, more, _ = command("data", *verb, "--json")
        assert not any(number in out + more for number in ("1437", "1,437", "360"))


def test_an_error_of_a_split_does_not_show_it(command, digits, tmp_path):
    document(command, "declare", "digits", *PROTECTED)
    code, _, err = command("check", write(tmp_path, {"data.eval_split": "valid"}))
    assert code == 2
    assert "train" in err
    assert "1437" not in err


def test_declaring_again(command, digits, home):
    document(command, "declare", "digits", *PROTECTED)
    document(command, "declare", "digits", *PROTECTED)
    public = ("declare", "digits", "--unit", "example", "--size", "public")
    code, _, err = command("data", *public)
    assert code == 2
    assert "says something else already" in err
    assert document(command, "show", "digits")["size"] == "protected"
    assert document(command, *public, "--replace")["size"] == "public"
    folder = home / "data" / "digits" / "1.0.0"
    assert sorted(path.name for path in folder.glob(".*")) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--unit", "user", "--size", "public"), "user_feature=None"),
        (("--unit", "example", "--size", "public", "--user-feature", "x"), "user_feature='x'"),
        (("--unit", "user", "--size", "public", "--user-feature", "x"), "names no feature"),
        (("--unit", "user", "--size", "public", "--user-feature", "image"), "names no feature"),
        ((*PROTECTED[:3], "public", *PROTECTED[4:]), "declared_num_examples=1400"),
        ((*PROTECTED[:5], "0"), "declared_num_examples=0"),
        (("--unit", "house", "--size", "public"), "house"),
        (("--unit", "example", "--size", "secret"), "secret"),
    ],
)
def test_what_cannot_be_declared(command, digits, home, arguments, words):
    code, out, err = command("data", "declare", "digits", *arguments)
    assert (code, out) == (2, "")
    assert words in " ".join(err.split())
    assert not list(home.rglob(FILE_NAME))


def test_whole_users(command):
    document(command, "prepare", "synthetic", *SMALL, "--users", "4")
    arguments = ("--unit", "user", "--user-feature", "user", "--size", "public")
    shown = document(command, "declare", "synthetic_blobs", *arguments)
    assert (shown["privacy_unit"], shown["user_feature"]) == ("user", "user")
    assert shown["splits"][0]["num_examples"] is None
    _, out, _ = command("data", "show", "synthetic_blobs")
    assert "user, told by user" in out


# --- What sweeps are held to ---------------------------------------------------------------

BY_ONE = {"privacy.neighboring_relation": "add_or_remove_one"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "privacy.neighboring_relation"),
        ({**BY_ONE, "data.declared_num_examples": 1500}, "data.declared_num_examples"),
    ],
)
def test_a_specification_that_contradicts_is_refused(command, digits, tmp_path, changes, key):
    document(command, "declare", "digits", *PROTECTED)
    code, out, err = command("check", write(tmp_path, changes))
    assert (code, out) == (2, "")
    assert f"{key}: " in err
    assert "spec.yaml:" in err


def test_a_specification_that_agrees_is_decided_on(command, digits, tmp_path):
    document(command, "declare", "digits", *PROTECTED)
    code, _, err = command(
        "check", write(tmp_path, {**BY_ONE, "data.declared_num_examples": 1400})
    )
    assert (code, err) == (0, "")


def test_single_examples_of_whole_users_are_refused(command, tmp_path):
    document(command, "prepare", "synthetic", *SMALL, "--users", "4")
    arguments = ("--unit", "user", "--user-feature", "user", "--size", "public")
    document(command, "declare", "synthetic_blobs", *arguments)
    changes = {"data.name": "synthetic_blobs", "search_space.expected_batch_size": 4}
    code, _, err = command("check", write(tmp_path, changes))
    assert code == 2
    assert "data.user_feature: null is not what is declared of synthetic_blobs" in err
    assert "allowed: 'user'" in err
    whole = {"data.user_feature": "user", "mechanism.examples_per_user": 2}
    code, _, err = command("check", write(tmp_path, {**changes, **whole}))
    assert code in (0, 3), err  # decided on, whatever four of four users cost


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1, "size": "public", "privacy_unit": "x"}',
        '{"format": 1, "size": "public", "privacy_unit": "example", "more": 1}',
    ],
)
def test_a_damaged_declaration_stops_everything(command, digits, home, tmp_path, text):
    (home / "data" / "digits" / "1.0.0" / FILE_NAME).write_text(text)
    code, _, err = command("check", write(tmp_path))
    assert code == 2
    assert f"declaration {home}" in err
    shown = document(command, "show", "digits")
    assert "declaration" in shown["problem"]
    assert shown["splits"] == []
    code, _, _ = command("data", "declare", "digits", *PROTECTED)
    assert code == 2
    document(command, "declare", "digits", *PROTECTED, "--replace")
