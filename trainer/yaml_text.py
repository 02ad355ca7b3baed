"""Reads a small YAML file into plain data and remembers where everything stood.

The reader takes a part of YAML 1.2 that holds no surprises:

- Scalars follow the YAML 1.2 core schema: ``1e-5`` is a number; ``yes``, ``on`` and
  ``2024-01-01`` are text; only ``true`` and ``false`` are booleans. Keys are always text.
- Tags, anchors and aliases are refused: tags name types to construct, and aliases let a few
  lines stand for gigabytes.
- A key may occur once in a mapping. The top level is one mapping, in one document.
- Size, depth and the number of values are bounded, so that reading ends soon whatever it reads.

JSON is YAML to this reader, too. Every refusal is a `YamlError` that names the place; whoever
reads says in words of its own which file it was.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, cast

import yaml
from yaml import events as yaml_events

from trainer.errors import Fault, YamlError

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 16
MAX_VALUES = 20_000
MAX_INT_LENGTH = 40

KeyPath = tuple[str | int, ...]

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_TRUE = re.compile(r"(?:true|True|TRUE)\Z")
_FALSE = re.compile(r"(?:false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_INTS = (_INT, _OCTAL, _HEX)
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z")
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+\Z")


# PyYAML's stubs leave this one untyped.
_parse = cast("Callable[..., Iterator[yaml_events.Event]]", vars(yaml)["parse"])


class Place(NamedTuple):
    """A position in the text; both numbers count from 1."""

    line: int
    column: int


class YamlText(NamedTuple):
    """What a text said and where it said it.

    Attributes:
        data: The top-level mapping: dicts with text keys, lists, text, numbers, booleans, None.
        key_places: Where each key stands, by key path.
        value_places: Where each value begins, by key path.
    """

    data: dict[str, Any]
    key_places: dict[KeyPath, Place]
    value_places: dict[KeyPath, Place]


def load_yaml(path: str | os.PathLike[str]) -> YamlText:
    """Reads a YAML file.

    Raises:
        YamlError: The file cannot be read, or is not the YAML described above.
    """
    return parse_yaml(_read_bytes(os.fspath(path)))


def parse_yaml(text: str | bytes) -> YamlText:
    """Reads YAML text.

    Args:
        text: The text, or its UTF-8 bytes.

    Raises:
        YamlError: The text is not the YAML described above.
    """
    # A lone surrogate has no UTF-8 form; what it becomes here is refused below.
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_BYTES:
        _refuse(f"is larger than {MAX_BYTES} bytes, the most that is read")
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        _refuse("is not UTF-8 text; allowed: a YAML file in UTF-8", Place(line, column))
    return _Reader(decoded).read()


def format_key_path(path: KeyPath) -> str:
    """``("search_space", "optimizer", 2)`` as ``search_space.optimizer[2]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if _PLAIN_KEY.match(part) else shorten(repr(part))
            text += f".{name}" if text else name
    return text


