"""The bar of a budget: what is spent, what is reserved, what is free.

Blocks on a terminal, each kind of its own colour and density, so that it can be read without
colour too; anywhere else characters of ASCII between brackets.
"""

import math
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

_BLOCKS, _PLAIN = "█▒░", "#=."
_STYLES = ("red", "yellow", "green")
_LEAST_CELLS, _BRACKETS = 6, 2


def proportions(parts: Sequence[float], cells: int) -> list[int]:
    """Divides cells in proportion to amounts.

    Args:
        parts: Amounts, >= 0; an infinite one leaves the others nothing.
        cells: At least as many as there are amounts.

    Returns:
        How many cells each gets, `cells` in all. Whatever is not zero gets at least one. Where
        there is nothing at all, the last part gets everything.
    """
    if any(map(math.isinf, parts)):
        parts = [float(math.isinf(part)) for part in parts]
    total = math.fsum(parts)
    if not total > 0:
        return [0] * (len(parts) - 1) + [cells]
    exact = [part / total * cells for part in parts]
    counts = [
        max(math.floor(share), int(part > 0)) for share, part in zip(exact, parts, strict=True)
    ]
    places = range(len(parts))
    while sum(counts) < cells:
        counts[max(places, key=lambda i: exact[i] - counts[i])] += 1
    while sum(counts) > cells:
        counts[max((i for i in places if counts[i] > 1), key=lambda i: counts[i] - exact[i])] -= 1
    return counts


def glyphs(console: Console) -> str:
    """The three characters with which a console shows spent, reserved and free."""
    plain = not console.is_terminal or console.options.ascii_only or console.is_dumb_terminal
    return _PLAIN if plain else _BLOCKS


def glyph_styles() -> tuple[str, str, str]:
    """The styles of spent, reserved and free."""
    return _STYLES


class SpentBar:
    """A bar for a `rich.console.Console` to print.

    Args:
        spent: What can no longer be given back.
        reserved: What is promised and may yet be given back.
        limit: What may be taken in all, in the same unit.
        width: Cells that it takes at most.
    """

    def __init__(self, spent: float, reserved: float, limit: float, *, width: int = 60) -> None:
        self._parts = (spent, reserved, max(0.0, limit - spent - reserved))
        self._width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        characters = glyphs(console)
        plain = characters == _PLAIN
        width = max(_LEAST_CELLS, min(self._width, options.max_width))
        counts = proportions(self._parts, width - (_BRACKETS if plain else 0))
        if plain:
            yield Segment("[" + "".join(c * n for c, n in zip(_PLAIN, counts, strict=True)) + "]")
            yield Segment.line()
            return
        for character, style, count in zip(characters, _STYLES, counts, strict=True):
            yield Segment(character * count, console.get_style(style))
        yield Segment.line()

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        widest = max(_LEAST_CELLS, min(self._width, options.max_width))
        return Measurement(_LEAST_CELLS, widest)
