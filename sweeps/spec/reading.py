"""From YAML to a specification, or to every reason why it is none.

All problems are found at once. Each is said with its line, its value and what is allowed instead,
and in no word of the validator's.
"""

import os
from typing import cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sweeps.errors import Problem, SpecError
from sweeps.spec.allowed_domains import AllowedDomains
from sweeps.spec.refusals import Allowed, refusals_in
from sweeps.spec.scheduler_spec import SCHEDULERS
from sweeps.spec.search_spec import SEARCHES
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.spec.yaml_source import YamlDocument, load_yaml, parse_yaml, suggestion
from trainer.yaml_text import KeyPath, quotes_hint, show


def load_spec(path: str | os.PathLike[str]) -> SweepSpec:
    """Reads a specification from a YAML file.

    Raises:
        SpecError: The file cannot be read or is not allowed; every problem is listed.
    """
    return validate_spec(load_yaml(path))


# The sections that come in several forms, told apart by their names.
_VARIANTS: dict[str | int, dict[str, type[BaseModel]]] = {
    "scheduler": SCHEDULERS,
    "search": SEARCHES,
}


def parse_spec(text: str | bytes, *, source: str = "<spec>") -> SweepSpec:
    """Reads a specification from YAML or JSON text.

    Args:
        text: The text, or its UTF-8 bytes.
        source: The name to show in error messages.

    Raises:
        SpecError: The text is not allowed; every problem is listed.
    """
    return validate_spec(parse_yaml(text, source=source))


def validate_spec(document: YamlDocument) -> SweepSpec:
    """Turns what a file said into a specification.

    A caller who keeps the document can still say later where something stands in it.

    Raises:
        SpecError: The document is not allowed; every problem is listed, in the order of the text.
    """
    try:
        return SweepSpec.model_validate(document.data)
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = [problem for detail in details for problem in _problems(document, detail)]
    raise SpecError(sorted(problems, key=lambda p: (p.line or 0, p.column or 0)))


def _problems(document: YamlDocument, detail: ErrorDetails) -> list[Problem]:
    """Says one of pydantic's findings so that a person can mend it."""
    path, section, allowed = _locate(detail["loc"])
    value: object = detail["input"]
    if refusals := refusals_in(detail):
        return [document.problem((*path, *p), text, at_key=at_key) for p, text, at_key in refusals]
    match detail["type"]:
        case "missing":
            message, at_key = f"is missing; allowed: {allowed}", True
        case "extra_forbidden":
            names = tuple(section.model_fields) if section else ()
            key = str(path[-1])
            hint = suggestion(key, names) or _elsewhere(key, path[0])
            message, at_key = f"unknown key{hint}; allowed: {', '.join(names)}", True
        case "union_tag_not_found" if isinstance(value, dict):
            message, at_key = f"is missing; allowed: one of {_names(path)}", True
            path = (*path, "name")
        case "union_tag_invalid":
            name = cast("dict[str, object]", value).get("name")
            message = f"{show(name)} is not allowed; allowed: one of {_names(path)}"
            path, at_key = (*path, "name"), False
        case kind:
            hint = quotes_hint(value) if kind in ("float_type", "int_type") else ""
            message, at_key = f"{show(value)} is not allowed{hint}; allowed: {allowed}", False
    return [document.problem(path, message, at_key=at_key)]


def _locate(loc: tuple[int | str, ...]) -> tuple[KeyPath, type[BaseModel] | None, str]:
    """Follows pydantic's location into the models.

    Returns:
        The key path in the text, the section that holds the last key, and what is allowed there.
    """
    path: KeyPath = ()
    section: type[BaseModel] | None = None
    model: type[BaseModel] | None = SweepSpec
    allowed = "a mapping of keys to values"
    for part in loc:
        if len(path) == 1 and model is None and part in (kinds := _VARIANTS.get(path[0], {})):
            model = kinds[part]  # pydantic names the variant; the text does not
            continue
        path, section = (*path, part), model
        field = model.model_fields.get(part) if model and isinstance(part, str) else None
        model = None
        if field is None:
            continue  # an item of a list keeps the words of its list
        kinds = (field.annotation, *get_args(field.annotation))  # a section, or one or null
        sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if len(sections) == 1:
            (model,) = sections
            allowed = f"a mapping with the keys {', '.join(model.model_fields)}"
        for mark in field.metadata:
            if isinstance(mark, Allowed | AllowedDomains):
                allowed = mark.words
    return path, section, allowed


def _names(path: KeyPath) -> str:
    """The names that a section with variants goes by."""
    return ", ".join(_VARIANTS[path[0]])


def _elsewhere(key: str, here: int | str) -> str:
    """Points to the section in which a misplaced key belongs."""
    for name, field in SweepSpec.model_fields.items():
        if name == here:
            continue
        for section in (field.annotation, *get_args(field.annotation)):
            if key in getattr(section, "model_fields", {}):
                return f" (did you mean {name}.{key}?)"
    return f" (did you mean the top-level {key}?)" if key in SweepSpec.model_fields else ""
