"""Checks at the door: every number becomes a plain Python `float` or `int`, or is refused.

The accounting library underneath fails open. Given NaN noise it answers epsilon 0; given delta 2
it answers 0; given an integer or `numpy.float32` noise it may drop a composition silently. So
nothing reaches it unchecked, and nothing reaches it in another type than `float` and `int`.

Each function takes the name of the field first, returns the normalised value, and raises
`InvalidPrivacyParameter` naming field, value and what is allowed.
"""

import math
import re
from typing import cast

import numpy as np

from accounting.errors import InvalidPrivacyParameter

MIN_DELTA = 1e-10
"""Smallest delta accepted: below it, rounding errors of double precision are not negligible."""

MAX_ITERATIONS = 10**12
"""Largest number of iterations accepted: beyond it, rounding errors are not negligible."""


def _is_one_of(value: object, types: tuple[type, ...]) -> bool:
    """Whether the value is of one of the types; truth values are numbers to Python, not here."""
    return isinstance(value, types) and not isinstance(value, bool)


def _number(field: str, value: object, allowed: str) -> float:
    """Converts a Python or numpy integer or float to `float`; refuses all else and NaN."""
    if not _is_one_of(value, (int, float, np.integer, np.floating)):
        raise InvalidPrivacyParameter(field, value, allowed)
    try:
        number = float(cast(float, value))
    except OverflowError as error:
        raise InvalidPrivacyParameter(field, value, allowed) from error
    if not math.isfinite(number):
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


def positive(field: str, value: object) -> float:
    """Returns a finite number greater than zero."""
    allowed = "a finite number > 0"
    number = _number(field, value, allowed)
    if not number > 0:
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


def probability(field: str, value: object) -> float:
    """Returns a number in (0, 1]."""
    allowed = "a number in (0, 1]"
    number = _number(field, value, allowed)
    if not 0 < number <= 1:
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


def delta(field: str, value: object) -> float:
    """Returns a number in [1e-10, 1)."""
    allowed = f"a number in [{MIN_DELTA:g}, 1)"
    number = _number(field, value, allowed)
    if not MIN_DELTA <= number < 1:
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


def count(field: str, value: object) -> int:
    """Returns an integer from 1 to 1e12; a float is refused even where it is whole."""
    allowed = f"an integer from 1 to {MAX_ITERATIONS:.0e}"
    if not _is_one_of(value, (int, np.integer)):
        raise InvalidPrivacyParameter(field, value, allowed)
    number = int(cast(int, value))
    if not 1 <= number <= MAX_ITERATIONS:
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


def one_of(field: str, value: object, choices: tuple[str, ...]) -> str:
    """Returns a string that is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidPrivacyParameter(field, value, " or ".join(repr(c) for c in choices))
    return str(value)


def non_negative(field: str, value: object) -> float:
    """Returns a finite number of at least zero."""
    allowed = "a finite number >= 0"
    number = _number(field, value, allowed)
    if not number >= 0:
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/=,+-]{0,159}")


def name(field: str, value: object) -> str:
    """Returns a short text that is safe in a journal, a log and a command line."""
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidPrivacyParameter(
            field,
            value,
            "1 to 160 of letters, digits and _ . : / = , + -, beginning with a letter or digit",
        )
    return str(value)


def text(field: str, value: object) -> str:
    """Returns a printable text of at most 256 characters, possibly empty."""
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise InvalidPrivacyParameter(field, value, "a printable text of at most 256 characters")
    return str(value)


def share(field: str, value: object) -> float:
    """Returns a number in [0, 1]."""
    allowed = "a number in [0, 1]"
    number = _number(field, value, allowed)
    if not 0 <= number <= 1:
        raise InvalidPrivacyParameter(field, value, allowed)
    return number


def steps(field: str, value: object) -> int:
    """Returns an integer from 0 to 1e12."""
    if _is_one_of(value, (int, np.integer)) and cast(int, value) == 0:
        return 0
    try:
        return count(field, value)
    except InvalidPrivacyParameter as error:
        allowed = f"an integer from 0 to {MAX_ITERATIONS:.0e}"
        raise InvalidPrivacyParameter(field, value, allowed) from error
