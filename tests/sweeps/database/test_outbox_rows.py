"""What MLflow has yet to hear: said with what it tells of, given in order, and given once."""

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from sweeps.database.store import Store, open_store
from sweeps.database.tables import outbox, reading
from sweeps.home import Home
from tests.sweeps.database.small_sweep import FIRST, METRICS, TRIAL


def test_delivered_messages_are_not_given_again(store: Store) -> None:
    first, second, third = store.outbox.undelivered()
    store.outbox.mark_delivered([second.message_id])
    assert store.outbox.undelivered() == [first, third]
    assert store.outbox.undelivered(after=first.message_id) == [third]
    assert store.outbox.undelivered(limit=1) == [first]
    assert store.outbox.count_undelivered() == 2


def test_the_outbox_speaks_only_of_what_was_committed(engine: sa.Engine, store: Store) -> None:
    attempt = store.attempts.begin(TRIAL)
    store.attempts.charge(attempt, FIRST, 1)
    with pytest.raises(exc.SQLAlchemyError):
        store.attempts.report(attempt, FIRST.branch_id, 1, {**METRICS, "no_such_column": 1.0})
    with reading(engine) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(outbox)) == 3
    assert store.reports("s-1") == []


def test_mlflow_run_ids_are_remembered(store: Store) -> None:
    store.outbox.set_mlflow_run_id("s-1", None, "parent")
    store.outbox.set_mlflow_run_id("s-1", TRIAL, "child")
    assert store.sweep("s-1").mlflow_run_id == "parent"
    assert [row.mlflow_run_id for row in store.trials("s-1")] == ["child", None, None]


def test_one_delivers_at_a_time(home: Home, store: Store) -> None:
    other = open_store(home)
    with store.outbox.delivery_lock() as first, other.outbox.delivery_lock() as second:
        assert (first, second) == (True, False)
    with other.outbox.delivery_lock() as held:
        assert held
    other.ledger.close()
