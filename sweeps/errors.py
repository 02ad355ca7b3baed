"""Errors of the sweeps room.

    SweepError          exit code 1: anything this room refuses on purpose
    ├── SpecError       exit code 2: a sweep's specification is not allowed; lists every problem
    ├── CommandError    exit code 2: the command line asks for what is not allowed
    ├── HomeError       the folder for state cannot be made
    ├── PlaceError      checkpoints cannot be put or found where they are kept
    ├── DatabaseError   the database cannot be reached, or belongs to another version
    ├── StoreError      a row is absent, or does not allow what was asked
    │   ├── DrivenError     a sweep has a driver already
    │   ├── FencedError     an attempt that may no longer write
    │   ├── HaltedError     nothing may begin: the sweep was paused or stopped
    │   └── OverspentError  more steps than were admitted
    └── TrackingError   MLflow cannot be reached, or refused
        └── RefusedError    MLflow refused: to ask again does not help

Each class carries the exit code with which the command line ends when the error reaches it.
"""

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

MAX_SHOWN_PROBLEMS = 50


class SweepError(Exception):
    """Base of every error that the sweeps room raises on purpose."""

    exit_code: ClassVar[int] = 1


class CommandError(SweepError):
    """The command line asks for something that is not allowed, or that is not there."""

    exit_code: ClassVar[int] = 2


class HomeError(SweepError):
    """The folder for state cannot be made."""


class PlaceError(SweepError):
    """The place where checkpoints are kept cannot be reached, is full, or refuses."""


class DatabaseError(SweepError):
    """The database cannot be reached, or was made by another version."""


class StoreError(SweepError):
    """A row is absent, or its state does not allow what was asked."""


class DrivenError(StoreError):
    """A sweep has a driver already."""


class FencedError(StoreError):
    """An attempt is not its trial's newest, or the trial has ended: it may not write."""


class HaltedError(StoreError):
    """Somebody paused or stopped the sweep, so nothing begins."""


class OverspentError(StoreError):
    """A trial asked for more steps than it was admitted for."""


class TrackingError(SweepError):
    """MLflow cannot be reached, or refused a request; the outbox keeps what it should get."""


class RefusedError(TrackingError):
    """MLflow was reached and refused a request; to ask again does not help."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a specification, said so that a person can mend it.

    Attributes:
        message: The value found and what is allowed instead.
        key_path: Where in the specification, as ``privacy.target_epsilon``; empty for the whole.
        source: The file's name as the person gave it, or None where there is no text.
        line: Line in the source, from 1, or None.
        column: Column in that line, from 1, or None.
    """

    message: str
    key_path: str = ""
    source: str | None = None
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        """``file:line:column: key.path: message``, without the parts that are not known."""
        place = ":".join(
            str(part) for part in (self.source, self.line, self.column) if part is not None
        )
        return ": ".join(part for part in (place, self.key_path, self.message) if part)


class SpecError(SweepError):
    """A specification cannot be read, or says something that is not allowed.

    Attributes:
        problems: Everything that is wrong, in the order of the text.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        if not self.problems:
            raise ValueError("a SpecError needs at least one problem")
        super().__init__(self.problems)

    def __str__(self) -> str:
        """One line per problem; a long list is cut and says so."""
        lines = [str(problem) for problem in self.problems[:MAX_SHOWN_PROBLEMS]]
        if hidden := len(self.problems) - len(lines):
            lines.append(f"... and {hidden} more")
        return "\n".join(lines)
