"""What a scheduler decided, as rows: a decision is made once, and outlives who made it.

A rung holds the utility that every trial had when it first reported there or beyond; where every
report is decided on, each step is a rung. Decisions are made from reports in the database, so one
that a crash prevented is made afterwards from the same report; one that was made is not made
again. A trial that is to stop is PRUNED by the very transaction that decides so.

Where a trial may wait, it waits at the one rung whose row says that it does not go on, until
somebody promotes it: then that row says that it does. What a person sets aside has no such row.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from accounting import Ledger
from sweeps.database import rows
from sweeps.database.states import TrialState
from sweeps.database.tables import (
    budgeting,
    finite_or_none,
    reading,
    reports,
    rungs,
    trials,
    writing,
)

GoesOnFn = Callable[[float, Sequence[float]], bool]
"""Whether a trial with some utility goes on, where others had these when they were there."""


BestFn = Callable[[Sequence[float]], Sequence[int]]
"""Which of those at a rung may go on, best first, by their places; first come first."""


class _Moment(NamedTuple):
    """When a trial is decided on: a rung, and the step and the utility that it came there with."""

    rung: int
    step: int
    utility: float


_MomentsFn = Callable[[Sequence[sa.Row[Any, Any]]], Iterator[_Moment]]
"""The moments that a trial's reports have brought, in order."""
_ObjectionFn = Callable[[sa.Connection, sa.Row[Any], _Moment], str]
"""Why a trial does not go on; empty if it does."""


