"""Results in words and numbers: the table for a terminal, and the JSON of ``run --json``.

Nothing that a person or a library wrote (names, reasons) reaches a terminal as markup or as a
control code. An epsilon is always shown rounded up, so that no text promises more than was
computed; a rejected trial's stands in parentheses, for it was never spent.
"""

import collections
import dataclasses
import math
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sweeps.database.states import TrialState
from sweeps.report.results import Configuration, SweepResults, TrialSummary

NO_VALUE = "-"
_REPEATS = (
    "Accuracy of several trials: mean ± standard deviation at the last step that all of them have "
    "reached; their ε: the most that one of them has spent"
)
MAX_REASON_LENGTH = 300
# More different reasons than this are folded: those that differ in numbers alone share one line.
_MAX_UNFOLDED = 6
_MAX_FOLDED = 20

# The hyperparameters in the order of a specification, with table headings of narrow words.
_HEADINGS = {
    "optimizer": "optimizer",
    "learning_rate": "learning\nrate",
    "expected_batch_size": "expected\nbatch\nsize",
    "iterations": "iterations",
    "noise_multiplier": "noise\nmulti-\nplier",
    "l2_clip_norm": "l2\nclip\nnorm",
    "proxy_expected_batch_size": "batch\nsize\nrun",
    "proxy_noise_multiplier": "noise\nrun",
    "real_epsilon": "ε of\nreal run",
}
_BROKEN_HEADINGS = {
    "trial": "#",
    "accuracy": "accu-\nracy",
    "optimizer": "opti-\nmizer",
    "iterations": "itera-\ntions",
}
_BRIEF = {
    "optimizer": "",
    "learning_rate": "rate",
    "expected_batch_size": "batch",
    "noise_multiplier": "noise",
    "l2_clip_norm": "clip",
}
# Follow from others, or stand elsewhere in the table.
_NOT_COLUMNS = frozenset({"sampling_prob", "iterations"})

STATE_STYLES: dict[TrialState, str] = {
    TrialState.QUEUED: "dim",
    TrialState.ADMITTED: "dim",
    TrialState.REJECTED: "red",
    TrialState.RUNNING: "cyan",
    TrialState.PRUNED: "yellow",
    TrialState.PAUSED: "blue",
    TrialState.COMPLETED: "green",
    TrialState.DIVERGED: "magenta",
    TrialState.FAILED: "bold red",
    TrialState.CANCELLED: "dim",
}


# --- Values in words -----------------------------------------------------------------------


def show_epsilon(epsilon: float | None) -> str:
    """Four significant digits, rounded up; None and infinity, no finite bound known, as ∞."""
    if epsilon is None or not math.isfinite(epsilon):
        return "∞"
    if epsilon <= 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(epsilon)) - 3)
    return f"{math.ceil(epsilon / unit - 1e-9) * unit:.4g}"


def show_accuracy(accuracy: float | None) -> str:
    """An accuracy in [0, 1] in percent, or `NO_VALUE`."""
    return NO_VALUE if accuracy is None else f"{accuracy:.2%}"


def show_mean(measured: TrialSummary | Configuration) -> str:
    """An accuracy; of a configuration that was repeated the mean, ± the standard deviation.

    If not all of its repeats were measured, of how many it is the mean.
    """
    shown = show_accuracy(measured.eval_accuracy)
    if isinstance(measured, TrialSummary) or len(measured.trials) == 1:
        return shown
    if measured.eval_accuracy_std is not None:
        shown += f" ± {measured.eval_accuracy_std:.2%}"
    count, total = len(measured.measured), len(measured.trials)
    return shown if count in (0, total) else f"{shown} ({count} of {total})"


def show_value(value: object) -> str:
    """A hyperparameter's value; numbers with four significant digits, whole ones in full."""
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e6):
        return f"{value:.4g}"
    return f"{value:.0f}" if isinstance(value, float) else one_line(str(value))


def _show_field(name: str, value: object) -> str:
    """A field of a configuration; what is an epsilon is rounded up as every one."""
    if name == "real_epsilon" and (value is None or isinstance(value, float)):
        return show_epsilon(value)
    return show_value(value)


def one_line(text: str, limit: int | None = None) -> str:
    """Text on one line without control characters, cut at ``limit`` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if limit is None or len(line) <= limit else f"{line[: limit - 3]}..."


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without nesting, ``model.name`` for a name within ``model``.

    The hyperparameters of a search space come first, in a specification's order.
    """
    flat: dict[str, Any] = {}

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{name}.", cast("Mapping[str, Any]", value))
            else:
                flat[f"{prefix}{name}"] = value

    add("", config)
    first = {name: flat.pop(name) for name in _HEADINGS if name in flat}
    return {**first, **flat}


