"""What changes of a trial's rows share: the lock, the fence, the end, and telling MLflow.

Every function here runs within somebody's transaction.
"""

import functools
import secrets
import time
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from accounting import Mechanism, Reservation
from accounting.ledger.lookup import find_reservation
from accounting.ledger.transaction import LedgerTransaction
from sweeps.database.states import AttemptEnd, SweepState, TrialState
from sweeps.database.tables import attempts, outbox, rungs, sweeps, trials
from sweeps.errors import FencedError, StoreError
from sweeps.limits import check_limit

# Built once: building a statement takes as long as running it.
_TRIAL = sa.select(trials).where(trials.c.trial_id == sa.bindparam("id")).with_for_update()
_NEWEST_ATTEMPT = (
    sa.select(attempts)
    .where(attempts.c.trial_id == sa.bindparam("id"))
    .order_by(attempts.c.number.desc())
    .limit(1)
)
_WAITING_RUNG = sa.select(rungs.c.rung).where(
    rungs.c.trial_id == sa.bindparam("id"), rungs.c.goes_on.is_(False)
)
_ENDED_ATTEMPT = (
    attempts.update()
    .where(attempts.c.trial_id == sa.bindparam("id"), attempts.c.ended_at.is_(None))
    .values(ended_at=sa.bindparam("at"), end=sa.bindparam("how"))
)
_MESSAGE = outbox.insert()


def sweep_row(connection: sa.Connection, sweep_id: str) -> sa.Row[Any]:
    """A sweep's row.

    Raises:
        StoreError: If there is none of this id.
    """
    row = connection.execute(sa.select(sweeps).where(sweeps.c.sweep_id == sweep_id)).one_or_none()
    if row is None:
        raise StoreError(f"sweep {sweep_id!r}: not in the ledger; see `dp-sweeps list`")
    return row


def check_runs(connection: sa.Connection, sweep_id: str) -> None:
    """Checks that a sweep runs, as far as its row says.

    Raises:
        StoreError: It does not, or there is no such sweep.
    """
    row = sweep_row(connection, sweep_id)
    if row.state != SweepState.RUNNING:
        raise StoreError(f"sweep {sweep_id}: is {row.state}; allowed is a running one")


def locked_trial(connection: sa.Connection, trial_id: str) -> sa.Row[Any]:
    """A trial's row, which nobody else changes until the transaction ends.

    Raises:
        StoreError: If there is no such trial.
    """
    row = connection.execute(_TRIAL, {"id": trial_id}).one_or_none()
    if row is None:
        raise StoreError(f"trial {trial_id!r}: not in the ledger")
    return row


def newest_attempt(connection: sa.Connection, trial_id: str) -> sa.Row[Any] | None:
    """The row of a trial's newest attempt, or None before the first."""
    return connection.execute(_NEWEST_ATTEMPT, {"id": trial_id}).one_or_none()


def fenced_trial(
    connection: sa.Connection, trial_id: str, attempt_id: str, number: int, *, ended: bool = False
) -> sa.Row[Any]:
    """A trial's row, locked, for its newest attempt alone.

    Args:
        connection: Of the transaction.
        trial_id: The trial.
        attempt_id: The attempt's token.
        number: The attempt's number, for the message.
        ended: Whether a trial or an attempt that has ended will do, too.

    Raises:
        FencedError: If another attempt has begun since, or this one has ended, or the trial does
            not run.
        StoreError: If there is no such trial.
    """
    trial = locked_trial(connection, trial_id)
    newest = newest_attempt(connection, trial_id)
    held = newest is not None and secrets.compare_digest(newest.attempt_id, attempt_id)
    runs = newest is not None and newest.ended_at is None and trial.state == TrialState.RUNNING
    if not held or not (ended or runs):
        raise FencedError(
            f"trial {trial_id}: attempt {number} may no longer write; the trial is {trial.state}"
        )
    return trial


def selects(connection: sa.Connection, sweep_id: str) -> bool:
    """Whether a sweep is a private selection, all of which is one trial."""
    spec: Any = connection.scalar(sa.select(sweeps.c.spec).where(sweeps.c.sweep_id == sweep_id))
    return spec["privacy"]["policy"] == "private_selection"


def beyond_limit(
    connection: sa.Connection, trial: sa.Row[Any], reservation: Reservation, iterations: int
) -> str:
    """Why a trial may not run so many iterations, whatever its budget has left; empty if it may.

    Args:
        connection: Of the transaction.
        trial: The trial, whose sweep's specification has a limit for one trial.
        reservation: The trial's.
        iterations: All that it is to be charged for, over all its branches.
    """
    assert isinstance(reservation.mechanism, Mechanism)
    spec = connection.scalar(sa.select(sweeps.c.spec).where(sweeps.c.sweep_id == trial.sweep_id))
    assert spec is not None
    decision = check_limit(
        spec["privacy"],
        reservation.mechanism.after(iterations),
        reservation.request.prefix,
    )
    return "" if decision.admitted else decision.reason