class RungRows:
    """Decides at rungs, beside what was decided before.

    Args:
        ledger: In a database that has this room's tables.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def decide(
        self,
        trial_id: str,
        milestones: Sequence[int],
        goes_on: GoesOnFn,
        *,
        may_wait: bool = False,
    ) -> TrialState:
        """Decides on a trial at every rung that it has reached, lowest first. Idempotent.

        Args:
            trial_id: The trial.
            milestones: The rungs, in steps.
            goes_on: Asked once for each rung. A utility that is not finite is -inf there, and is
                none of the others'.
            may_wait: Whether one that does not go on is to wait there, instead of being pruned;
                its worker, or `set_aside`, sees to that.

        Returns:
            Where the trial is afterwards: PRUNED, or as it was before.

        Raises:
            StoreError: If there is no such trial.
            DatabaseError: If the database fails; nothing is decided then.
        """

        def moments(own: Sequence[sa.Row[Any, Any]]) -> Iterator[_Moment]:
            for rung in sorted(milestones):
                report = next((row for row in own if row.step >= rung), None)
                if report is not None:
                    yield _Moment(rung, report.step, _utility(report))

        def objection(connection: sa.Connection, trial: sa.Row[Any], moment: _Moment) -> str:
            if goes_on(moment.utility, _utilities(connection, trial.sweep_id, moment.rung)):
                return ""
            return (
                f"eval_accuracy {moment.utility:.4f} at step {moment.step} was not among the "
                f"best of those that had reached step {moment.rung}"
            )

        return self._decide(trial_id, moments, objection, may_wait=may_wait)

    def decide_by_means(self, trial_id: str, grace_period: int, goes_on: GoesOnFn) -> TrialState:
        """Decides on a trial at every report of it, the first one first. Idempotent.

        Args:
            trial_id: The trial.
            grace_period: The first step at which it is decided on, and from which on others count.
            goes_on: Asked once for each step, with the best utility that the trial has reported
                by then (-inf where none is finite), and the means of what the others have
                reported from ``grace_period`` to that step. Others are those that have reported
                there or beyond and are not exempt; one with a utility in between that is not
                finite is left out.

        Returns:
            As `decide`.

        Raises:
            StoreError: If there is no such trial.
            DatabaseError: If the database fails; nothing is decided then.
        """

        def moments(own: Sequence[sa.Row[Any, Any]]) -> Iterator[_Moment]:
            best = -math.inf
            for report in own:
                best = max(best, _utility(report))
                if report.step >= grace_period:
                    yield _Moment(report.step, report.step, best)

        def objection(connection: sa.Connection, trial: sa.Row[Any], moment: _Moment) -> str:
            means = _running_means(connection, trial, grace_period, moment.step)
            if goes_on(moment.utility, means):
                return ""
            return (
                f"the best eval_accuracy up to step {moment.step}, {moment.utility:.4f}, was "
                f"below the median of the {len(means)} other trials' means up to there, "
                f"{statistics.median(means):.4f}"
            )

        return self._decide(trial_id, moments, objection)

    def set_aside(self, trial_id: str) -> bool:
        """Sets a trial aside that is to wait at a rung, if nobody works on it.

        Returns:
            Whether it waits.

        Raises:
            StoreError: If there is no such trial.
        """
        with writing(self._ledger.engine) as connection:
            trial = rows.locked_trial(connection, trial_id)
            rung = rows.waiting_rung(connection, trial)
            if rung is not None:
                rows.set_aside(connection, trial_id, rung)
        return rung is not None

    def waiting(self, sweep_id: str) -> Sequence[sa.Row[Any]]:
        """The trials that wait at a rung: their rows, with the rung, the step and the utility."""
        columns = (trials, rungs.c.rung, rungs.c.step, rungs.c.utility)
        with reading(self._ledger.engine) as connection:
            return connection.execute(
                rows.waiting(sa.select(*columns), sweep_id).order_by(trials.c.number)
            ).all()

    def prune_waiting(self, sweep_id: str) -> None:
        """Ends the trials that wait at a rung, for nothing comes by which they could rise."""
        for trial in self.waiting(sweep_id):
            utility = math.nan if trial.utility is None else trial.utility
            reason = (
                f"eval_accuracy {utility:.4f} at step {trial.step} was never among the best "
                f"of those that reached step {trial.rung}"
            )
            with budgeting(self._ledger) as transaction:
                found = rows.locked_trial(transaction.connection, trial.trial_id)
                if rows.waiting_rung(transaction.connection, found) is not None:
                    rows.end_trial(transaction, found, TrialState.PRUNED, reason)

    def promotable(self, sweep_id: str, best: BestFn) -> str | None:
        """Which trial that waits may go on first: the best one at the highest rung; else None.

        Args:
            sweep_id: The sweep.
            best: Asked about the utilities of a rung. One that is not finite is not among them.
        """
        with reading(self._ledger.engine) as connection:
            return _promotable(connection, sweep_id, best)

    def promote(self, sweep_id: str, best: BestFn) -> str | None:
        """Lets the trial go on that `promotable` names; gives its id."""
        with writing(self._ledger.engine) as connection:
            trial_id = _promotable(connection, sweep_id, best)
            if trial_id is None:
                return None
            if rows.locked_trial(connection, trial_id).state != TrialState.PAUSED:
                return None  # somebody cancelled it in this moment
            rows.let_go_on(connection, trial_id)
            return trial_id

    def _decide(
        self,
        trial_id: str,
        moments: _MomentsFn,
        objection: _ObjectionFn,
        *,
        may_wait: bool = False,
    ) -> TrialState:
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = rows.locked_trial(connection, trial_id)
            state = TrialState(trial.state)
            if trial.exempt or state not in (TrialState.RUNNING, TrialState.PAUSED):
                return state
            if rows.waiting_rung(connection, trial) is not None:
                return state
            decided = set(
                connection.scalars(sa.select(rungs.c.rung).where(rungs.c.trial_id == trial_id))
            )
            for moment in moments(_own_reports(connection, trial_id)):
                if moment.rung in decided:
                    continue
                reason = objection(connection, trial, moment)
                connection.execute(
                    rungs.insert().values(
                        trial_id=trial_id,
                        rung=moment.rung,
                        step=moment.step,
                        utility=finite_or_none(moment.utility),
                        goes_on=not reason,
                        decided_at=time.time(),
                    )
                )
                if reason and may_wait:
                    return state
                if reason:
                    rows.end_trial(transaction, trial, TrialState.PRUNED, reason)
                    return TrialState.PRUNED
            return state


def _promotable(connection: sa.Connection, sweep_id: str, best: BestFn) -> str | None:
    waiting = set(connection.scalars(rows.waiting(sa.select(trials.c.trial_id), sweep_id)))
    if not waiting:
        return None
    found = connection.execute(
        sa.select(rungs.c.trial_id, rungs.c.rung, rungs.c.utility, rungs.c.goes_on)
        .join(trials, trials.c.trial_id == rungs.c.trial_id)
        .where(trials.c.sweep_id == sweep_id, rungs.c.utility.is_not(None))
        .order_by(rungs.c.rung.desc(), rungs.c.decided_at, trials.c.number)
    )
    for _, group in itertools.groupby(found, key=lambda row: row.rung):
        there = list(group)
        for place in best([row.utility for row in there]):
            row = there[place]
            if not row.goes_on and row.trial_id in waiting:
                return str(row.trial_id)
    return None


def _utility(report: sa.Row[Any, Any]) -> float:
    return -math.inf if report.eval_accuracy is None else report.eval_accuracy


def _first_of_step() -> sa.ColumnElement[bool]:
    """Reports without those of steps that a later branch took again."""
    again = reports.alias()
    first = sa.select(sa.func.min(again.c.branch)).where(
        again.c.trial_id == reports.c.trial_id, again.c.step == reports.c.step
    )
    return reports.c.branch == first.correlate(reports).scalar_subquery()


def _own_reports(connection: sa.Connection, trial_id: str) -> Sequence[sa.Row[Any, Any]]:
    return connection.execute(
        sa.select(reports.c.step, reports.c.eval_accuracy)
        .where(reports.c.trial_id == trial_id, _first_of_step())
        .order_by(reports.c.step)
    ).all()


def _utilities(connection: sa.Connection, sweep_id: str, rung: int) -> list[float]:
    return [
        *connection.scalars(
            sa.select(rungs.c.utility)
            .join(trials, trials.c.trial_id == rungs.c.trial_id)
            .where(
                trials.c.sweep_id == sweep_id, rungs.c.rung == rung, rungs.c.utility.is_not(None)
            )
        )
    ]


def _running_means(
    connection: sa.Connection, trial: sa.Row[Any], grace_period: int, step: int
) -> list[float]:
    utility = reports.c.eval_accuracy
    last = reports.alias()
    furthest = sa.select(sa.func.max(last.c.step)).where(last.c.trial_id == trials.c.trial_id)
    found = connection.execute(
        sa.select(sa.func.sum(utility), sa.func.count())
        .join(trials, trials.c.trial_id == reports.c.trial_id)
        .where(
            trials.c.sweep_id == trial.sweep_id,
            trials.c.trial_id != trial.trial_id,
            trials.c.exempt.is_(False),
            reports.c.step.between(grace_period, step),
            _first_of_step(),
            furthest.correlate(trials).scalar_subquery() >= step,
        )
        .group_by(reports.c.trial_id)
        .having(sa.func.count(utility) == sa.func.count())
    )
    return [total / count for total, count in found]
