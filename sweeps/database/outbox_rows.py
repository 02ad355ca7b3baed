"""What MLflow has yet to hear, as rows."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from sweeps.database.tables import (
    outbox,
    reading,
    sweeps,
    trials,
    try_delivery_lock,
    writing,
)

_IDS_AT_A_TIME = 500  # databases take so many values in one statement, and not many more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """A row of the outbox, which is kept: with it `dp-sweeps verify` holds MLflow to its word."""

    message_id: int
    sweep_id: str
    trial_id: str | None
    kind: str
    payload: Mapping[str, Any]
    created_at: float


class OutboxRows:
    """Reads and marks messages; they are written with what they tell of (`rows.tell`).

    Args:
        engine: The database.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def delivery_lock(self) -> AbstractContextManager[bool]:
        """The right to deliver, as `sweeps.database.tables.try_delivery_lock` says."""
        return try_delivery_lock(self._engine)

    def undelivered(self, limit: int = 1000, *, after: int = 0) -> list[Message]:
        """The oldest messages that MLflow has not yet got, in order; ids above ``after`` only."""
        columns = [outbox.c[field.name] for field in dataclasses.fields(Message)]
        query = (
            sa.select(*columns)
            .where(outbox.c.delivered_at.is_(None), outbox.c.message_id > after)
            .order_by(outbox.c.message_id)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            return [Message(**row) for row in connection.execute(query).mappings()]

    def count_undelivered(self) -> int:
        """How many messages MLflow has not yet got."""
        query = sa.select(sa.func.count()).where(outbox.c.delivered_at.is_(None))
        with reading(self._engine) as connection:
            return connection.scalar(query) or 0

    def mark_delivered(self, message_ids: Sequence[int]) -> None:
        """Marks messages that MLflow has got."""
        for start in range(0, len(message_ids), _IDS_AT_A_TIME):
            some = message_ids[start : start + _IDS_AT_A_TIME]
            # A transaction each: those that charge wait for no more than one.
            with writing(self._engine) as connection:
                connection.execute(
                    outbox.update()
                    .where(outbox.c.message_id.in_(some))
                    .values(delivered_at=time.time())
                )

    def trials(self, trial_ids: Sequence[str]) -> dict[str, sa.Row[Any]]:
        """The rows of some trials, by id, with the MLflow runs that are theirs."""
        found: dict[str, sa.Row[Any]] = {}
        with reading(self._engine) as connection:
            for start in range(0, len(trial_ids), _IDS_AT_A_TIME):
                some = trial_ids[start : start + _IDS_AT_A_TIME]
                query = sa.select(trials).where(trials.c.trial_id.in_(some))
                found |= {row.trial_id: row for row in connection.execute(query)}
        return found

    def set_mlflow_run_id(self, sweep_id: str, trial_id: str | None, run_id: str) -> None:
        """Remembers which MLflow run is a trial's, or with None the sweep's own."""
        if trial_id is None:
            change = sweeps.update().where(sweeps.c.sweep_id == sweep_id)
        else:
            change = trials.update().where(trials.c.trial_id == trial_id)
        with writing(self._engine) as connection:
            connection.execute(change.values(mlflow_run_id=run_id))
