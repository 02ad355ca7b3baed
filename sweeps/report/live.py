"""What a person sees while a sweep runs.

`LiveView` reads the database about twice a second in a thread of its own. On a terminal it draws
one panel in place; anywhere else it writes plain lines, one when a trial starts or ends and one
about progress at most every ten seconds. Nothing that goes wrong here reaches the sweep: a frame
that cannot be read or drawn is left out.
"""

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.report.results import Configuration, SweepResults, TrialSummary, read_results
from sweeps.report.table import (
    NO_VALUE,
    STATE_STYLES,
    brief_config,
    describe_config,
    fold_reasons,
    list_numbers,
    one_line,
    show_accuracy,
    show_epsilon,
    show_mean,
    show_value,
    varying_names,
)

RATE_WINDOW_SECS = 30.0
_FRAME_SECS = 0.5
_LINE_EVERY_SECS = 10.0
# Reading takes at most this share of the time, however large the sweep.
_READING_SHARE = 0.1
_LAST_FRAME_SECS = 5.0
_MAX_RUNNING_SHOWN = 8
_SECRET = "a private selection: how far it is stays secret"


# --- What there is to say: pure, on anybody's clock ----------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """How many steps had been taken at a time."""

    at_secs: float
    done_steps: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a running sweep is.

    Attributes:
        counts: Trials by state; states without trials are left out.
        done_steps: Steps charged so far, over all trials but private selections, whose steps
            nobody may count.
        released_steps: Steps that were admitted and will not run: trials ended before them.
        admitted_steps: Steps that were admitted.
        steps_per_sec: Over the recent past; None where that is too short to say.
        secs_left: Until all steps are done at that rate; None where it is not known.
        best: The configuration with the highest accuracy so far.
        running: Trials that run, by number.
    """

    counts: Mapping[TrialState, int]
    done_steps: int
    released_steps: int
    admitted_steps: int
    steps_per_sec: float | None
    secs_left: float | None
    best: Configuration | None
    running: tuple[TrialSummary, ...]

    @property
    def fraction(self) -> float:
        """How much of what was admitted is settled, done or released, in [0, 1]."""
        if not self.admitted_steps:
            return 1.0
        return (self.done_steps + self.released_steps) / self.admitted_steps


def progress(results: SweepResults, history: Sequence[Sample], now: float) -> Progress:
    """Where a sweep is.

    Args:
        results: As just read.
        history: Earlier samples, oldest first; `sample` takes one.
        now: Seconds, on the clock of the samples.
    """
    admitted = [
        trial
        for trial in results.trials
        if trial.state is not TrialState.REJECTED and not trial.selects
    ]
    done = sum(trial.charged_iterations for trial in admitted)
    total = sum(trial.planned_iterations for trial in admitted)
    released = sum(
        trial.planned_iterations - trial.charged_iterations
        for trial in admitted
        if trial.state.is_finished
    )
    rate = _rate(history, done, now) if total else None
    left = total - done - released
    return Progress(
        counts={state: n for state in TrialState if (n := results.count(state))},
        done_steps=done,
        released_steps=released,
        admitted_steps=total,
        steps_per_sec=rate,
        secs_left=0.0 if left == 0 else left / rate if rate else None,
        best=results.best,
        running=tuple(t for t in results.trials if t.state is TrialState.RUNNING),
    )


def sample(results: SweepResults, now: float) -> Sample:
    """What `progress` needs to remember of results."""
    return Sample(now, sum(trial.charged_iterations for trial in results.trials))


def _rate(history: Sequence[Sample], done: int, now: float) -> float | None:
    recent = [past for past in history if now - past.at_secs <= RATE_WINDOW_SECS]
    if not recent or now - recent[0].at_secs < 1:
        return None
    return max(0, done - recent[0].done_steps) / (now - recent[0].at_secs)


def show_secs(secs: float) -> str:
    """A duration in two units: ``45 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(secs)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{round(whole / 86400)} days"


def _pace(now: Progress) -> str:
    parts: list[str] = []
    if now.steps_per_sec is not None:
        parts.append(f"{now.steps_per_sec:,.3g} steps/s" if now.done_steps else "no steps yet")
    if now.secs_left:
        parts.append(f"about {show_secs(now.secs_left)} left")
    return ", ".join(parts)


