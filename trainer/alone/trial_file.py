"""What a person writes to describe one trial: the fields of `TrialConfig`, by their own names.

A file may say less than a `TrialConfig` holds, and `trainer.alone.resolution` adds it from the
data set: ``sampling_prob`` may be left out, ``expected_batch_size`` may be ``full`` and
``noise_multiplier`` may be ``calibrated``, to a ``target_epsilon``.

Every problem of names and types is found at once, each with its line, its value and what is
allowed. What single fields and their combinations may be is the business of the dataclasses.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from trainer.config import TrialConfig
from trainer.errors import ConfigError, YamlError
from trainer.yaml_text import format_key_path, load_yaml, quotes_hint

Lines = dict[str, int]
"""Dotted path of a key to its line."""

CALIBRATED = "calibrated"
FULL = "full"
TARGET = "target_epsilon"

_WORDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
# Where a word may stand for a number, and what may be left out although `TrialConfig` needs it.
_WORDS_FOR_NUMBERS = {"noise_multiplier": CALIBRATED, "expected_batch_size": FULL}
_ADDED = {"sampling_prob"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialFile:
    """What a file says, its names and types checked.

    Attributes:
        path: The file.
        fields: Fields of `TrialConfig` that it gives, sections as dicts; words for numbers still
            in place.
        target_epsilon: What the trial may cost, if it says so.
        lines: Where keys stand.
    """

    path: Path
    fields: Mapping[str, Any]
    target_epsilon: float | None
    lines: Lines

    def placed(self, error: Exception) -> ConfigError:
        """An error about a field with the line of that field."""
        message = str(error)
        line = self.lines.get(message.partition("=")[0])
        where = f"{self.path}" if line is None else f"{self.path}:{line}"
        return ConfigError(f"{where}: {message}")


def read_trial_file(path: Path) -> TrialFile:
    """Reads a trial's file.

    Raises:
        ConfigError: It cannot be read, or is not allowed; every problem has a line of its own.
    """
    data, lines = _read(path)
    problems: list[tuple[int, str]] = []

    def note(dotted: str, message: str) -> None:
        line = _line(lines, dotted)
        where = f"{path}:{line}" if line else f"{path}"
        problems.append((line, f"{where}: {message}"))

    target = data.pop(TARGET, None)
    if target is not None and not _fits(target, float):
        note(TARGET, _wrong(TARGET, target, float))
    fields = dict(_checked(TrialConfig, data, "", note))
    if problems:
        raise ConfigError("\n".join(message for _, message in sorted(problems)))
    return TrialFile(path=path, fields=fields, target_epsilon=target, lines=lines)


def _read(path: Path) -> tuple[dict[str, Any], Lines]:
    """What a file says, and where its keys stand."""
    try:
        text = load_yaml(path)
    except YamlError as error:
        problems: list[str] = []
        for fault in error.faults:
            where = f"{path}" if fault.line is None else f"{path}:{fault.line}"
            words = (where, format_key_path(fault.path), fault.message)
            problems.append(": ".join(part for part in words if part))
        raise ConfigError("\n".join(problems)) from None
    places = text.key_places.items()
    return text.data, {".".join(map(str, key)): place.line for key, place in places}


def _checked(kind: Any, data: Mapping[str, Any], prefix: str, note: Any) -> Iterator[Any]:
    """The fields of a dataclass that are well named and typed; `note` hears of the others."""
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name, value in data.items():
        dotted = prefix + name
        if name not in names:
            allowed = ", ".join(names if prefix else [*names, TARGET])
            note(dotted, f"{dotted}: unknown field{_suggestion(dotted)}; allowed: {allowed}")
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, dict):
                allowed = ", ".join(field.name for field in dataclasses.fields(hints[name]))
                note(dotted, f"{dotted}={value!r}: allowed is a section with {allowed}")
                continue
            yield name, dict(_checked(hints[name], value, f"{name}.", note))
        elif not prefix and value == _WORDS_FOR_NUMBERS.get(name, ...):
            yield name, value
        elif not _fits(value, hints[name]):
            note(dotted, _wrong(dotted, value, hints[name]))
        else:
            yield name, _in_form(value, hints[name])
    for field in dataclasses.fields(kind):
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in data and (prefix or field.name not in _ADDED):
            note(
                prefix,
                f"{prefix}{field.name}: is missing; allowed is "
                f"{_allowed(prefix + field.name, hints[field.name])}",
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML is of a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments and not isinstance(value, bool)
    if origin is tuple:
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


def _in_form(value: Any, hint: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    # A whole number for a fraction: equal configurations shall be equal to the last letter.
    fraction = hint is float or (float in get_args(hint))
    return float(value) if fraction and value is not None else value


def _wrong(dotted: str, value: Any, hint: Any) -> str:
    return f"{dotted}={value!r}: allowed is {_allowed(dotted, hint)}{quotes_hint(value)}"


def _allowed(dotted: str, hint: Any) -> str:
    """What a field takes, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, typing.Union):
        words = " or ".join(_allowed(dotted, each) for each in arguments if each is not type(None))
        return f"{words}, or null" if type(None) in arguments else words
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return "a list of whole numbers"
    if dataclasses.is_dataclass(hint):
        return f"a section with {', '.join(field.name for field in dataclasses.fields(hint))}"
    word = _WORDS_FOR_NUMBERS.get(dotted)
    return _WORDS[hint] + (f" or the word {word}" if word else "")


def _suggestion(dotted: str) -> str:
    """A field whose name is near, first where the unknown one stands, then anywhere."""
    everywhere = [TARGET]
    for name, hint in typing.get_type_hints(TrialConfig).items():
        inside = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        everywhere += [name, *(f"{name}.{field.name}" for field in inside)]
    prefix, _, name = dotted.rpartition(".")
    here = [each for each in everywhere if each.rpartition(".")[0] == prefix]
    near = difflib.get_close_matches(dotted[:64], here, n=1, cutoff=0.75)
    elsewhere = [each for each in everywhere if each.rpartition(".")[2] == name]
    near = near or elsewhere or difflib.get_close_matches(dotted[:64], everywhere, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _line(lines: Lines, dotted: str) -> int:
    return lines.get(dotted.rstrip("."), 0)
