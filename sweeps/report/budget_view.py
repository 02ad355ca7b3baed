"""Budgets for a terminal: the list of them, and one of them with all that is known of it.

Amounts that are taken are shown rounded up and amounts that are left rounded down, so that no
text promises more than was computed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from accounting import Budget, BudgetStatus
from accounting.ledger.status import Level
from sweeps.report.bar import SpentBar, glyph_styles, glyphs
from sweeps.report.room import Fit, Room
from sweeps.report.table import count_words, one_line, show_epsilon, show_value

STATE_STYLES = {"active": "green", "frozen": "blue", "retired": "dim"}
# Below these widths columns are left out, bars narrowed, and bars put on lines of their own.
_ROOMY, _NARROW, _STACKED = 100, 64, 44
_RDP_NOTE = "Bars of open show Rényi divergence; epsilon does not grow in proportion to it."


def show_left(amount: float) -> str:
    """Four significant digits, rounded down."""
    if amount <= 0 or not math.isfinite(amount):
        return "0" if amount <= 0 else "∞"
    unit = 10.0 ** (math.floor(math.log10(amount)) - 3)
    return f"{math.floor(amount / unit + 1e-9) * unit:.4g}"


def show_share(share: float) -> str:
    """A part of one in percent, with as many digits as it has."""
    return f"{share * 100:.6g}%"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """A line of the list.

    Attributes:
        budget: The budget.
        level: What is taken of it; None under per_trial, where nothing adds up.
    """

    budget: Budget
    level: Level | None


@dataclasses.dataclass(frozen=True)
class BudgetList:
    """Budgets with a small bar each; a narrow terminal shows fewer columns.

    Attributes:
        rows: In the order in which they are shown.
        hidden: How many budgets of single sweeps are left out.
    """

    rows: Sequence[BudgetRow]
    hidden: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _STACKED:
            yield from self._stacked()
        elif self.rows:
            yield self._table(options.max_width)
        if any(row.level for row in self.rows):
            yield Text()
            yield _legend(console)
        if any(row.budget.terms.policy == "open" for row in self.rows):
            yield Text(_RDP_NOTE, style="dim")
        if not self.rows:
            yield Text("no budget that sweeps share; `dp-sweeps budget create` makes one")
        if self.hidden:
            yield Text(f"and {self.hidden} of single sweeps (--all shows them)", style="dim")

    def _stacked(self) -> Iterator[RenderableType]:
        for row in self.rows:
            line = Text(f"  {_taken(row.budget, row.level)}, ")
            line.append(row.budget.state, style=STATE_STYLES[row.budget.state])
            yield Text(row.budget.name, overflow="fold")
            if row.level:
                yield _bar(row.level, _STACKED)
            yield line

    def _table(self, width: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("budget", overflow="fold", ratio=2 if width < _NARROW else None)
        if width >= _ROOMY:
            table.add_column("data", overflow="fold")
        if width >= _NARROW:
            table.add_column("policy", no_wrap=True)
        bar_width = 10 if width < _NARROW else 16 if width < _ROOMY else 24
        table.add_column("taken", max_width=bar_width, no_wrap=True)
        table.add_column("ε", justify="right", no_wrap=True)
        if width >= _ROOMY:
            table.add_column("δ", justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True)
        for row in self.rows:
            budget, level = row.budget, row.level
            cells: list[RenderableType] = [Text(budget.name)]
            if width >= _ROOMY:
                cells.append(Text(one_line(budget.dataset, 40)))
            if width >= _NARROW:
                cells.append(Text(budget.terms.policy))
            cells.append(_bar(level, bar_width) if level else Text("-"))
            cells.append(Text(_taken(budget, level)))
            if width >= _ROOMY:
                cells.append(Text(f"{budget.terms.delta:g}"))
            cells.append(Text(budget.state, style=STATE_STYLES[budget.state]))
            table.add_row(*cells)
        return table


def _taken(budget: Budget, level: Level | None) -> str:
    if level is None:
        return f"each ≤ {show_value(budget.terms.epsilon)}"
    return f"{show_epsilon(level.epsilon)} of {show_value(budget.terms.epsilon)}"


def _bar(level: Level, width: int) -> SpentBar:
    return SpentBar(level.spent, level.reserved, level.limit, width=width)


def _legend(console: Console, amounts: Sequence[str] = ("", "", "")) -> Text:
    """``█ spent 2.1   ▒ reserved 0.4   ░ free 5.5``."""
    text = Text()
    names = ("spent", "reserved", "free")
    shown = zip(glyphs(console), glyph_styles(), names, amounts, strict=True)
    for index, (character, style, name, amount) in enumerate(shown):
        text.append("   " if index else "")
        text.append(character, style=style)
        text.append(f" {name} {amount}".rstrip())
    return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetView:
    """A budget and all that is known of it.

    Attributes:
        status: The budget and what is taken.
        others: Other budgets on the same data, retired ones left out.
        room: What would still fit; None where that was not asked.
    """

    status: BudgetStatus
    others: Sequence[Budget]
    room: Room | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, budget = self.status, self.status.budget
        title = Text(f"{budget.name}: ", style="bold")
        title.append(budget.state, style=STATE_STYLES[budget.state])
        title.append(f", protects {one_line(budget.dataset)}", style="not bold")
        yield title
        yield Text()
        if budget.terms.policy != "per_trial":
            yield from _level(console, status.level, budget)
            yield Text()
        yield _facts(status)
        yield Text()
        yield Text(budget.guarantee)
        if status.teams:
            yield Text()
            yield Text("Teams", style="bold")
            yield _teams(status, options.max_width)
        if self.room is not None:
            yield Text()
            yield from room_view(self.room, options.max_width)
        if note := _others(self.others):
            yield Text()
            yield Text(note, style="yellow")


def _level(console: Console, level: Level, budget: Budget) -> Iterator[RenderableType]:
    yield _bar(level, 60)
    amounts = (show_epsilon(level.spent), show_epsilon(level.reserved), show_left(level.free))
    legend = _legend(console, amounts)
    of = f"of {level.limit:.4g} Rényi divergence" if level.unit == "rdp" else "of epsilon "
    legend.append(f"   {of}{'' if level.unit == 'rdp' else show_value(budget.terms.epsilon)}")
    yield legend


def _facts(status: BudgetStatus) -> Table:
    budget, level, terms = status.budget, status.level, status.budget.terms
    rows: list[tuple[str, str]] = []
    limit = f"{show_value(terms.epsilon)} at delta {terms.delta:g}"
    if terms.policy == "per_trial":
        rows.append(("epsilon", f"each trial at most {limit}; nothing adds up"))
        together = (
            f"{show_epsilon(level.together)}, what all charged trials cost as one list; a figure "
            "and no guarantee, for under per_trial nobody fixed that list beforehand"
        )
        rows.append(("together", together))
    else:
        spent, committed = show_epsilon(level.epsilon_spent), show_epsilon(level.epsilon)
        rows.append(("epsilon", f"{spent} spent, {committed} committed, limit {limit}"))
    rows.append(("policy", terms.policy))
    if terms.policy == "open":
        rows.append(("order", f"{terms.order:g}, the one order of its Rényi filter"))
    unit = f"one {terms.privacy_unit}, {terms.neighboring_relation}"
    rows.append(("neighbours", unit))
    counted = [state for state, count in status.counts.items() for _ in range(count)]
    rows.append(("reservations", count_words(counted) or "none"))
    if terms.policy in ("declared", "private_selection"):
        rows.append(
            (
                "list",
                "closed: something of it was trained, so nothing can be added"
                if status.closed_list
                else "not closed: it can grow until the first of it is trained",
            )
        )
    rows.append(("fingerprint", one_line(budget.dataset_fingerprint)))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    return table


def _teams(status: BudgetStatus, width: int) -> RenderableType:
    bar_width = 10 if width < _NARROW else 20 if width < _ROOMY else 28
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=max(8, width // 4))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, max_width=bar_width)
    table.add_column(overflow="fold")
    for team, level in status.teams.items():
        words = f"ε {show_epsilon(level.epsilon)}"
        if level.unit == "epsilon":
            words += f" of {show_value(level.limit)}"
        else:
            words += f", {show_left(level.free)} of {level.limit:.4g} free"
        bar = _bar(level, bar_width) if level.limit > 0 else Text("-")
        words = words if level.limit > 0 else "nothing is granted"
        share = show_share(status.budget.shares[team])
        table.add_row(Text(team, style="bold"), share, bar, Text(words))
    left = 1 - math.fsum(status.budget.shares.values())
    rest = "" if left <= 1e-9 else f"{show_share(left)} is granted to nobody"
    return Group(table, Text(rest, style="dim")) if rest else table


def _others(others: Sequence[Budget]) -> str:
    shared = [other for other in others if not other.one_off]
    named = [f"{b.name} ({b.terms.policy}, epsilon {show_value(b.terms.epsilon)})" for b in shared]
    single = len(others) - len(shared)
    if single:
        named.append(f"{single} of {'a single sweep' if single == 1 else 'single sweeps'}")
    if not named:
        return ""
    return (
        f"The same data is protected by other budgets, too: {', '.join(named)}. Guarantees add "
        "up: this one's alone says nothing about their results."
    )


# --- What would still fit ------------------------------------------------------------------


def room_view(room: Room, width: int) -> Iterator[RenderableType]:
    """What would still fit, for a `rich.console.Console` to print."""
    yield Text(room.heading, style="bold")
    if room.whole is not None:
        yield Text(room.whole, style="green" if room.whole_fits else "red")
    if room.obstacle:
        yield Text(room.obstacle, style="red")
    if not room.fits:
        return
    yield Text()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    selection = any(fit.what for fit in room.fits)
    if selection:
        table.add_column("selection", overflow="fold")
    else:
        headings = ("sampling\nprob", "noise\nmulti-\nplier", "iterations")
        if width < _NARROW:
            headings = ("samp-\nling\nprob", "noise\nmulti-\nplier", "itera-\ntions")
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
    special = any(fit.mechanism for fit in room.fits)
    if special:
        table.add_column("mechanism", overflow="fold")
    table.add_column(room.asked_heading, justify="right", no_wrap=True)
    table.add_column("more\nwould fit", justify="right", no_wrap=True)
    for fit in room.fits:
        mechanism = [Text(fit.mechanism or "DP-SGD")] if special else []
        table.add_row(*_fit_cells(fit), *mechanism, Text(f"{fit.asked:,}"), _more(fit))
    yield table
    if room.hidden:
        yield Text(f"and {room.hidden} other settings", style="dim")
    if room.note:
        yield Text()
        yield Text(room.note, style="dim")


def _fit_cells(fit: Fit) -> list[Text]:
    if fit.what:
        return [Text(fit.what)]
    shown = (show_value(fit.sampling_prob), show_value(fit.noise_multiplier))
    return [*map(Text, shown), Text(f"{fit.iterations:,}")]


def _more(fit: Fit) -> Text:
    if fit.more is None:
        return Text("any number", style="green")
    return Text(f"{fit.more:,}{'+' if fit.at_least else ''}", style="green" if fit.more else "red")
