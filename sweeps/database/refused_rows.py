"""Trials that a budget refused and may yet admit, for steps that others give back make room.

Only a budget under `open` decides on one trial after the other and takes steps back, so only its
refusals are not for good. The row of such a trial keeps what would run and how much of the budget
that takes, by which the next one that fits is found without asking the ledger about each. Nothing
is asked before it fits, so however often somebody looks, the journal gets no longer by it. Of a
configuration that is repeated the first row keeps what all take, which are admitted together.
"""

from collections.abc import Sequence
from contextlib import suppress

import sqlalchemy as sa

from accounting import Ledger
from accounting.ledger.lookup import find_reservation, load_account
from sweeps.database import rows
from sweeps.database.states import TrialState
from sweeps.database.tables import budgeting, reading, trials

# Of the whole budget: what its sum and this one may differ by, for they add in another order.
_ROUNDING = 1e-12


class _NotAll(Exception):
    """Undoes a transaction: repeats are admitted together or not at all."""


class RefusedRows:
    """Has a budget decide again.

    Args:
        ledger: In a database that has this room's tables.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def is_any(self, sweep_id: str) -> bool:
        """Whether a trial of a sweep may be admitted once enough is given back."""
        with reading(self._ledger.engine) as connection:
            return _first(connection, sweep_id) is not None

    def fitting(self, sweep_id: str) -> str | None:
        """The first trial of a sweep that was refused and would be admitted now; None if none."""
        with reading(self._ledger.engine) as connection:
            first = _first(connection, sweep_id)
            if first is None:
                return None
            refused = find_reservation(connection, first)
            assert refused is not None  # it is written with the trial
            account = load_account(connection, refused.budget)
            free = account.free_rdp(refused.team) - _ROUNDING * account.terms.rdp_limit
            return _first(connection, sweep_id, trials.c.needed_rdp <= free)

    def admit(self, sweep_id: str) -> Sequence[str]:
        """Has the budget decide on the trial that `fitting` names, and on its repeats.

        Returns:
            Their ids if they are admitted; else none.

        Raises:
            StoreError: If the sweep does not run.
        """
        first = self.fitting(sweep_id)
        if first is None:
            return ()
        with suppress(_NotAll), budgeting(self._ledger) as transaction:
            connection = transaction.connection
            rows.check_runs(connection, sweep_id)
            if rows.locked_trial(connection, first).state != TrialState.REJECTED:
                return ()
            repeats = connection.scalars(
                sa.select(trials.c.trial_id)
                .where(trials.c.sweep_id == sweep_id, trials.c.repeat_of == first)
                .order_by(trials.c.number)
            )
            together = [first, *repeats]
            for trial_id in together:
                answer = transaction.ask_again(trial_id)
                if answer.state == "refused":  # somebody else was faster
                    if trial_id != first:
                        raise _NotAll
                    rows.set_trial(connection, first, reason=answer.verdict.reason)
                    return ()
                rows.set_trial(
                    connection, trial_id, state=TrialState.ADMITTED, reason="", needed_rdp=None
                )
                rows.tell(connection, sweep_id, trial_id, "trial_start", {})
            return together
        return ()


def _first(
    connection: sa.Connection, sweep_id: str, *conditions: sa.ColumnElement[bool]
) -> str | None:
    query = sa.select(trials.c.trial_id).where(
        trials.c.sweep_id == sweep_id,
        trials.c.state == TrialState.REJECTED,
        trials.c.needed_rdp.is_not(None),
        *conditions,
    )
    return connection.scalar(query.order_by(trials.c.number).limit(1))