def _count_words(now: Progress) -> str:
    return ", ".join(f"{count} {state.lower()}" for state, count in now.counts.items())


def _reached(shown: TrialSummary | Configuration) -> str:
    return f"{show_mean(shown)} at ε = {show_epsilon(shown.epsilon)}"


def _heading(results: SweepResults) -> str:
    privacy = results.privacy
    return (
        f"{one_line(results.name)}: policy {privacy['policy']}, budget "
        f"ε = {show_value(privacy['target_epsilon'])}, δ = {privacy['target_delta']:g}"
    )


# --- Plain lines ---------------------------------------------------------------------------


class PlainLines:
    """Says what changed since the last results, in lines without control codes."""

    def __init__(self) -> None:
        self._states: dict[str, TrialState] | None = None
        self._told_at = 0.0
        self._told: tuple[int, dict[TrialState, int]] | None = None

    def lines(self, results: SweepResults, now: Progress, at_secs: float) -> list[str]:
        """The lines that these results add.

        Args:
            results: As just read.
            now: What `progress` says of them.
            at_secs: Seconds on a clock that only goes forward.
        """
        lines: list[str] = []
        before = self._states
        self._states = {trial.trial_id: trial.state for trial in results.trials}
        if before is None:
            lines += _opening(results, now)
            self._told_at = at_secs
        names = varying_names([trial.config for trial in results.trials])
        for trial in results.trials:
            # Whatever had ended before the first look has been counted in the opening.
            old = (before or self._states).get(trial.trial_id, trial.state)
            fresh = before is None and trial.state is TrialState.RUNNING
            if trial.state is not old or fresh:
                lines += _change(trial, old, names)
        here = (now.done_steps, dict(now.counts))
        if at_secs - self._told_at >= _LINE_EVERY_SECS and here != self._told:
            lines.append(_progress_line(now))
            self._told, self._told_at = here, at_secs
        return lines


def _opening(results: SweepResults, now: Progress) -> list[str]:
    number = len(results.trials)
    trials = f"{number} trial{'' if number == 1 else 's'}: {_count_words(now)}"
    lines = [_heading(results), trials]
    rejected = [t for t in results.trials if t.state is TrialState.REJECTED]
    reasons = fold_reasons([(trial.number, trial.reason) for trial in rejected])
    lines += [f"rejected {list_numbers(reason.numbers)}: {reason.text}" for reason in reasons]
    return lines


def _change(trial: TrialSummary, old: TrialState, names: Sequence[str]) -> list[str]:
    lines: list[str] = []
    waited = old in (TrialState.QUEUED, TrialState.ADMITTED)
    if trial.state is TrialState.RUNNING or (waited and trial.charged_iterations):
        config = describe_config(trial.config, [name for name in names if name != "iterations"])
        steps = f"{trial.planned_iterations} steps"
        if trial.selects:
            steps = _SECRET
        steps += f", ε up to {show_epsilon(trial.planned_epsilon)}"
        word = "resumed" if old is TrialState.PAUSED else "started"
        lines.append(f"trial {trial.number} {word}: {config + '; ' if config else ''}{steps}")
    if trial.state.is_finished:
        end = f"trial {trial.number} {trial.state.lower()}"
        if trial.eval_accuracy is not None:
            end += f": {_reached(trial)}"
        end += "" if trial.selects else f" ({_steps(trial)} steps)"
        reason = one_line(trial.reason, 300)
        lines.append(f"{end}: {reason}" if reason else end)
    elif trial.state is TrialState.PAUSED:
        lines.append(f"trial {trial.number} paused")
    return lines


def _steps(trial: TrialSummary) -> str:
    if trial.selects:
        return NO_VALUE
    return f"{trial.charged_iterations}/{trial.planned_iterations}"


def _progress_line(now: Progress) -> str:
    parts = [_pace(now), _count_words(now)]
    if now.admitted_steps:
        steps = f"{now.done_steps}/{now.admitted_steps - now.released_steps} steps"
        parts.insert(0, f"{steps} ({now.fraction:.0%})")
    if now.best is not None:
        parts.append(f"best {_reached(now.best)} ({list_numbers(now.best.numbers)})")
    return "; ".join(part for part in parts if part)


# --- The panel -----------------------------------------------------------------------------


