"""Rungs at which everybody waits for everybody else, as rows.

Where a scheduler decides on a group of trials at once, each that comes to a rung waits there (see
`sweeps.database.rung_rows`) until all the others of its group have come, too, or never will. Then
the group has gathered, and what is decided on it follows from who is there and with what utility,
not from who came when: so whoever drives the sweep decides alike, however often it is asked.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from accounting import Ledger
from sweeps.database import rows
from sweeps.database.forking import Fork, NewFork, RefusedFork, fork, record_refused
from sweeps.database.states import TrialState
from sweeps.database.tables import budgeting, reading, rungs, trials, writing

GroupOfFn = Callable[[int], range]
"""The numbers of the trials that a trial, by its number, is compared with, its own included."""

# How a trial ends that is not there any more, though it had come.
_GONE = (TrialState.FAILED, TrialState.CANCELLED, TrialState.DIVERGED)


class Came(NamedTuple):
    """A trial that came to a rung.

    Attributes:
        trial_id: The trial.
        number: Its place in the sweep.
        step: Where it reported.
        utility: What it reported there; -inf where that was not finite.
        waits: Whether it waits there now; else it has gone on, or was pruned there.
    """

    trial_id: str
    number: int
    step: int
    utility: float
    waits: bool


class Gathering(NamedTuple):
    """All that came to a rung, by number, once nobody else will, and some wait."""

    rung: int
    there: Sequence[Came]


class Gatherings:
    """Finds out which groups have gathered, and has their trials go on or not.

    Args:
        ledger: In a database that has this room's tables.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def found(
        self, sweep_id: str, group_of: GroupOfFn, *, more_to_come: bool = False
    ) -> list[Gathering]:
        """The gatherings of a sweep, the highest rung first.

        Who has ended, or runs at a person's word, is not waited for; nor is a trial that began
        beyond the rung. Who failed or was cancelled while it waited is not there any more.

        Args:
            sweep_id: The sweep.
            group_of: Says who is compared with whom.
            more_to_come: Whether trials may yet be added to the last group.
        """
        with reading(self._ledger.engine) as connection:
            waiting = connection.scalars(rows.waiting(sa.select(trials.c.number), sweep_id))
            groups = {group_of(number) for number in waiting}
            newest = connection.scalar(
                sa.select(sa.func.max(trials.c.number)).where(trials.c.sweep_id == sweep_id)
            )
            last = -1 if newest is None else newest
            found = [
                gathering
                for group in groups
                if not more_to_come or last >= group.stop - 1
                for gathering in _of_group(connection, sweep_id, group)
            ]
        return sorted(found, key=lambda each: (-each.rung, each.there[0].number))

    def prune(self, trial_id: str, rung: int, reason: str) -> bool:
        """Prunes a trial that waits at a rung; False if it does not any more.

        Raises:
            StoreError: If there is no such trial.
        """
        with budgeting(self._ledger) as transaction:
            trial = rows.locked_trial(transaction.connection, trial_id)
            if not _waits(transaction.connection, trial, rung):
                return False
            rows.end_trial(transaction, trial, TrialState.PRUNED, reason)
        return True

    def go_on(self, trial_id: str, rung: int) -> bool:
        """Lets a trial go on that waits at a rung; False if it does not any more.

        Raises:
            StoreError: If there is no such trial.
        """
        with writing(self._ledger.engine) as connection:
            trial = rows.locked_trial(connection, trial_id)
            if not _waits(connection, trial, rung):
                return False
            rows.let_go_on(connection, trial_id)
        return True

    def replace(self, trial_id: str, rung: int, new: NewFork, why: str) -> str | None:
        """Prunes a trial that waits at a rung, and has a fork of another take its place.

        One transaction: what is reserved for the trial is free for the fork, and the trial is
        there as long as the fork is not. If the fork is refused that is recorded, and the trial
        goes on.

        Args:
            trial_id: The trial.
            rung: Where it waits.
            new: The fork.
            why: Why it is to make room.

        Returns:
            The id of the fork, or of the trial that goes on; None if it does not wait any more.

        Raises:
            StoreError: If there is nothing to fork.
            accounting.AccountingError: If the data is not that of the sweep.
        """
        try:
            with budgeting(self._ledger) as transaction:
                connection = transaction.connection
                trial = rows.locked_trial(connection, trial_id)
                if not _waits(connection, trial, rung):
                    return None
                parent = rows.locked_trial(connection, new.parent_trial_id)
                number, _ = rows.next_name(connection, trial.sweep_id)
                reason = f"{why}; trial {number} took its place, a fork of trial {parent.number}"
                rows.end_trial(transaction, trial, TrialState.PRUNED, reason)
                decision = fork(transaction, new)
                if not decision.admitted:
                    raise _RefusedError(decision)
        except _RefusedError as error:
            refused = RefusedFork(
                parent_trial_id=error.fork.parent_trial_id,
                parent_step=error.fork.parent_step,
                config=new.config,
                epsilon=error.fork.epsilon_after,
                reason=error.fork.refusal,
            )
            return self.keep(trial_id, rung, refused)
        return decision.trial_id

    def keep(self, trial_id: str, rung: int, refused: RefusedFork) -> str | None:
        """Lets a trial go on that waits at a rung, for the fork in its place was refused.

        Returns:
            The trial's id; None if it does not wait any more.

        Raises:
            StoreError: If there is no such trial.
        """
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            if not _waits(connection, rows.locked_trial(connection, trial_id), rung):
                return None
            rows.let_go_on(connection, trial_id)
            record_refused(connection, refused)
        return trial_id


class _RefusedError(Exception):
    """Takes everything back.

    Attributes:
        fork: What was refused.
    """

    def __init__(self, fork: Fork) -> None:
        super().__init__(fork.refusal)
        self.fork = fork


def _waits(connection: sa.Connection, trial: sa.Row[Any], rung: int) -> bool:
    return trial.state == TrialState.PAUSED and rows.waiting_rung(connection, trial) == rung


def _of_group(connection: sa.Connection, sweep_id: str, group: range) -> Iterator[Gathering]:
    ours = (
        trials.c.sweep_id == sweep_id,
        trials.c.number >= group.start,
        trials.c.number < group.stop,
    )
    members = connection.execute(sa.select(trials).where(*ours).order_by(trials.c.number)).all()
    by_rung: dict[int, dict[str, sa.Row[Any]]] = {}
    decided = sa.select(rungs).join(trials, trials.c.trial_id == rungs.c.trial_id).where(*ours)
    for row in connection.execute(decided):
        by_rung.setdefault(row.rung, {})[row.trial_id] = row
    for rung, came in by_rung.items():
        there: list[Came] = []
        complete = True
        for trial in members:
            row, state = came.get(trial.trial_id), TrialState(trial.state)
            waits = (
                row is not None
                and not (row.goes_on or trial.exempt)
                and state is TrialState.PAUSED
            )
            if row is not None and (row.goes_on or trial.exempt or state not in _GONE):
                utility = float("-inf") if row.utility is None else row.utility
                there.append(Came(trial.trial_id, trial.number, row.step, utility, waits))
            has_passed = (row is not None and row.goes_on) or (trial.parent_step or 0) >= rung
            complete &= waits or has_passed or trial.exempt or state.is_finished
        if complete and any(trial.waits for trial in there):
            yield Gathering(rung, there)