def shorten(text: str, limit: int = 60) -> str:
    """`text`, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show(value: object) -> str:
    """A value as a person wrote it, short enough for one line of an error message."""
    if value is None or isinstance(value, bool | list | dict):
        return shorten(json.dumps(value, default=repr))
    return shorten(repr(value))


def quotes_hint(value: object) -> str:
    """A hint where `value` is text that would be a number without its quotes."""
    is_number = isinstance(value, str) and (_INT.match(value) or _FLOAT.match(value))
    return " (write it without quotes)" if is_number else ""


def _read_bytes(path: str) -> bytes:
    try:
        # Looked at before it is opened: opening a pipe would wait for a writer.
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            _refuse("is a directory; allowed: a YAML file")
        if not stat.S_ISREG(mode):
            _refuse("is not a regular file; allowed: a YAML file")
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        _refuse("there is no such file")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        _refuse(f"cannot be read: {reason or error}")


def _refuse(message: str, place: Place | None = None) -> NoReturn:
    line, column = place if place else (None, None)
    raise YamlError([Fault(message=message, line=line, column=column)]) from None


class _Reader:
    """Turns the events of one YAML stream into data.

    Events rather than PyYAML's constructors: they carry every position, build no objects of
    their own choosing, and stop early at whatever is out of bounds.
    """

    def __init__(self, text: str) -> None:
        self._events = _parse(text, Loader=yaml.SafeLoader)
        self._faults: list[Fault] = []
        self._key_places: dict[KeyPath, Place] = {}
        self._value_places: dict[KeyPath, Place] = {}
        self._values = 0

    def read(self) -> YamlText:
        self._next()  # stream start
        first = self._next()
        if isinstance(first, yaml_events.StreamEndEvent):
            _refuse("is empty; allowed: a mapping of keys to values", Place(1, 1))
        root = self._next()
        if not isinstance(root, yaml_events.MappingStartEvent):
            message = f"the top level is {_kind(root)}; allowed: a mapping of keys to values"
            _refuse(message, _place(root))
        data = self._value(root, ())
        self._next()  # document end
        if not isinstance(extra := self._next(), yaml_events.StreamEndEvent):
            _refuse("holds a second document; allowed: one", _place(extra))
        if self._faults:
            raise YamlError(self._faults)
        return YamlText(data, self._key_places, self._value_places)

    def _next(self) -> yaml_events.Event:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Place(mark.line + 1, mark.column + 1) if mark else None
            what = " ".join(part for part in (error.context, error.problem) if part)
            _refuse(f"is not YAML: {what}", place)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # Control characters; escapes and versions with absurd numbers.
            what = shorten(" ".join(str(error).split()), 200)
            _refuse(f"is not YAML: {what}")

    def _note(self, event: yaml_events.Event, path: KeyPath, message: str) -> None:
        line, column = _place(event)
        self._faults.append(Fault(message=message, path=path, line=line, column=column))

    def _value(self, event: yaml_events.Event, path: KeyPath) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            message = f"holds more than {MAX_VALUES} values, the most that is read"
            _refuse(message, _place(event))
        if len(path) > MAX_DEPTH:
            message = f"is nested more than {MAX_DEPTH} levels deep, the most that is read"
            _refuse(message, _place(event))
        self._value_places[path] = _place(event)
        self._refuse_indirection(event, path)
        if isinstance(event, yaml_events.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml_events.SequenceStartEvent):
            return self._sequence(path)
        if isinstance(event, yaml_events.ScalarEvent):
            return self._scalar(event, path)
        return None  # an alias, which is on the list of faults by now

    def _refuse_indirection(self, event: yaml_events.Event, path: KeyPath) -> None:
        anchor = getattr(event, "anchor", None)
        anchor = None if anchor is None else shorten(str(anchor))
        if isinstance(event, yaml_events.AliasEvent):
            self._note(event, path, f"alias *{anchor} is not allowed; write the value itself")
        elif anchor is not None:
            self._note(event, path, f"anchor &{anchor} is not allowed; write each value itself")
        if (tag := getattr(event, "tag", None)) is not None:
            self._note(event, path, f"tag {shorten(str(tag))!r} is not allowed; allowed: no tags")

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        while not isinstance(key := self._next(), yaml_events.MappingEndEvent):
            if not isinstance(key, yaml_events.ScalarEvent):
                message = f"a key is {_kind(key)}; allowed: a name"
                _refuse(message, _place(key))
            name = str(key.value)
            key_path = (*path, name)
            self._refuse_indirection(key, key_path)
            if name in mapping:
                first = self._key_places[key_path].line
                self._note(key, key_path, f"is given twice, first in line {first}")
            else:
                self._key_places[key_path] = _place(key)
            mapping[name] = self._value(self._next(), key_path)
        return mapping

    def _sequence(self, path: KeyPath) -> list[Any]:
        sequence: list[Any] = []
        while not isinstance(item := self._next(), yaml_events.SequenceEndEvent):
            sequence.append(self._value(item, (*path, len(sequence))))
        return sequence

    def _scalar(self, event: yaml_events.ScalarEvent, path: KeyPath) -> Any:
        text = str(event.value)
        plain = not event.style and event.tag is None
        if not plain:
            return self._whole_characters(text, event, path)
        if len(text) > MAX_INT_LENGTH and any(form.match(text) for form in _INTS):
            self._note(event, path, f"has {len(text)} digits; allowed: at most {MAX_INT_LENGTH}")
            return None
        return _resolve(text)

    def _whole_characters(
        self, text: str, event: yaml_events.ScalarEvent, path: KeyPath
    ) -> str | None:
        r"""Joins what JSON writes as two escapes, ``\ud83d\ude00``, to one character."""
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            self._note(event, path, f"{show(text)} holds half a character; allowed: whole ones")
            return None


def _resolve(text: str) -> bool | int | float | str | None:
    """The value of a plain scalar in the YAML 1.2 core schema."""
    if _NULL.match(text):
        return None
    if _TRUE.match(text):
        return True
    if _FALSE.match(text):
        return False
    if _INT.match(text):
        return int(text)
    if _OCTAL.match(text):
        return int(text[2:], 8)
    if _HEX.match(text):
        return int(text[2:], 16)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL_FLOAT.match(text):
        return float(text.replace(".", ""))
    return text


def _place(event: yaml_events.Event) -> Place:
    mark = event.start_mark
    return Place(int(mark.line) + 1, int(mark.column) + 1)


def _kind(event: yaml_events.Event) -> str:
    if isinstance(event, yaml_events.MappingStartEvent):
        return "a mapping"
    if isinstance(event, yaml_events.SequenceStartEvent):
        return "a list"
    if isinstance(event, yaml_events.AliasEvent):
        return "an alias"
    return "a single value"
