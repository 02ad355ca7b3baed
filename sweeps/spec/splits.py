"""TFDS split expressions, as far as they can be judged without the data set."""

import math

_TERM = r"[A-Za-z0-9_\-]+(\[(-?[0-9]+%?)?:(-?[0-9]+%?)?\])?"
SPLIT_PATTERN = rf"^{_TERM}( ?\+ ?{_TERM})*$"

# The base split, and of it (unit, from, to); None for all of the base.
_Part = tuple[str, tuple[str, float, float] | None]


def may_overlap(a: str, b: str) -> bool:
    """Whether two splits may share an example, for all that is known without the data set's size.

    Args:
        a: An expression that matches `SPLIT_PATTERN`.
        b: Another.
    """
    return any(
        _parts_may_overlap(_part(term), _part(other))
        for term in a.split("+")
        for other in b.split("+")
    )


def _part(term: str) -> _Part:
    """``train[10%:-20%]`` as ``("train", ("%", 10, 80))``."""
    base, _, rest = term.strip().partition("[")
    bounds = rest.rstrip("]").split(":") if rest else ["", ""]
    given = [bound for bound in bounds if bound]
    if not given:
        return base, None
    if all(bound.endswith("%") for bound in given):
        start = _percent(bounds[0]) if bounds[0] else 0
        return base, ("%", start, _percent(bounds[1]) if bounds[1] else 100)
    if any(bound.endswith("%") for bound in given):
        return base, None
    numbers = [int(bound) for bound in given]
    if all(number >= 0 for number in numbers):
        return base, ("+", int(bounds[0] or 0), int(bounds[1]) if bounds[1] else math.inf)
    if all(number < 0 for number in numbers):
        return base, ("-", int(bounds[0]) if bounds[0] else -math.inf, int(bounds[1] or 0))
    return base, None


def _percent(bound: str) -> int:
    """A bound such as ``80%``; ``-20%`` counts from the end and is the same place."""
    percent = int(bound.removesuffix("%"))
    return percent + 100 if percent < 0 else percent


def _parts_may_overlap(a: _Part, b: _Part) -> bool:
    if "all" in (a[0], b[0]):
        return True
    if a[0] != b[0]:
        return False
    if a[1] is None or b[1] is None or a[1][0] != b[1][0]:
        return True
    return not (a[1][2] <= b[1][1] or b[1][2] <= a[1][1])
