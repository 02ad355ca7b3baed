"""A specification's text as data, and every problem with the place in the text that it is about.

What YAML is taken, and what it becomes, is in `trainer.yaml_text`. Every refusal is a `SpecError`
that names the file and the place.
"""

import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from sweeps.errors import Problem, SpecError
from trainer import yaml_text
from trainer.errors import YamlError
from trainer.yaml_text import KeyPath, Place, YamlText, format_key_path


@dataclasses.dataclass(frozen=True, kw_only=True)
class YamlDocument:
    """What a file said and where it said it.

    Attributes:
        source: The file's name, as it was given; None where there is no text, and so no place.
        data: The top-level mapping: dicts with text keys, lists, text, numbers, booleans, None.
        key_places: Where each key stands, by key path.
        value_places: Where each value begins, by key path.
    """

    source: str | None
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
        if self.source is None:
            return Problem(message=message, key_path=format_key_path(path))
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


def suggestion(key: str, known: Iterable[str]) -> str:
    """`` (did you mean x?)`` where one of the known keys is near, else nothing."""
    near = difflib.get_close_matches(key[:64], list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def load_yaml(path: str | os.PathLike[str]) -> YamlDocument:
    """Reads a YAML file.

    Raises:
        SpecError: The file cannot be read, or is not the YAML that is taken.
    """
    return _document(os.fspath(path), lambda: yaml_text.load_yaml(path))


def parse_yaml(text: str | bytes, *, source: str) -> YamlDocument:
    """Reads YAML text.

    Args:
        text: The text, or its UTF-8 bytes.
        source: The name to show in error messages.

    Raises:
        SpecError: The text is not the YAML that is taken.
    """
    return _document(source, lambda: yaml_text.parse_yaml(text))


def document_of(data: Mapping[str, Any]) -> YamlDocument:
    """The document that a mapping would have been read from.

    Raises:
        SpecError: It holds what YAML could not have said: each place is named.
    """
    problems = [
        Problem(
            message=f"{value!r} of type {type(value).__name__} is not allowed; allowed are "
            "mappings with text as keys, lists, text, numbers, true, false and null",
            key_path=format_key_path(path),
        )
        for path, value in _foreign(data, ())
    ]
    if problems:
        raise SpecError(problems)
    return YamlDocument(source=None, data=_plain(data), key_places={}, value_places={})


def _foreign(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """What of a value YAML could not have said, and where it is."""
    if isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            if isinstance(key, str):
                yield from _foreign(item, (*path, key))
            else:
                yield path, key
    elif isinstance(value, list | tuple):
        for number, item in enumerate(cast("Sequence[Any]", value)):
            yield from _foreign(item, (*path, number))
    elif type(value) not in (str, int, float, bool, type(None)):
        yield path, value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value


def _document(source: str, read: Callable[[], YamlText]) -> YamlDocument:
    try:
        return YamlDocument(source=source, **read()._asdict())
    except YamlError as error:
        problems = [
            Problem(
                message=fault.message,
                key_path=format_key_path(fault.path),
                source=source,
                line=fault.line,
                column=fault.column,
            )
            for fault in error.faults
        ]
    raise SpecError(problems)
