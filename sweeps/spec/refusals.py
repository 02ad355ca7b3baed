"""What a field of the specification takes, and how its validators say no.

pydantic finds what is wrong in words of its own. Here are ours: `Allowed` stands in a field's
annotation, and `Refusal` travels through pydantic's errors, until `sweeps.spec.reading` turns
both into messages for a person.
"""

import dataclasses
from typing import NamedTuple, cast, get_args

from pydantic_core import ErrorDetails, PydanticCustomError

from trainer.yaml_text import KeyPath

_REFUSED = "sweep_spec_refused"


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Says in an error message what a field takes; it checks nothing."""

    words: str


def one_of(literal: object) -> Allowed:
    """The members of a `Literal`, as words."""
    return Allowed(f"one of {', '.join(str(value) for value in get_args(literal))}")


class Refusal(NamedTuple):
    """One thing that a validator refuses.

    Attributes:
        path: Key path below the field that is validated.
        message: The value found and what is allowed instead.
        at_key: Whether to point at the key rather than at its value.
    """

    path: KeyPath
    message: str
    at_key: bool = False


def refused(*refusals: Refusal) -> PydanticCustomError:
    """The error with which a validator refuses, for pydantic to carry."""
    text = "; ".join(refusal.message for refusal in refusals)
    return PydanticCustomError(_REFUSED, "{text}", {"text": text, "refusals": refusals})


def refusals_in(detail: ErrorDetails) -> tuple[Refusal, ...]:
    """What `refused` put into one of pydantic's findings; empty for pydantic's own findings."""
    if detail["type"] != _REFUSED:
        return ()
    return cast("tuple[Refusal, ...]", detail.get("ctx", {})["refusals"])


def refusals_of(error: PydanticCustomError) -> tuple[Refusal, ...]:
    """What `refused` put into an error that pydantic has not carried yet."""
    return cast("tuple[Refusal, ...]", (error.context or {})["refusals"])