def panel(results: SweepResults, now: Progress, elapsed_secs: float) -> RenderableType:
    """One frame of the live view.

    Args:
        results: As just read.
        now: What `progress` says of them.
        elapsed_secs: How long the view has been up.
    """
    lines: list[RenderableType] = [Text(_heading(results), style="bold", no_wrap=True)]
    counts = Text()
    for state, count in now.counts.items():
        counts.append("  " if counts else "")
        counts.append(f"{count} {state.lower()}", style=STATE_STYLES[state])
    lines.append(counts)
    secret = any(trial.selects for trial in results.trials)
    lines.append(Text(_SECRET, style="dim") if secret else _bar(now))
    time_words = [f"{show_secs(elapsed_secs)} so far", _pace(now)]
    lines.append(Text(", ".join(word for word in time_words if word), style="dim"))
    names = varying_names([trial.config for trial in results.trials])
    if now.best is not None:
        best = Text("best so far: ", style="bold")
        which = list_numbers(now.best.numbers)
        best.append(f"{which}, {_reached(now.best)}", style="green")
        config = ", ".join(brief_config(now.best.config, names))
        best.append(f"  {config}", style="not bold")
        lines.append(best)
    if now.running:
        lines.append(_running(now.running, names))
    return Group(*lines)


def _bar(now: Progress) -> Table:
    bar = Table.grid(padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.expand = True
    settled = now.done_steps + now.released_steps
    steps = f"{now.done_steps:,}/{now.admitted_steps:,} steps"
    if now.released_steps:
        steps += f", {now.released_steps:,} released"
    bar.add_row(ProgressBar(total=max(now.admitted_steps, 1), completed=settled), Text(steps))
    return bar


def _running(trials: Sequence[TrialSummary], names: Sequence[str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for trial in trials[:_MAX_RUNNING_SHOWN]:
        table.add_row(
            Text(f"trial {trial.number}", style="cyan"),
            _steps(trial),
            show_accuracy(trial.eval_accuracy),
            Text(", ".join(brief_config(trial.config, names)), style="dim"),
        )
    if len(trials) > _MAX_RUNNING_SHOWN:
        table.add_row("", f"and {len(trials) - _MAX_RUNNING_SHOWN} more", "", "")
    return table


# --- The thread ----------------------------------------------------------------------------


class LiveView:
    """Shows a sweep for as long as a ``with`` block runs.

    On a terminal the last frame is wiped, for what follows says it all. The end of the block
    wakes the thread, which looks once more, and waits for that a few seconds at most.

    Args:
        store: Where the sweep is.
        sweep_id: Which one.
        console: Where to draw.
    """

    def __init__(self, store: Store, sweep_id: str, console: Console) -> None:
        self._store = store
        self._sweep_id = sweep_id
        self._console = console
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-view", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(_LAST_FRAME_SECS)
        if self._thread.is_alive():
            self._console.show_cursor(True)

    def _run(self) -> None:
        # A console that is gone (a closed pipe, say) is no reason to stop a sweep.
        with contextlib.suppress(Exception):
            if self._console.is_terminal and not self._console.is_dumb_terminal:
                with Live(console=self._console, auto_refresh=False, transient=True) as live:
                    self._frames(_Panels(live))
            else:
                self._frames(_Lines(self._console))

    def _frames(self, screen: "_Panels | _Lines") -> None:
        # Samples come at most twice a second.
        history: deque[Sample] = deque(maxlen=int(2 * RATE_WINDOW_SECS) + 2)
        while True:
            last = self._stop.is_set()
            began = time.monotonic()
            with contextlib.suppress(Exception):
                results = read_results(self._store, self._sweep_id)
                screen.show(results, progress(results, history, began), began)
                history.append(sample(results, began))
            if last:
                return
            took = time.monotonic() - began
            self._stop.wait(max(_FRAME_SECS, took / _READING_SHARE))


class _Panels:
    def __init__(self, live: Live) -> None:
        self._live = live
        self._began = time.monotonic()

    def show(self, results: SweepResults, now: Progress, at_secs: float) -> None:
        self._live.update(panel(results, now, at_secs - self._began), refresh=True)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._plain = PlainLines()

    def show(self, results: SweepResults, now: Progress, at_secs: float) -> None:
        for line in self._plain.lines(results, now, at_secs):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
