"""YAML without surprises: numbers are numbers, words are words, and nothing is said twice."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.alone.yaml_text import parse_yaml, read_yaml
from trainer.errors import ConfigError

NAMES = st.text("abcdefghij_", min_size=1, max_size=8)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
DATA = st.dictionaries(
    NAMES,
    st.recursive(
        SCALARS, lambda d: st.lists(d, max_size=3) | st.dictionaries(NAMES, d, max_size=3)
    ),
    max_size=4,
)


@settings(max_examples=50)
@given(DATA)
def test_json_is_read_as_it_was_written(data):
    assert parse_yaml(json.dumps(data))[0] == data


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_way_to_write_a_number(number):
    for text in (repr(number), f"{number:e}", f"{number:.17g}"):
        found = parse_yaml(f"x: {text}")[0]["x"]
        assert found == float(text)
        assert type(found) in (int, float)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("010", 10),
        ("+3", 3),
        ("yes", "yes"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("true", True),
        ("~", None),
        ("", None),
        ("'1e-5'", "1e-5"),
        ("-.inf", float("-inf")),
        ("<<", "<<"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    found = parse_yaml(f"x: {text}")[0]["x"]
    assert found == value
    assert type(found) is type(value)


def test_lines_are_remembered():
    assert parse_yaml("a: 1\nb:\n  c: 2\n\n  d: [1]\n")[1] == {"a": 1, "b": 2, "b.c": 3, "b.d": 5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2", "line 2: a is given twice, first in line 1"),
        ("a:\n  b: 1\n  b: 2", "line 3: a.b is given twice, first in line 2"),
        ("a: &x 1", "anchor &x"),
        ("a: *x", "alias *x"),
        ("a: !!python/object:os.system 1", "tag"),
        ("a: !!int 1", "tag"),
        ("? [1]\n: 2", "a key is no name"),
        ("[1, 2]", "the top level is no mapping"),
        ("", "the top level is no mapping"),
        ("a: [1", "is not YAML"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("a: \x00", "is not YAML"),
        (r'a: "\ud800"', "half a character"),
        (f"a: {'9' * 5000}", "5000 digits"),
        ("a: " + "[" * 40 + "]" * 40, "nested"),
        ("a: " + "[" * 20000, "nested"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_yaml(text)


@given(st.text(max_size=60))
def test_anything_is_read_or_refused(text):
    try:
        data, _ = parse_yaml(text)
    except ConfigError:
        return
    assert isinstance(data, dict)


@pytest.mark.parametrize(
    ("raw", "words"), [(b"a: \xff", "UTF-8"), (b"#" * (2 << 20), "larger"), (None, "No such file")]
)
def test_files_that_cannot_be_read(tmp_path, raw, words):
    path = tmp_path / "trial.yaml"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(ConfigError, match=words) as refused:
        read_yaml(path)
    assert str(path) in str(refused.value)
