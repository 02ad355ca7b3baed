"""How the fields of the search space are read.

An `AllowedDomains` stands in the annotation of its field; those of all the fields are at the end.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, cast, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from sweeps.spec.domains import (
    BY,
    CALIBRATED,
    FULL,
    MAX_ITERATIONS,
    MAX_WHOLE,
    AnyDomain,
    ConditionalDomain,
    Domain,
    DomainKind,
    Value,
    branch_key,
    step_indices,
)
from sweeps.spec.refusals import Refusal, one_of, refusals_of, refused
from sweeps.spec.yaml_source import suggestion
from trainer.config import OptimizerName, ScheduleName
from trainer.yaml_text import format_key_path, quotes_hint, shorten, show

_RANGE_WORDS: dict[str, str] = {
    "uniform": "[low, high] with low < high",
    "loguniform": "[low, high] with low < high",
    "quniform": "[low, high, step] with low < high and a multiple of step between them",
    "randint": "[low, high] in whole numbers with low < high, which is itself never drawn",
    "lograndint": "[low, high] in whole numbers with low < high, which is itself never drawn",
}


@dataclasses.dataclass(frozen=True, eq=False)
class AllowedDomains:
    """Reads one field of the search space; pydantic finds it in the field's annotation.

    Attributes:
        one: One value of the field, in words.
        read: The value in its final type, or None where it is not allowed.
        schema: JSON Schema of one value.
        ranges: The domains that are given by bounds and fit the field.
        low: Smallest bound of a range in words, as ``> 0``.
    """

    one: str
    read: Callable[[object], Value | None]
    schema: dict[str, Any]
    ranges: tuple[str, ...] = ()
    low: str = "> 0"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the domains that fit the field."""
        return ("grid_search", "choice", *self.ranges)

    @property
    def words(self) -> str:
        """What the field takes, for an error message."""
        return f"{self._words_alone}, or {{{BY}: another field, ...}}"

    @property
    def _words_alone(self) -> str:
        return f"{self.one}, or one of the domains {', '.join(self.kinds)}"

    def parse(self, raw: object) -> AnyDomain:
        """Reads a constant, ``{domain: [...]}`` or ``{by: field, value: ..., ...}``."""
        plain: object = raw.plain() if isinstance(raw, Domain | ConditionalDomain) else raw
        if isinstance(plain, Mapping) and BY in plain:
            return self._conditional(cast("Mapping[str, object]", plain))
        return self._domain(cast("object", plain), self.words)

    def _conditional(self, raw: Mapping[str, object]) -> ConditionalDomain:
        by = raw[BY]
        refusals: list[Refusal] = []
        branches: dict[str, Domain] = {}
        if not isinstance(by, str):
            message = f"{show(by)} is not allowed; allowed: a field of search_space"
            refusals.append(Refusal((BY,), message))
        for name, branch in raw.items():
            if name == BY:
                continue
            number = _as_number(name)
            key = name if number is None else branch_key(number)
            if key in branches:
                message = "is given twice; allowed: once for each value"
                refusals.append(Refusal((name,), message, at_key=True))
                continue
            try:
                branches[key] = self._domain(branch, self._words_alone)
            except PydanticCustomError as error:
                refusals += [r._replace(path=(name, *r.path)) for r in refusals_of(error)]
        if refusals:
            raise refused(*refusals)
        # The order of a mapping says nothing, so equal domains have equal branches.
        return ConditionalDomain(str(by), tuple((key, branches[key]) for key in sorted(branches)))

    def _domain(self, raw: object, words: str) -> Domain:
        if not isinstance(raw, dict):
            value = self.read(raw)
            if value is None:
                raise refused(Refusal((), self._not_allowed(raw, words)))
            return Domain("constant", (value,))
        mapping = cast("dict[str, object]", raw)
        if len(mapping) != 1:
            given = ", ".join(format_key_path((key,)) for key in mapping) or "none"
            message = f"{len(mapping)} domains are given ({given}); allowed: {words}"
            raise refused(Refusal((), shorten(message, 300)))
        ((kind, values),) = mapping.items()
        if kind not in self.kinds:
            message = f"unknown domain{suggestion(kind, self.kinds)}; allowed: {words}"
            raise refused(Refusal((kind,), message, at_key=True))
        items = cast("list[object]", values) if isinstance(values, list) else None
        listed = kind not in _RANGE_WORDS
        if not items:
            allowed = "a list of one or more values" if listed else _RANGE_WORDS[kind]
            message = f"{show(cast('object', values))} is not allowed; allowed: {allowed}"
            raise refused(Refusal((kind,), message))
        found = self._listed(kind, items) if listed else self._range(kind, items)
        return Domain(cast("DomainKind", kind), found)

    def _not_allowed(self, raw: object, allowed: str) -> str:
        hint = "" if "one of" in self.one else quotes_hint(raw)
        return f"{show(raw)} is not allowed{hint}; allowed: {allowed}"

    def _listed(self, kind: str, items: list[object]) -> tuple[Value, ...]:
        refusals: list[Refusal] = []
        seen: dict[Value, int] = {}
        values: list[Value] = []
        for index, raw in enumerate(items):
            value = self.read(raw)
            if value is None:
                refusals.append(Refusal((kind, index), self._not_allowed(raw, self.one)))
                continue
            values.append(value)
            # A choice may repeat a value to make it likelier; a grid would only run it twice.
            if kind == "grid_search" and seen.setdefault(value, index) != index:
                message = f"{show(raw)} is listed twice; allowed: different values"
                refusals.append(Refusal((kind, index), message))
        if refusals:
            raise refused(*refusals)
        return tuple(values)

    def _range(self, kind: str, items: list[object]) -> tuple[Value, ...]:
        whole = kind in ("randint", "lograndint")
        words = _RANGE_WORDS[kind]
        refusals: list[Refusal] = []
        numbers: list[int | float] = []
        for index, raw in enumerate(items):
            # A step is any number > 0; a bound must itself be a value of the field.
            value = _number(raw) if index == 2 else self.read(raw)
            if whole and not (type(raw) is int and raw <= MAX_WHOLE):
                value = None
            if value is None or isinstance(value, str) or value <= 0:
                allowed = (
                    f"a {'whole ' if whole else ''}number {'> 0' if index == 2 else self.low}"
                )
                refusals.append(Refusal((kind, index), self._not_allowed(raw, allowed)))
            else:
                numbers.append(int(value) if whole else value)
        if refusals:
            raise refused(*refusals)
        whole_range = f"{show(items)} is not allowed; allowed: {words}"
        if len(numbers) != (3 if kind == "quniform" else 2) or not numbers[0] < numbers[1]:
            raise refused(Refusal((kind,), whole_range))
        if kind == "quniform":
            try:
                step_indices(numbers[0], numbers[1], numbers[2])
            except ValueError as error:
                raise refused(Refusal((kind,), f"{whole_range} ({error})")) from None
        return tuple(numbers)

    def __get_pydantic_core_schema__(
        self, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(_plain),
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        number = {"type": "number", "exclusiveMinimum": 0}
        whole = {"type": "integer", "minimum": 1}
        arguments: dict[str, dict[str, Any]] = {
            "grid_search": {"items": self.schema, "minItems": 1, "uniqueItems": True},
            "choice": {"items": self.schema, "minItems": 1},
        }
        arguments = {kind: rest for kind, rest in arguments.items() if kind in self.kinds}
        for kind in self.ranges:
            item = whole if kind in ("randint", "lograndint") else number
            length = 3 if kind == "quniform" else 2
            arguments[kind] = {"items": item, "minItems": length, "maxItems": length}
        domains = [
            {
                "type": "object",
                "title": kind,
                "description": _RANGE_WORDS.get(kind, "a list of values"),
                "properties": {kind: {"type": "array", **rest}},
                "required": [kind],
                "additionalProperties": False,
            }
            for kind, rest in arguments.items()
        ]
        return {"anyOf": self._choices(domains)}

    def _choices(self, domains: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """JSON Schemas of all that the field takes."""
        alone = [{"title": "constant", **self.schema}, *domains]
        conditional = {
            "type": "object",
            "title": BY,
            "description": "What it may be for each value of another field.",
            "properties": {BY: {"type": "string", "description": "The other field."}},
            "required": [BY],
            "minProperties": 2,
            "additionalProperties": {"anyOf": alone},
        }
        return [*alone, conditional]


class DrawnDomains(AllowedDomains):
    """The same for what is always drawn: one of the random domains."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the domains that fit the field."""
        return ("choice", *self.ranges)

    @property
    def words(self) -> str:
        """What the field takes, for an error message."""
        return f"one of the domains {', '.join(self.kinds)}"

    def parse(self, raw: object) -> Domain:
        """Reads ``{domain: [...]}``."""
        plain: object = raw.plain() if isinstance(raw, Domain) else raw
        domain = self._domain(plain, self.words)
        if domain.kind == "constant":
            raise refused(Refusal((), self._not_allowed(plain, self.words)))
        return domain

    def _choices(self, domains: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return domains


def _plain(domain: AnyDomain) -> object:
    return domain.plain()


def _as_number(key: str) -> float | None:
    try:
        return float(key)
    except ValueError:
        return None


def _number(raw: object) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        return None
    try:
        value = float(raw)
    except OverflowError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _batch_size(raw: object) -> str | float | None:
    if isinstance(raw, str) and raw == FULL:
        return raw
    value = _number(raw)
    return value if value is not None and value >= 1 else None


def _iterations(raw: object) -> int | None:
    return raw if type(raw) is int and 1 <= raw <= MAX_ITERATIONS else None


def _number_or_zero(raw: object) -> float | None:
    return 0.0 if type(raw) in (int, float) and raw == 0 else _number(raw)


def _steps(raw: object) -> int | None:
    return raw if type(raw) is int and 0 <= raw <= MAX_ITERATIONS else None


def _noise(raw: object) -> str | float | None:
    return raw if isinstance(raw, str) and raw == CALIBRATED else _number(raw)


def _one_word(names: Any) -> AllowedDomains:
    """A field that takes one of a Literal's words."""
    words = get_args(names)
    return AllowedDomains(
        one=one_of(names).words,
        read=lambda raw: raw if isinstance(raw, str) and raw in words else None,
        schema={"type": "string", "enum": list(words)},
    )


_RANGES = ("uniform", "loguniform", "quniform", "randint", "lograndint")
NUMBERS = AllowedDomains(
    one="a number > 0",
    read=_number,
    schema={"type": "number", "exclusiveMinimum": 0},
    ranges=_RANGES,
)
BATCH_SIZES = AllowedDomains(
    one=f"a number >= 1 or the word {FULL}",
    read=_batch_size,
    schema={"anyOf": [{"type": "number", "minimum": 1}, {"const": FULL}]},
    ranges=_RANGES,
    low=">= 1",
)
ITERATIONS = AllowedDomains(
    one=f"a whole number from 1 to {MAX_ITERATIONS}",
    read=_iterations,
    schema={"type": "integer", "minimum": 1, "maximum": MAX_ITERATIONS},
    ranges=("randint", "lograndint"),
    low=f"from 1 to {MAX_ITERATIONS}",
)
OPTIMIZERS = _one_word(OptimizerName)
SCHEDULES = _one_word(ScheduleName)
NUMBERS_OR_ZERO = AllowedDomains(
    one="a number >= 0",
    read=_number_or_zero,
    schema={"type": "number", "minimum": 0},
    ranges=_RANGES,
)
STEPS = AllowedDomains(
    one=f"a whole number from 0 to {MAX_ITERATIONS}",
    read=_steps,
    schema={"type": "integer", "minimum": 0, "maximum": MAX_ITERATIONS},
    ranges=("randint", "lograndint"),
)
NOISES = AllowedDomains(
    one=f"a number > 0 or the word {CALIBRATED}",
    read=_noise,
    schema={"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": CALIBRATED}]},
    ranges=_RANGES,
)
DRAWN_NUMBERS = DrawnDomains(
    one="a number > 0", read=_number, schema=NUMBERS.schema, ranges=_RANGES
)
DRAWN_NUMBERS_OR_ZERO = DrawnDomains(
    one="a number >= 0", read=_number_or_zero, schema=NUMBERS_OR_ZERO.schema, ranges=_RANGES
)
