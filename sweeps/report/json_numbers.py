"""Numbers that are legal JSON, which knows neither infinity nor NaN."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast


def legal_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document whose numbers are all legal JSON: null stands for what is not finite."""
    return cast("dict[str, Any]", _legal(document))


def _legal(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(key): _legal(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in cast("Sequence[object]", value)]
    return value
