"""Reads a small YAML file into plain data and remembers where everything stood.

The reader takes a part of YAML 1.2 that holds no surprises:

- Scalars follow the YAML 1.2 core schema: ``1e-5`` is a number; ``yes``, ``on`` and
  ``2024-01-01`` are text; only ``true`` and ``false`` are booleans. Keys are always text.
- Tags, anchors and aliases are refused: tags name types to construct, and aliases let a few
  lines stand for gigabytes.
- A key may occur once in a mapping. The top level is one mapping, in one document.
- Size, depth and the number of values are bounded, so that reading ends soon whatever it reads.

JSON is YAML to this reader, too. Every refusal is a `SpecError` that names the place.
"""

import dataclasses
import difflib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, cast

import yaml
from yaml import events as yaml_events

from sweeps.errors import Problem, SpecError

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class YamlDocument:
    """What a file said and where it said it.

    Attributes:
        source: The file's name, as it was given.
        data: The top-level mapping: dicts with text keys, lists, text, numbers, booleans, None.
        key_places: Where each key stands, by key path.
        value_places: Where each value begins, by key path.
    """

    source: str
    data: dict[str, Any]
    key_places: Mapping[KeyPath, Place]
    value_places: Mapping[KeyPath, Place]

    def problem(self, path: KeyPath, message: str, *, at_key: bool = False) -> Problem:
        """A problem at the nearest place known for `path`.

        Args:
            path: The key path that the problem is about; it may lead to something absent.
            message: What is wrong and what is allowed.
            at_key: Point at the key rather than at its value.
        """
        place = Place(1, 1)
        if not at_key and path in self.value_places:
            place = self.value_places[path]
        else:
            for length in range(len(path), 0, -1):
                # An item of a list has no key: it is its own nearest place.
                known = self.key_places.get(path[:length]) or self.value_places.get(path[:length])
                if known is not None:
                    place = known
                    break
        return Problem(
            message=message,
            key_path=format_key_path(path),
            source=self.source,
            line=place.line,
            column=place.column,
        )

    def placed(self, error: SpecError) -> SpecError:
        """`error` with places for the problems that name a key path and have no place yet.

        For what is found wrong after reading, where the text is out of sight.

        Returns:
            The same problems in the same order, those newly placed as `problem` places them.
        """
        problems: list[Problem] = []
        for problem in error.problems:
            if problem.key_path and problem.source is None and problem.line is None:
                near = self.problem(self._path(problem.key_path), problem.message)
                problem = dataclasses.replace(near, key_path=problem.key_path)
            problems.append(problem)
        return SpecError(problems)

    def _path(self, text: str) -> KeyPath:
        """The path that `format_key_path` wrote as `text`, as far as this document has it."""
        nearest: KeyPath = ()
        for path in self.value_places:
            known = format_key_path(path)
            if known == text:
                return path
            if text.startswith((f"{known}.", f"{known}[")) and len(path) > len(nearest):
                nearest = path
        return (*nearest, text)  # leads to something absent


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


def suggestion(key: str, known: Iterable[str]) -> str:
    """`` (did you mean x?)`` where one of the known keys is near, else nothing."""
    near = difflib.get_close_matches(key[:64], list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def load_yaml(path: str | os.PathLike[str]) -> YamlDocument:
    """Reads a YAML file.

    Raises:
        SpecError: The file cannot be read, or is not the YAML described above.
    """
    source = os.fspath(path)
    return parse_yaml(_read_bytes(source), source=source)


def parse_yaml(text: str | bytes, *, source: str) -> YamlDocument:
    """Reads YAML text.

    Args:
        text: The text, or its UTF-8 bytes.
        source: The name to show in error messages.

    Raises:
        SpecError: The text is not the YAML described above.
    """
    # A lone surrogate has no UTF-8 form; what it becomes here is refused below.
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(raw) > MAX_BYTES:
        _refuse(source, f"is larger than {MAX_BYTES} bytes, the most that is read")
    try:
        decoded = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        _refuse(source, "is not UTF-8 text; allowed: a YAML file in UTF-8", Place(line, column))
    return _Reader(decoded, source).read()


def _read_bytes(source: str) -> bytes:
    try:
        # Looked at before it is opened: opening a pipe would wait for a writer.
        mode = os.stat(source).st_mode
        if stat.S_ISDIR(mode):
            _refuse(source, "is a directory; allowed: a YAML file")
        if not stat.S_ISREG(mode):
            _refuse(source, "is not a regular file; allowed: a YAML file")
        with open(source, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        _refuse(source, "there is no such file")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        _refuse(source, f"cannot be read: {reason or error}")


def _refuse(source: str, message: str, place: Place | None = None) -> NoReturn:
    line, column = place if place else (None, None)
    raise SpecError([Problem(message=message, source=source, line=line, column=column)]) from None


class _Reader:
    """Turns the events of one YAML stream into data.

    Events rather than PyYAML's constructors: they carry every position, build no objects of
    their own choosing, and stop early at whatever is out of bounds.
    """

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._events = _parse(text, Loader=yaml.SafeLoader)
        self._problems: list[Problem] = []
        self._key_places: dict[KeyPath, Place] = {}
        self._value_places: dict[KeyPath, Place] = {}
        self._values = 0

    def read(self) -> YamlDocument:
        self._next()  # stream start
        first = self._next()
        if isinstance(first, yaml_events.StreamEndEvent):
            _refuse(self._source, "is empty; allowed: a mapping of keys to values", Place(1, 1))
        root = self._next()
        if not isinstance(root, yaml_events.MappingStartEvent):
            message = f"the top level is {_kind(root)}; allowed: a mapping of keys to values"
            _refuse(self._source, message, _place(root))
        data = self._value(root, ())
        self._next()  # document end
        if not isinstance(extra := self._next(), yaml_events.StreamEndEvent):
            _refuse(self._source, "holds a second document; allowed: one", _place(extra))
        if self._problems:
            raise SpecError(self._problems)
        return YamlDocument(
            source=self._source,
            data=data,
            key_places=self._key_places,
            value_places=self._value_places,
        )

    def _next(self) -> yaml_events.Event:
        try:
            return next(self._events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = Place(mark.line + 1, mark.column + 1) if mark else None
            what = " ".join(part for part in (error.context, error.problem) if part)
            _refuse(self._source, f"is not YAML: {what}", place)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            # Control characters; escapes and versions with absurd numbers.
            what = shorten(" ".join(str(error).split()), 200)
            _refuse(self._source, f"is not YAML: {what}")

    def _note(self, event: yaml_events.Event, path: KeyPath, message: str) -> None:
        line, column = _place(event)
        self._problems.append(
            Problem(
                message=message,
                key_path=format_key_path(path),
                source=self._source,
                line=line,
                column=column,
            )
        )

    def _value(self, event: yaml_events.Event, path: KeyPath) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            message = f"holds more than {MAX_VALUES} values, the most that is read"
            _refuse(self._source, message, _place(event))
        if len(path) > MAX_DEPTH:
            message = f"is nested more than {MAX_DEPTH} levels deep, the most that is read"
            _refuse(self._source, message, _place(event))
        self._value_places[path] = _place(event)
        self._refuse_indirection(event, path)
        if isinstance(event, yaml_events.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml_events.SequenceStartEvent):
            return self._sequence(path)
        if isinstance(event, yaml_events.ScalarEvent):
            return self._scalar(event, path)
        return None  # an alias, which is on the list of problems by now

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
                _refuse(self._source, message, _place(key))
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
