"""The YAML reader: what scalars become, what is refused, and that places are right."""

import dataclasses
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.errors import Problem, SpecError
from sweeps.spec.yaml_source import load_yaml, parse_yaml, suggestion
from trainer.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, format_key_path, show


def read(text):
    return parse_yaml(text, source="x.yaml").data


def refusal(text):
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, source="x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1.0e-5", 1e-5),
        ("1E+3", 1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-0.25", -0.25),
        ("8", 8),
        ("+8", 8),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("'8'", "8"),
        ('"true"', "true"),
        ("|\n  8", "8"),
    ],
)
def test_scalars_follow_the_yaml_1_2_core_schema(text, value):
    found = read(f"a: {text}")["a"]
    assert found == value
    assert type(found) is type(value)


def test_not_a_number_is_read_as_the_float():
    assert math.isnan(read("a: .nan")["a"])


def test_keys_are_text():
    assert read("{1: a, true: b, null: c}") == {"1": "a", "true": "b", "null": "c"}


def test_json_is_read():
    assert read('{"a":[1,2.5,1e-05,null,true,{"b":"c"}]}') == {
        "a": [1, 2.5, 1e-5, None, True, {"b": "c"}]
    }


def test_characters_that_json_writes_as_two_escapes_are_read_whole():
    assert read(r'{"a": "\ud83d\ude00"}') == {"a": "\U0001f600"}
    assert refusal(r'{"a": "\ud83d"}') == (
        "x.yaml:1:7: a: '\\ud83d' holds half a character; allowed: whole ones"
    )


def test_byte_order_mark_is_skipped():
    assert read(b"\xef\xbb\xbfa: 1") == {"a": 1}


def test_every_key_and_value_has_its_place():
    document = parse_yaml("a: 1\nb:\n  - x\n  - c: {d: e}\n", source="x.yaml")
    assert document.key_places == {
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", 1, "c"): (4, 5),
        ("b", 1, "c", "d"): (4, 9),
    }
    assert document.value_places[("a",)] == (1, 4)
    assert document.value_places[("b", 0)] == (3, 5)
    assert document.value_places[("b", 1, "c", "d")] == (4, 12)


def test_a_problem_points_to_the_nearest_known_place():
    document = parse_yaml("a: 1\nb:\n  c: 2\n", source="x.yaml")
    assert str(document.problem(("b", "c"), "bad")) == "x.yaml:3:6: b.c: bad"
    assert str(document.problem(("b", "c"), "bad", at_key=True)) == "x.yaml:3:3: b.c: bad"
    assert str(document.problem(("b", "absent"), "bad")) == "x.yaml:2:1: b.absent: bad"
    assert str(document.problem(("absent",), "bad")) == "x.yaml:1:1: absent: bad"


NESTED = parse_yaml("a: 1\nb:\n  c: 2\n  d.e: [5, {f: 6}]\nbc: {'x y': 3}\n", source="x.yaml")


@pytest.mark.parametrize(
    ("key_path", "place"),
    [
        ("a", "1:4"),
        ("b.c", "3:6"),
        ("b", "3:3"),
        ("bc", "5:5"),
        ("b.'d.e'[0]", "4:9"),
        ("b.'d.e'[1].f", "4:16"),
        ("bc.'x y'", "5:13"),
        # Absent: the place of what is nearest above.
        ("b.absent", "2:1"),
        ("b.absent[3].c", "2:1"),
        ("b.c.absent", "3:3"),
        ("b.'d.e'[7]", "4:3"),
        ("b.'d.e'[1].absent", "4:12"),
        ("bca", "1:1"),
        ("absent.c", "1:1"),
    ],
)
def test_a_problem_found_without_the_text_is_placed(key_path, place):
    error = NESTED.placed(SpecError([Problem(message="bad", key_path=key_path)]))
    assert str(error) == f"x.yaml:{place}: {key_path}: bad"


def test_every_value_is_placed_where_it_begins():
    for path, place in NESTED.value_places.items():
        if path:
            problem = Problem(message="bad", key_path=format_key_path(path))
            (placed,) = NESTED.placed(SpecError([problem])).problems
            assert placed == dataclasses.replace(
                problem, source="x.yaml", line=place.line, column=place.column
            )


