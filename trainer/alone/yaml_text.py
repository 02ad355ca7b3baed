"""A small part of YAML 1.2 as plain data, with the line of every key.

Scalars follow the core schema of YAML 1.2: ``1e-5`` is a number, ``yes``, ``on`` and dates are
text, ``010`` is ten. A key may occur once. Anchors, aliases and tags are refused: tags name types
to construct, and aliases let a few lines stand for gigabytes.
"""

import re
from pathlib import Path
from typing import Any, NoReturn

import yaml

from trainer.errors import ConfigError

_MAX_BYTES = 1024 * 1024
_MAX_DIGITS = 40
_MAX_DEPTH = 16

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z")

Lines = dict[str, int]
"""Dotted path of a key to its line."""


class _Loader(yaml.SafeLoader):
    """Composes nodes and constructs nothing."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"line {line}: alias *{event.anchor}; allowed is the value itself")
        if event.anchor is not None:
            raise ConfigError(f"line {line}: anchor &{event.anchor}; allowed are none")
        if event.tag is not None:
            raise ConfigError(f"line {line}: tag {event.tag!r}; allowed are none")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> tuple[dict[str, Any], Lines]:
    """Reads a file whose top level is one mapping.

    Returns:
        Dicts with text keys, lists, text, numbers, booleans and None; and where keys stand.

    Raises:
        ConfigError: The file cannot be read, or is not such YAML.
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {_MAX_BYTES} bytes, the most that is read")
    try:
        return parse_yaml(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; allowed is a YAML file") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse_yaml(text: str) -> tuple[dict[str, Any], Lines]:
    """Reads a text, as `read_yaml` does a file."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{where}is not YAML: {what}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())[:200]}") from None
    except RecursionError:
        raise ConfigError(f"is nested more than {_MAX_DEPTH} levels deep") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("the top level is no mapping; allowed is one of fields to values")
    lines: Lines = {}
    return _mapping(root, (), lines), lines


def _value(node: Any, path: tuple[str, ...], lines: Lines) -> Any:
    if len(path) > _MAX_DEPTH:
        _refuse(node, f"is nested more than {_MAX_DEPTH} levels deep")
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, (*path, str(i)), lines) for i, each in enumerate(node.value)]
    return _characters(node) if node.style else _scalar(node)


def _mapping(node: yaml.MappingNode, path: tuple[str, ...], lines: Lines) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            _refuse(key, "a key is no name; allowed is a name")
        name = str(key.value)
        dotted = ".".join((*path, name))
        if name in found:
            _refuse(key, f"{dotted} is given twice, first in line {lines[dotted]}")
        lines[dotted] = key.start_mark.line + 1
        found[name] = _value(value, (*path, name), lines)
    return found


def _scalar(node: yaml.ScalarNode) -> Any:
    text = str(node.value)
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        if len(text) > _MAX_DIGITS:
            _refuse(node, f"a number has {len(text)} digits; allowed are {_MAX_DIGITS}")
        return int(text)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL_FLOAT.match(text):
        return float(text.replace(".", ""))
    return text


def _characters(node: yaml.ScalarNode) -> str:
    r"""Joins what JSON writes as two escapes, ``\ud83d\ude00``, to one character."""
    try:
        return str(node.value).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        _refuse(node, "a text holds half a character; allowed are whole ones")


def _refuse(node: Any, message: str) -> NoReturn:
    raise ConfigError(f"line {node.start_mark.line + 1}: {message}")


def looks_like_number(value: object) -> bool:
    """Whether a text would be a number without its quotes."""
    return isinstance(value, str) and bool(_INT.match(value) or _FLOAT.match(value))