def varying_names(configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the hyperparameters that are not the same in all configurations."""
    flats = [flat_config(config) for config in configs]
    names = dict.fromkeys(name for flat in flats for name in flat)
    ordered = [name for name in _HEADINGS if name in names]
    ordered += [name for name in names if name not in _HEADINGS]
    return tuple(
        name
        for name in ordered
        if name != "sampling_prob" and len({repr(flat.get(name)) for flat in flats}) > 1
    )


def describe_config(
    config: Mapping[str, Any], names: Sequence[str] | None = None, separator: str = ", "
) -> str:
    """``optimizer=adam, learning_rate=0.5``: the named hyperparameters, or a search space's."""
    flat = flat_config(config)
    shown = names if names is not None else tuple(_HEADINGS)
    fields = (f"{name}={_show_field(name, flat[name])}" for name in shown if name in flat)
    return separator.join(fields)


def brief_config(config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """``["adam", "rate 0.5"]``: what fits where space is scarce, in short words."""
    flat = flat_config(config)
    shown = (name for name in names if name in _BRIEF and name in flat)
    return [f"{_BRIEF[name]} {show_value(flat[name])}".strip() for name in shown]


def list_numbers(numbers: Sequence[int], limit: int = 8) -> str:
    """``trial 3`` or ``trials 3, 5, 8 and 4 more``."""
    shown = ", ".join(str(number) for number in numbers[:limit])
    more = f" and {len(numbers) - limit} more" if len(numbers) > limit else ""
    return f"trial{'s' if len(numbers) > 1 else ''} {shown}{more}"


def count_words(states: Sequence[str]) -> str:
    """``7 completed, 3 pruned``, the most frequent first."""
    counts = collections.Counter(states).most_common()
    return ", ".join(f"{count} {state.lower()}" for state, count in counts)


# --- Reasons -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reason:
    """One reason and the trials that it holds for.

    Attributes:
        text: On one line; where trials differ in a number, ``<least> to <greatest>``.
        numbers: Of the trials.
    """

    text: str
    numbers: tuple[int, ...]


_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def fold_reasons(reasons: Sequence[tuple[int, str]], limit: int = _MAX_UNFOLDED) -> list[Reason]:
    """Reasons said once each, in the order in which they first occur.

    Args:
        reasons: Trial numbers and reasons; empty reasons are left out.
        limit: Up to so many different reasons stay as they are. Of more, those that differ in
            their numbers alone become one, with the range of each number.
    """
    exact: dict[str, list[int]] = {}
    for number, text in reasons:
        if line := one_line(text, MAX_REASON_LENGTH):
            exact.setdefault(line, []).append(number)
    if len(exact) <= limit:
        return [Reason(text, tuple(sorted(numbers))) for text, numbers in exact.items()]
    alike: dict[str, list[str]] = {}
    for text in exact:
        alike.setdefault(_NUMBER.sub("#", text), []).append(text)
    return [
        Reason(_with_ranges(texts), tuple(sorted(n for text in texts for n in exact[text])))
        for texts in alike.values()
    ]


def _with_ranges(texts: Sequence[str]) -> str:
    places = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    ranges = iter(
        [
            place[0]
            if len(set(place)) == 1
            else f"{min(place, key=float)} to {max(place, key=float)}"
            for place in places
        ]
    )
    return _NUMBER.sub(lambda _: next(ranges), texts[0])


def _key(index: int) -> str:
    """``a`` to ``z``, then ``aa`` and on."""
    letters = string.ascii_lowercase
    return (_key(index // 26 - 1) if index >= 26 else "") + letters[index % 26]


# --- The table -----------------------------------------------------------------------------


_Shape = Literal["wide", "tight", "folded"]


@dataclasses.dataclass(frozen=True)
class _Cell:
    text: str
    style: str = ""


@dataclasses.dataclass(frozen=True)
class _Row:
    """One trial: what stands before and after its configuration, and why.

    ``config`` is None where it stands in the row above.
    """

    number: int
    before: tuple[_Cell, ...]
    config: dict[str, Any] | None
    after: tuple[_Cell, ...]
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sheet:
    """A table that chooses its shape when it knows its width.

    Reasons stand in the last column where they all fit on one line, else below the table, keyed
    by letters. Where the columns do not fit, they move together, and in the end the
    configuration becomes one wrapped column.
    """

    title: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    left: frozenset[str]
    names: tuple[str, ...]
    rows: tuple[_Row, ...]
    hidden: str
    notes: tuple[tuple[str, str], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="bold")
            yield Text()
        reasons = fold_reasons([(row.number, row.reason) for row in self.rows])
        inline = {row.number: one_line(row.reason, MAX_REASON_LENGTH) for row in self.rows}
        keys = {
            number: _key(index) if index < _MAX_FOLDED else ""
            for index, reason in enumerate(reasons)
            for number in reason.numbers
        }
        shapes: tuple[tuple[dict[int, str], _Shape], ...] = (
            (inline, "wide"),
            (keys, "wide"),
            (keys, "tight"),
            (keys, "folded"),
        )
        why, table = shapes[0][0], Table()
        for why, shape in shapes:
            table = self._table(why, shape)
            if _width(console, options, table) <= options.max_width:
                break
            # The last shape wraps its configurations, so it is used whatever its full width.
        yield table
        if self.hidden:
            yield Text(self.hidden, style="dim")
        yield Text()
        if why is keys:
            yield from _footnotes(reasons)
        for text, style in self.notes:
            yield Text(text, style=style)

    def _table(self, why: Mapping[int, str], shape: _Shape) -> Table:
        wide = shape == "wide"
        gap = (0, 1, 0, 0) if wide else (0, 0, 0, 0)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=gap)

        def column(heading: str, *, left: bool = False) -> None:
            shown = heading if wide else _BROKEN_HEADINGS.get(heading, heading)
            table.add_column(shown, justify="left" if left else "right", no_wrap=True)

        for heading in self.before:
            column(heading)
        if shape != "folded":
            for name in self.names:
                heading = _HEADINGS.get(name, name.replace(".", ".\n").replace("_", "_\n"))
                values = [row.config.get(name) for row in self.rows if row.config is not None]
                column(heading, left=any(isinstance(value, str) for value in values))
        elif self.names:
            table.add_column("configuration", overflow="fold")
        for heading in self.after:
            column(heading, left=heading in self.left)
        has_reason = any(why.values())
        if has_reason:
            column("why", left=True)
        for row in self.rows:
            cells = [Text(cell.text, style=cell.style) for cell in row.before]
            if shape != "folded":
                blank = NO_VALUE if row.config is not None else ""
                config = row.config or {}
                cells += [Text(_show_field(name, config.get(name, blank))) for name in self.names]
            elif self.names:
                cells.append(Text(describe_config(row.config or {}, self.names, "\n")))
            cells += [Text(cell.text, style=cell.style) for cell in row.after]
            if has_reason:
                cells.append(Text(why.get(row.number, "")))
            table.add_row(*cells)
        return table


def _width(console: Console, options: ConsoleOptions, table: Table) -> int:
    return Measurement.get(console, options.update(max_width=10_000), table).maximum


def _footnotes(reasons: Sequence[Reason]) -> RenderResult:
    if not reasons:
        return
    notes = Table.grid(padding=(0, 1))
    notes.add_column(style="bold", justify="right", no_wrap=True)
    notes.add_column(overflow="fold")
    for index, reason in enumerate(reasons[:_MAX_FOLDED]):
        text = Text(reason.text)
        if len(reason.numbers) > 1:
            text.append(f" ({len(reason.numbers)} trials)", style="dim")
        notes.add_row(_key(index), text)
    if len(reasons) > _MAX_FOLDED:
        notes.add_row("", Text(f"and {len(reasons) - _MAX_FOLDED} other reasons", style="dim"))
    yield notes
    yield Text()


def _constants(configs: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    if not configs:
        return ()
    varying = varying_names(configs)
    flat = flat_config(configs[0])
    same = [name for name in _HEADINGS if name in flat and name not in varying]
    who = "All trials" if len(configs) > 1 else "The trial"
    return ((f"{who}: {describe_config(flat, same)}", "dim"),) if same else ()


def _counted(states: Sequence[str], noun: str = "trial") -> str:
    trials = f"{len(states)} {noun}{'' if len(states) == 1 else 's'}"
    return f"{trials}: {count_words(states)}" if states else trials


def results_table(results: SweepResults, *, max_rows: int | None = None) -> RenderableType:
    """A sweep's configurations, best first, for a `rich.console.Console` to print.

    Below one that was repeated stand its trials.

    Args:
        results: What to show.
        max_rows: Show so many configurations, and only count the rest; None shows all.
    """
    configurations = results.configurations[:max_rows]
    shown = [trial for each in configurations for trial in each.trials]
    rest = results.best_first[len(shown) :]
    repeated = any(len(each.trials) > 1 for each in configurations)
    configs = [trial.config for trial in results.trials]
    privacy = results.privacy
    bracketed = any(trial.state is TrialState.REJECTED for trial in shown)
    notes = [
        *_constants(configs),
        *([("ε in parentheses: what it would have cost; not spent", "dim")] if bracketed else []),
        *([(_REPEATS, "dim")] if repeated else []),
        (
            f"Policy {privacy['policy']}: budget ε = {show_value(privacy['target_epsilon'])}, "
            f"δ = {privacy['target_delta']:g}; accountant {privacy['accountant']}",
            "dim",
        ),
        (results.guarantee, ""),
    ]
    return _Sheet(
        title=f"{one_line(results.name)}: {results.state.lower()}; "
        + _counted([trial.state for trial in results.trials]),
        before=("trial", "accuracy", "ε"),
        after=("state", "steps"),
        left=frozenset({"state"}),
        names=_columns(configs),
        rows=tuple(row for each in configurations for row in _result_rows(each)),
        hidden=f"and {len(rest)} more: {count_words([t.state for t in rest])}" if rest else "",
        notes=tuple(notes),
    )


def _columns(configs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(name for name in varying_names(configs) if name not in _NOT_COLUMNS)


def _result_rows(configuration: Configuration) -> Iterator[_Row]:
    """A configuration, and below it its trials where there are several."""
    trials, state = configuration.trials, configuration.state
    if len(trials) == 1:
        yield _result_row(trials[0])
        return
    step = configuration.last.step if configuration.last else 0
    rejected = state is TrialState.REJECTED
    words = count_words([trial.state for trial in trials])
    yield _Row(
        number=-1 - configuration.number,  # no trial's, so that nothing is keyed to it
        before=(
            _Cell(f"{len(trials)} trials"),
            _Cell(show_mean(configuration), "bold"),
            _epsilon_cell(configuration),
        ),
        config=flat_config(configuration.config),
        after=(
            _Cell(words, STATE_STYLES[state]),
            _Cell(NO_VALUE if rejected else f"{step}/{configuration.end_step}"),
        ),
        reason="",
    )
    for trial in trials:
        yield dataclasses.replace(_result_row(trial, "dim"), config=None)


def _result_row(trial: TrialSummary, style: str = "bold") -> _Row:
    rejected = trial.state is TrialState.REJECTED
    step = trial.last.step if trial.last else trial.charged_iterations
    steps = NO_VALUE if rejected or trial.is_secret else f"{step}/{trial.end_step}"
    return _Row(
        number=trial.number,
        before=(
            _Cell(str(trial.number)),
            _Cell(show_accuracy(trial.eval_accuracy), style),
            _epsilon_cell(trial),
        ),
        config=flat_config(trial.config),
        after=(_Cell(trial.state.lower(), STATE_STYLES[trial.state]), _Cell(steps)),
        reason=trial.reason,
    )


def _epsilon_cell(shown: TrialSummary | Configuration) -> _Cell:
    epsilon = show_epsilon(shown.epsilon)
    if shown.state is TrialState.REJECTED:
        return _Cell(f"({epsilon})", "dim")
    return _Cell(epsilon)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckRow:
    """What admission would say to one trial.

    Attributes:
        config: The hyperparameters.
        epsilon: What the trial would cost; None where no finite bound is known.
        decision: The answer.
        reason: Why; shown for rejections.
    """

    config: Mapping[str, Any]
    epsilon: float | None
    decision: Literal["admitted", "rejected"]
    reason: str


def check_table(
    rows: Sequence[CheckRow],
    *,
    title: str = "",
    guarantee: str = "",
    max_rows: int | None = None,
    repeats: int = 1,
    noun: str = "trial",
) -> RenderableType:
    """What would be admitted and what rejected, in the trials' order.

    Args:
        rows: One per configuration.
        title: Stands above, before the counts.
        guarantee: The policy's promise in words, shown below.
        max_rows: Show so many configurations, and only count the rest; None shows all.
        repeats: How many trials each of them is.
        noun: What each row is.
    """
    shown = rows if max_rows is None else rows[:max_rows]
    rest = rows[len(shown) :]
    configs = [row.config for row in rows]
    counts = _counted([row.decision for row in rows] * repeats, noun)
    styles = {"admitted": "green", "rejected": "red"}
    varying = varying_names(configs)
    note = f"Each is {repeats} trials with other noise and another initialisation; ε is of one."
    return _Sheet(
        title=f"{one_line(title)}: {counts}" if title else counts,
        before=(noun, "ε"),
        after=("decision",),
        left=frozenset({"decision"}),
        names=tuple(name for name in varying if name != "sampling_prob"),
        rows=tuple(
            _Row(
                number=number,
                before=(
                    _Cell(_consecutive(number * repeats, repeats)),
                    _Cell(show_epsilon(row.epsilon)),
                ),
                config=flat_config(row.config),
                after=(_Cell(row.decision, styles[row.decision]),),
                reason=row.reason if row.decision == "rejected" else "",
            )
            for number, row in enumerate(shown)
        ),
        hidden=f"and {len(rest)} more: {count_words([r.decision for r in rest])}" if rest else "",
        notes=(
            *_constants(configs),
            *([(note, "dim")] if repeats > 1 else []),
            *([(guarantee, "")] if guarantee else []),
        ),
    )


def _consecutive(first: int, count: int) -> str:
    """``3``, or ``3-5``: the numbers of so many trials."""
    return str(first) if count == 1 else f"{first}-{first + count - 1}"