def test_placing_leaves_other_problems_and_their_order_alone():
    problems = (
        Problem(message="of the whole"),
        Problem(message="bad", key_path="bc"),
        Problem(message="of another file", key_path="a", source="y.yaml", line=7, column=2),
        Problem(message="of a file that has no lines", key_path="a", source="y.yaml"),
        Problem(message="bad", key_path="a"),
    )
    error = SpecError(problems)
    placed = NESTED.placed(error).problems
    assert [problem.line for problem in placed] == [None, 5, 7, None, 1]
    assert (placed[0], placed[2], placed[3]) == (problems[0], problems[2], problems[3])
    assert error.problems == problems


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1:1: is empty; allowed: a mapping of keys to values"),
        ("# only a comment\n", "x.yaml:1:1: is empty"),
        ("- 1\n- 2\n", "x.yaml:1:1: the top level is a list; allowed: a mapping"),
        ("\nhello", "x.yaml:2:1: the top level is a single value; allowed: a mapping"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: holds a second document; allowed: one"),
        ("a: [1, 2\nb: 3", "x.yaml:2:2: is not YAML: while parsing a flow sequence expected"),
        ("a:\n\t- b", "x.yaml:2:1: is not YAML: while scanning for the next token found"),
        ("a: b: c", "x.yaml:1:5: is not YAML: mapping values are not allowed here"),
        ("a: \x07", "x.yaml: is not YAML: unacceptable character"),
        ('a: "\\UFFFFFFFF"', "x.yaml: is not YAML: "),
        ("%YAML " + "1" * 5000 + ".1\n---\na: 1", "x.yaml: is not YAML: "),
        ("%YAML 3.0\n---\na: 1", "x.yaml:1:1: is not YAML: found incompatible YAML document"),
        (b"a: \xff\xfe\n", "x.yaml:1:4: is not UTF-8 text; allowed: a YAML file in UTF-8"),
        (b"\x80\x04\x95", "x.yaml:1:1: is not UTF-8 text"),
        ("a: 1\n".encode("utf-16"), "x.yaml:1:1: is not UTF-8 text"),
        ("a: \ud800", "x.yaml:1:4: is not UTF-8 text"),
        ("a: 1\nb: 2\na: 3", "x.yaml:3:1: a: is given twice, first in line 1"),
        ("a: {b: 1, 'b': 2}", "x.yaml:1:11: a.b: is given twice, first in line 1"),
        ("a: !!python/object/apply:os.system [ls]", "x.yaml:1:4: a: tag 'tag:yaml.org,2002:py"),
        ("a: !!str 8", "x.yaml:1:4: a: tag 'tag:yaml.org,2002:str' is not allowed; allowed: no"),
        ("a: ! 8", "x.yaml:1:4: a: tag '!' is not allowed; allowed: no tags"),
        ("!!map {a: 1}", "x.yaml:1:1: tag 'tag:yaml.org,2002:map' is not allowed"),
        ("!!str a: 1", "x.yaml:1:1: a: tag"),
        ("a: &x 1", "x.yaml:1:4: a: anchor &x is not allowed; write each value itself"),
        ("&x a: 1", "x.yaml:1:1: a: anchor &x is not allowed"),
        ("a: 1\nb: *a", "x.yaml:2:4: b: alias *a is not allowed; write the value itself"),
        ("? [a]\n: 1", "x.yaml:1:3: a key is a list; allowed: a name"),
        ("? {a: b}\n: 1", "x.yaml:1:3: a key is a mapping; allowed: a name"),
        ("*a : 1", "x.yaml:1:1: a key is an alias; allowed: a name"),
        ("a: " + "9" * 41, "x.yaml:1:4: a: has 41 digits; allowed: at most 40"),
        ("a: 0x" + "f" * 5000, "x.yaml:1:4: a: has 5002 digits; allowed: at most 40"),
        ("a: " + "[" * 1000, f"nested more than {MAX_DEPTH} levels deep, the most that is read"),
        ("a: [" + "1," * MAX_VALUES + "]", f"holds more than {MAX_VALUES} values, the most"),
        ("#" * (MAX_BYTES + 1), f"x.yaml: is larger than {MAX_BYTES} bytes, the most that is"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refusals(text, message):
    assert message in refusal(text)


def test_aliases_cannot_make_much_of_little():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    message = refusal("\n".join(lines))
    assert "anchor &a0 is not allowed" in message
    assert message.splitlines()[-1] == "... and 61 more"


def test_all_structural_problems_are_listed():
    message = refusal("a: !x 1\na: 2\nb: &y 3\n")
    assert [line.split(":")[1] for line in message.splitlines()] == ["1", "2", "3"]


def test_files(tmp_path):
    good = tmp_path / "good.yaml"
    good.write_text("a: 1e-5\n")
    assert load_yaml(good).data == {"a": 1e-5}
    assert load_yaml(good).source == str(good)

    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    os.mkfifo(tmp_path / "pipe")
    for path, message in [
        (tmp_path / "absent.yaml", "there is no such file"),
        (tmp_path, "is a directory; allowed: a YAML file"),
        (tmp_path / "pipe", "is not a regular file; allowed: a YAML file"),
        (large, "is larger than"),
        (good / "below", "cannot be read: Not a directory"),
        ("a\0b", "cannot be read: embedded null byte"),
    ]:
        with pytest.raises(SpecError) as caught:
            load_yaml(path)
        assert str(caught.value).startswith(f"{path}: {message}")


def test_words_for_messages():
    assert format_key_path(("a", "b", 2, "c")) == "a.b[2].c"
    assert format_key_path(("a", "odd key\x1b")) == "a.'odd key\\x1b'"
    assert [show(v) for v in (None, True, "x", 1e-11, {"a": [1]})] == [
        "null",
        "true",
        "'x'",
        "1e-11",
        '{"a": [1]}',
    ]
    assert len(show("x" * 1000)) == 60
    assert suggestion("target_epsilo", ["target_epsilon", "name"]) == (
        " (did you mean target_epsilon?)"
    )
    assert suggestion("zzz", ["name"]) == ""


def test_a_spec_error_needs_a_problem_and_shows_a_bounded_number():
    with pytest.raises(ValueError, match="at least one problem"):
        SpecError([])
    text = str(SpecError([Problem(message=f"m{i}") for i in range(60)]))
    assert text.splitlines()[-1] == "... and 10 more"
    assert SpecError.exit_code == 2


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.text(max_size=60),
        st.text(alphabet="ab01 :-[]{},#&*!|>'\"%@`?\n\t\\~.eExuU", max_size=60),
    )
)
def test_whatever_is_read_gives_data_or_a_spec_error(text):
    problems = []
    try:
        assert isinstance(parse_yaml(text, source="x.yaml").data, dict)
    except SpecError as error:
        problems = error.problems
    assert all(str(problem).isprintable() for problem in problems)
