"""Checks of a configuration's fields; every message names field, value and what is allowed."""

import math

from trainer.errors import ConfigError


def one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Accepts the words of a list.

    Raises:
        ConfigError: ``value`` is none of them.
    """
    if value not in allowed:
        raise ConfigError(f"{field}={value!r}: allowed is one of {', '.join(allowed)}")


def number(
    field: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    or_low: bool = False,
    or_high: bool = True,
) -> None:
    """Accepts finite numbers in (low, high], with low itself or without high where so asked.

    Raises:
        ConfigError: ``value`` is no such number.
    """
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if ok:
        above = low < value or (or_low and value == low)  # type: ignore[operator]
        below = value < high or (or_high and value == high)  # type: ignore[operator]
        if above and below:
            return
    bound = f"in {'[' if or_low else '('}{low:g}, {high:g}{']' if or_high else ')'}"
    if not math.isfinite(high):
        bound = f">{'=' if or_low else ''} {low:g}"
    raise ConfigError(f"{field}={value!r}: allowed is a finite number {bound}")


def whole(field: str, value: object, *, least: int) -> None:
    """Accepts whole numbers from ``least`` on.

    Raises:
        ConfigError: ``value`` is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{field}={value!r}: allowed is a whole number >= {least}")
