"""What a scheduler decided, as rows: a decision is made once, and outlives who made it.

A rung holds the utility that every trial had when it first reported there or beyond. Decisions
are made from reports in the database, so one that a crash prevented is made afterwards from the
same report; one that was made is not made again. A trial that is to stop is PRUNED by the very
transaction that decides so.
"""

import math
import time
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from accounting import Ledger
from sweeps.database import rows
from sweeps.database.states import TrialState
from sweeps.database.tables import budgeting, finite_or_none, reports, rungs, trials

GoesOnFn = Callable[[float, Sequence[float]], bool]
"""Whether a trial with some utility goes on, where others had these when they were there."""


class RungRows:
    """Decides at rungs, beside what was decided before.

    Args:
        ledger: In a database that has this room's tables.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def decide(self, trial_id: str, milestones: Sequence[int], goes_on: GoesOnFn) -> TrialState:
        """Decides on a trial at every rung that it has reached, lowest first. Idempotent.

        Args:
            trial_id: The trial.
            milestones: The rungs, in steps.
            goes_on: Asked once for each rung. A utility that is not finite is -inf there.

        Returns:
            Where the trial is afterwards: RUNNING, PRUNED, or as it was before if it did not run.

        Raises:
            StoreError: If there is no such trial.
            DatabaseError: If the database fails; nothing is decided then.
        """
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = rows.locked_trial(connection, trial_id)
            if trial.exempt or trial.state != TrialState.RUNNING:
                return TrialState(trial.state)
            own = connection.execute(
                sa.select(reports.c.step, reports.c.eval_accuracy)
                .where(reports.c.trial_id == trial_id)
                .order_by(reports.c.step, reports.c.branch)
            ).all()
            decided = set(
                connection.scalars(sa.select(rungs.c.rung).where(rungs.c.trial_id == trial_id))
            )
            for rung in sorted(milestones):
                report = next((row for row in own if row.step >= rung), None)
                if report is None or rung in decided:
                    continue
                utility = -math.inf if report.eval_accuracy is None else report.eval_accuracy
                others = _utilities(connection, trial.sweep_id, rung)
                stays = goes_on(utility, others)
                connection.execute(
                    rungs.insert().values(
                        trial_id=trial_id,
                        rung=rung,
                        step=report.step,
                        utility=finite_or_none(utility),
                        goes_on=stays,
                        decided_at=time.time(),
                    )
                )
                if not stays:
                    reason = (
                        f"eval_accuracy {utility:.4f} at step {report.step} was not among the "
                        f"best of those that had reached step {rung}"
                    )
                    rows.end_trial(transaction, trial, TrialState.PRUNED, reason)
                    return TrialState.PRUNED
            return TrialState.RUNNING


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
