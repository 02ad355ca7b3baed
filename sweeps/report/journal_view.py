"""The journal in words: one line for each entry.

An entry is described from what stands in it, and a damaged one may say anything: what makes no
sense is shown as it stands.
"""

import datetime
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from accounting.ledger.journal import Inspected
from sweeps.report.table import one_line, show_epsilon

_REFUSED = ("refused", "refused_again", "charge_refused", "extension_refused")
_MAX_TEXT = 600


def time_of(at: float) -> str:
    """``2025-01-31 12:00:00``, in UTC."""
    moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def describe_row(row: Inspected) -> str:
    """What an entry says, on one line: ``reserved trial-7: 0.05 of rdp, 4.23 of 4.28 taken``."""
    if row.entry is None:
        return one_line(f"cannot be read: {row.text}", _MAX_TEXT)
    kind, facts = row.entry.kind, row.entry.facts
    try:
        return one_line(_WORDS[kind](facts), _MAX_TEXT)
    except (KeyError, TypeError, ValueError, AttributeError):
        return one_line(f"{kind}: {row.text}", _MAX_TEXT)


def row_time(row: Inspected) -> str:
    """When an entry was written, or nothing where it does not say."""
    try:
        return "" if row.entry is None else time_of(row.entry.at)
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def row_style(row: Inspected) -> str:
    """How an entry is shown: refusals and damage in red."""
    if row.problem:
        return "bold red"
    return "red" if row.entry is not None and row.entry.kind in _REFUSED else ""


def plain_line(row: Inspected, *, with_budget: bool = True) -> str:
    """One line without control codes."""
    budget = (row.budget,) if with_budget else ()
    damage = (f"DAMAGED ({row.problem}):",) if row.problem else ()
    words = (str(row.seq), row_time(row), *budget, *damage, describe_row(row))
    return "  ".join(line for word in words if (line := one_line(word)))


def journal_table(rows: Sequence[Inspected], *, with_budget: bool = True) -> Table:
    """Entries for a terminal; what is long is wrapped beside the columns."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="dim", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    if with_budget:
        table.add_column(overflow="fold", max_width=24)
    table.add_column(overflow="fold")
    for row in rows:
        words = Text(describe_row(row), style=row_style(row))
        if row.problem:
            words = Text(f"DAMAGED ({row.problem}): {words}", style=row_style(row))
        budget = (Text(one_line(row.budget)),) if with_budget else ()
        table.add_row(str(row.seq), row_time(row), *budget, words)
    return table


# --- One function per kind -----------------------------------------------------------------


def _by(facts: Mapping[str, Any]) -> str:
    return f" by {facts['by']}" if facts.get("by") else ""


def _because(facts: Mapping[str, Any]) -> str:
    return f": {facts['reason']}" if facts.get("reason") else ""


def _created(facts: Mapping[str, Any]) -> str:
    limit = f"epsilon {facts['epsilon']:g} at delta {facts['delta']:g}"
    single = ", for one sweep alone" if facts["one_off"] else ""
    return f"created{_by(facts)}: {facts['policy']}, {limit}, for {facts['dataset']}{single}"


def _granted(facts: Mapping[str, Any]) -> str:
    return f"granted {facts['millionths'] / 10_000:.6g}% to {facts['team']}{_by(facts)}"


def _reserved(facts: Mapping[str, Any]) -> str:
    verdict = facts["verdict"]
    return f"reserved {facts['request_id']}{_team(facts)}{_fork(facts)}: {_numbers(verdict)}"


def _refused(facts: Mapping[str, Any]) -> str:
    reason = facts["verdict"]["reason"]
    return f"refused {facts['request_id']}{_team(facts)}{_fork(facts)}: {reason}"


def _reserved_later(facts: Mapping[str, Any]) -> str:
    return f"reserved {facts['request_id']}, asked again: {_numbers(facts['verdict'])}"


def _refused_again(facts: Mapping[str, Any]) -> str:
    return f"refused {facts['request_id']}, asked again: {facts['verdict']['reason']}"


def _fork(facts: Mapping[str, Any]) -> str:
    spent = sum(part["iterations"] for part in facts["request"].get("prefix", ()))
    return f", going on from {_steps(spent)}" if spent else ""


def _extended(facts: Mapping[str, Any]) -> str:
    iterations = _steps(facts["iterations"])
    return f"extended {facts['request_id']} to {iterations}: {_numbers(facts['verdict'])}"


def _extension_refused(facts: Mapping[str, Any]) -> str:
    iterations = _steps(facts["iterations"])
    return f"refused to extend {facts['request_id']} to {iterations}: {facts['verdict']['reason']}"


def _team(facts: Mapping[str, Any]) -> str:
    return f" for {facts['team']}" if facts.get("team") else ""


def _numbers(verdict: Mapping[str, Any]) -> str:
    if verdict["unit"] != "rdp":
        return verdict["reason"]  # it has the numbers, and says whether of a trial or of a list
    requested, limit = _amount(verdict["requested"]), _amount(verdict["limit"])
    taken = math.fsum((requested, _amount(verdict["spent"]), _amount(verdict["reserved"])))
    shown = show_epsilon(min(taken, limit))
    return f"{show_epsilon(requested)} of rdp, {shown} of {limit:.4g} taken"


def _amount(value: float | None) -> float:
    return math.inf if value is None else value


def _steps(count: int) -> str:
    return f"{count:,} iteration{'' if count == 1 else 's'}"


def _charged(facts: Mapping[str, Any]) -> str:
    return f"charged {facts['request_id']}: {_steps(facts['iterations'])} so far"


def _charge_refused(facts: Mapping[str, Any]) -> str:
    return (
        f"refused to charge {facts['request_id']} {_steps(facts['iterations'])}{_because(facts)}"
    )


def _settled(facts: Mapping[str, Any]) -> str:
    if facts["state"] == "released":
        return f"settled {facts['request_id']}: released, nothing of it ran"
    return f"settled {facts['request_id']}: {facts['state']} after {_steps(facts['charged'])}"


_WORDS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "budget_created": _created,
    "share_granted": _granted,
    "frozen": lambda facts: f"frozen{_by(facts)}{_because(facts)}",
    "thawed": lambda facts: f"thawed{_by(facts)}{_because(facts)}",
    "retired": lambda facts: f"retired{_by(facts)}{_because(facts)}",
    "reserved": _reserved,
    "refused": _refused,
    "reserved_later": _reserved_later,
    "refused_again": _refused_again,
    "charged": _charged,
    "charge_refused": _charge_refused,
    "extended": _extended,
    "extension_refused": _extension_refused,
    "settled": _settled,
}
