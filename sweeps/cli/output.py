"""Where a command's words go, and how it ends.

Answers go to standard output; progress, notes and errors go to standard error, so ``--json``
leaves exactly one object on standard output.
"""

import enum
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

if TYPE_CHECKING:
    from sweeps.admission import Proposal
    from sweeps.spec.sweep_spec import SweepSpec

out = Console()
err = Console(stderr=True)

# Work that is done by then shows no progress.
_SHOW_AFTER_SECS = 2.0


class ExitCode(enum.IntEnum):
    """How a command ends."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    NOTHING_ADMITTED = 3
    INTERRUPTED = 130


def print_json(value: object) -> None:
    """Prints one object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_line(text: str, *, style: str = "") -> None:
    """Prints a line as it is: nothing in it is markup, and it is not broken."""
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_note(text: str, *, style: str = "") -> None:
    """As `print_line`, on standard error."""
    err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reckoning() -> Generator[Callable[["SweepSpec"], Callable[["Proposal"], None]]]:
    """A progress bar on a terminal while a specification is decided on.

    Yields:
        What `sweeps.service.make_plan` takes as ``on_spec``.
    """
    columns = (TextColumn("reckoning privacy"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:

        def on_spec(spec: "SweepSpec") -> Callable[["Proposal"], None]:
            task = bar.add_task("", total=spec.num_listed)
            return lambda _: bar.advance(task)

        yield on_spec


@contextmanager
def progress(text: str, total: int) -> Generator[Callable[[int], None]]:
    """A progress bar on a terminal for work on many things, once that takes long.

    Args:
        text: What is being done.
        total: Number of things.

    Yields:
        What is called with the number of things done since the last call, by one thread at a
        time.
    """
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=err, transient=True, disable=not err.is_terminal)
    task = bar.add_task("", total=total)
    started = time.monotonic()

    def on_progress(count: int) -> None:
        bar.advance(task, count)
        if not bar.live.is_started and time.monotonic() - started > _SHOW_AFTER_SECS:
            bar.start()

    try:
        yield on_progress
    finally:
        bar.stop()
