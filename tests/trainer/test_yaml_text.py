"""YAML without surprises: numbers are numbers, words are words, and nothing is said twice."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import Fault, YamlError
from trainer.yaml_text import load_yaml, parse_yaml

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
    assert parse_yaml(json.dumps(data)).data == data


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_way_to_write_a_number(number):
    for text in (repr(number), f"{number:e}", f"{number:.17g}"):
        found = parse_yaml(f"x: {text}").data["x"]
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
    found = parse_yaml(f"x: {text}").data["x"]
    assert found == value
    assert type(found) is type(value)


def test_places_are_remembered():
    text = parse_yaml("a: 1\nb:\n  c: 2\n\n  d: [1]\n")
    assert text.key_places == {
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", "c"): (3, 3),
        ("b", "d"): (5, 3),
    }
    assert text.value_places[("b", "d", 0)] == (5, 7)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "a:\n  b: 1\n  b: 2",
            Fault(message="is given twice, first in line 2", path=("a", "b"), line=3, column=3),
        ),
        (
            "a: [&x 1]",
            Fault(
                message="anchor &x is not allowed; write each value itself",
                path=("a", 0),
                line=1,
                column=5,
            ),
        ),
        (
            "\n[1, 2]",
            Fault(
                message="the top level is a list; allowed: a mapping of keys to values",
                line=2,
                column=1,
            ),
        ),
        ("a: \x00", Fault(message="is not YAML: unacceptable character #x0000: special ")),
    ],
)
def test_a_fault_says_what_and_where(text, fault):
    with pytest.raises(YamlError) as refused:
        parse_yaml(text)
    (found,) = refused.value.faults
    assert found.message.startswith(fault.message)
    assert (found.path, found.line, found.column) == (fault.path, fault.line, fault.column)
    assert str(refused.value) == found.message


def test_all_faults_are_found_in_the_order_of_the_text():
    with pytest.raises(YamlError) as refused:
        parse_yaml("a: !x 1\na: 2\nb: &y 3\n")
    assert [fault.line for fault in refused.value.faults] == [1, 2, 3]


@given(st.text(max_size=60))
def test_anything_is_read_or_refused(text):
    try:
        data = parse_yaml(text).data
    except YamlError:
        return
    assert isinstance(data, dict)


@pytest.mark.parametrize(
    ("raw", "words"),
    [(b"a: \xff", "UTF-8"), (b"#" * (2 << 20), "larger"), (None, "there is no such file")],
)
def test_files_that_cannot_be_read(tmp_path, raw, words):
    path = tmp_path / "trial.yaml"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(YamlError, match=words):
        load_yaml(path)
