"""Which checkpoints of a trial there are, and which of them are kept.

Every function here runs within somebody's transaction.
"""

import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from sweeps.database.states import TrialState
from sweeps.database.tables import checkpoints, trials

KEPT_CHECKPOINTS = 2
"""Of a trial that runs: the last one may turn out damaged. Of one that has ended, one is kept."""

# Built once: building a statement takes as long as running it.
_NEWEST_FIRST = (
    sa.select(checkpoints)
    .where(checkpoints.c.trial_id == sa.bindparam("id"))
    .order_by(checkpoints.c.step.desc(), checkpoints.c.attempt.desc())
)
_ONE = sa.select(checkpoints.c.step).where(
    checkpoints.c.trial_id == sa.bindparam("trial_id"),
    checkpoints.c.step == sa.bindparam("step"),
    checkpoints.c.attempt == sa.bindparam("attempt"),
)
_NEW = checkpoints.insert()
_FORGOTTEN = checkpoints.delete().where(
    checkpoints.c.trial_id == sa.bindparam("id"),
    checkpoints.c.step == sa.bindparam("at_step"),
    checkpoints.c.attempt == sa.bindparam("by"),
)
_FORKED_STEPS = sa.select(trials.c.parent_step).where(
    trials.c.parent_trial_id == sa.bindparam("id"), trials.c.state != TrialState.REJECTED
)


def newest_first(connection: sa.Connection, trial_id: str) -> Sequence[sa.Row[Any]]:
    """A trial's checkpoints."""
    return connection.execute(_NEWEST_FIRST, {"id": trial_id}).all()


def add(connection: sa.Connection, trial_id: str, step: int, attempt: int, location: str) -> None:
    """Records a checkpoint that is whole. Idempotent."""
    key = {"trial_id": trial_id, "step": step, "attempt": attempt}
    if connection.execute(_ONE, key).one_or_none() is None:
        connection.execute(_NEW, {**key, "location": location, "written_at": time.time()})


def forget_old(connection: sa.Connection, trial_id: str, state: str) -> list[str]:
    """Removes all but the newest checkpoints from the rows, but those that a fork began with.

    Args:
        connection: Of the transaction.
        trial_id: The trial.
        state: Where it is, or will be when the transaction ends.

    Returns:
        Their locations.
    """
    keep = 1 if TrialState(state).is_finished else KEPT_CHECKPOINTS
    found = newest_first(connection, trial_id)
    if len(found) <= keep:
        return []  # to look for forks takes as long as there are trials
    needed = set(connection.scalars(_FORKED_STEPS, {"id": trial_id}))
    old = [row for row in found[keep:] if row.step not in needed]
    for row in old:
        which = {"id": trial_id, "at_step": row.step, "by": row.attempt}
        connection.execute(_FORGOTTEN, which)
    return [row.location for row in old]