def next_name(connection: sa.Connection, sweep_id: str, after: int = -1) -> tuple[int, str]:
    """The next number of a sweep, and its trial's id, which no refused request had before.

    Args:
        connection: The caller's.
        sweep_id: The sweep.
        after: A number that is about to be taken; the next is larger.
    """
    newest = connection.scalar(
        sa.select(sa.func.max(trials.c.number)).where(trials.c.sweep_id == sweep_id)
    )
    number = max(-1 if newest is None else newest, after) + 1
    while find_reservation(connection, trial_id := f"{sweep_id}-{number:04d}") is not None:
        number += 1
    return number, trial_id


def waiting_rung(connection: sa.Connection, trial: sa.Row[Any]) -> int | None:
    """The rung at which a trial waits, or is to wait, until it may go on; None if it does not."""
    if trial.exempt or trial.state not in (TrialState.RUNNING, TrialState.PAUSED):
        return None
    return connection.scalar(_WAITING_RUNG, {"id": trial.trial_id})


def waiting(query: sa.Select[Any], sweep_id: str) -> sa.Select[Any]:
    """Narrows a query of trials down to those of a sweep that wait at a rung, with their rung."""
    return query.join_from(trials, rungs, trials.c.trial_id == rungs.c.trial_id).where(
        trials.c.sweep_id == sweep_id,
        trials.c.state == TrialState.PAUSED,
        trials.c.exempt.is_(False),
        rungs.c.goes_on.is_(False),
    )


def set_aside(connection: sa.Connection, trial_id: str, rung: int) -> None:
    """Has a trial wait at a rung; what is reserved for it stays reserved."""
    end_attempt(connection, trial_id, AttemptEnd.PAUSED)
    reason = f"waits at step {rung} until others have come there and it is among the best of them"
    set_trial(connection, trial_id, state=TrialState.PAUSED, reason=reason)


def let_go_on(connection: sa.Connection, trial_id: str) -> None:
    """Ends a trial's wait at a rung."""
    connection.execute(
        rungs.update()
        .where(rungs.c.trial_id == trial_id, rungs.c.goes_on.is_(False))
        .values(goes_on=True)
    )
    set_trial(connection, trial_id, reason="")


def set_trial(connection: sa.Connection, trial_id: str, **values: Any) -> None:
    """Changes columns of a trial."""
    new = {f"to_{name}": value for name, value in values.items()}
    connection.execute(_changed_trial(*values), {"id": trial_id, **new})


@functools.cache
def _changed_trial(*columns: str) -> sa.Update:
    # Of any other name than a column's it complains, as it would not of a parameter.
    return (
        trials.update()
        .where(trials.c.trial_id == sa.bindparam("id"))
        .values({name: sa.bindparam(f"to_{name}") for name in columns})
    )


def end_attempt(connection: sa.Connection, trial_id: str, end: AttemptEnd) -> None:
    """Ends whatever attempt at a trial has not ended."""
    connection.execute(_ENDED_ATTEMPT, {"id": trial_id, "at": time.time(), "how": end})


def end_trial(
    transaction: LedgerTransaction, trial: sa.Row[Any], state: TrialState, reason: str
) -> None:
    """Ends a trial: its state, its attempt, its reservation and what MLflow hears, in one.

    Raises:
        StoreError: If the state may not follow.
    """
    connection = transaction.connection
    if not state.is_finished or not TrialState(trial.state).may_become(state):
        raise StoreError(f"trial {trial.trial_id}: cannot become {state} from {trial.state}")
    set_trial(connection, trial.trial_id, state=state, reason=reason)
    end_attempt(connection, trial.trial_id, AttemptEnd.ENDED)
    transaction.settle(trial.trial_id)
    payload = {"state": state, "reason": reason}
    tell(connection, trial.sweep_id, trial.trial_id, "trial_end", payload)


def tell(
    connection: sa.Connection,
    sweep_id: str,
    trial_id: str | None,
    kind: str,
    payload: Mapping[str, Any],
) -> None:
    """Leaves a message for MLflow; with None for a trial, about the sweep itself."""
    message = {
        "sweep_id": sweep_id,
        "trial_id": trial_id,
        "kind": kind,
        "payload": dict(payload),
        "created_at": time.time(),
    }
    connection.execute(_MESSAGE, message)
