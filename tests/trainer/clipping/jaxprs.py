"""What a program holds in memory, as its jaxpr tells."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def intermediates(jaxpr: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Primitive and shape of every result, those of inner jaxprs included."""
    for eqn in jaxpr.eqns:
        inner = list(_inner(eqn))
        # A call's results are those of its inside.
        for var in eqn.outvars:
            yield str(eqn.primitive), tuple(getattr(var.aval, "shape", ()))
        for each in inner:
            yield from intermediates(each)


def largest(jaxpr: Any) -> tuple[int, str, tuple[int, ...]]:
    return max((math.prod(shape), name, shape) for name, shape in intermediates(jaxpr))
