"""Many messages, many runs: all of them told and marked, in few requests."""

import collections
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event

from sweeps.home import Home
from sweeps.tracking import mlflow_writer
from sweeps.tracking.mlflow_client import Mlflow
from tests.sweeps.tracking.tracked_sweep import SWEEP, Place, a_trial, content, create, curve, tell


@pytest.fixture
def narrow(place: Place) -> Place:
    """A place whose database takes no more than 999 values in a statement, as old ones do."""

    def narrowed(connection: sqlite3.Connection, _record: object) -> None:
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)

    place.engine.dispose()
    event.listen(place.engine, "connect", narrowed)
    return place


def test_more_messages_are_marked_than_a_statement_takes_values(narrow: Place) -> None:
    create(narrow.store, a_trial(0))
    tell(narrow, f"{SWEEP}-0", range(3000))
    ids = [message.message_id for message in narrow.store.outbox.undelivered(4000)]
    narrow.store.outbox.mark_delivered(ids)
    assert len(ids) == 3002
    assert narrow.store.outbox.count_undelivered() == 0


def test_the_rows_of_more_trials_are_read_than_a_statement_takes_values(narrow: Place) -> None:
    create(narrow.store, *(a_trial(number) for number in range(2200)))
    ids = {f"{SWEEP}-{number}" for number in range(0, 2200, 2)}
    found = narrow.store.outbox.trials(list(ids))
    assert set(found) == ids
    assert all(row.trial_id == trial_id for trial_id, row in found.items())


def test_what_waits_for_a_run_is_one_request(
    place: Place, mlflow_client: Callable[[Home], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    create(place.store, *(a_trial(number) for number in range(3)))
    writer = place.writer()
    writer.deliver()
    for start in range(0, 400, 4):  # in turns, as workers that run side by side
        for number in range(3):
            tell(place, f"{SWEEP}-{number}", range(start, start + 4))
    requests: collections.Counter[str] = collections.Counter()
    log = Mlflow.log

    def counted(self: Mlflow, run_id: str, **told: Any) -> None:
        requests[run_id] += 1
        log(self, run_id, **told)

    monkeypatch.setattr(Mlflow, "log", counted)
    assert writer.deliver() == 1200
    assert sorted(requests.values()) == [1, 1, 1]
    held = content(mlflow_client(place.home))
    for number in range(3):
        expected = [(step, step / 8) for step in range(400)]
        assert curve(held[f"{SWEEP}-{number}"], "epsilon") == expected


def test_progress_is_told_and_marked_while_a_batch_is_under_way(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_writer, "_MARK_EVERY_SECS", 0.0)
    create(place.store, *(a_trial(number) for number in range(3)))
    told: list[tuple[int, int]] = []
    writer = place.writer()
    taken = writer.deliver(lambda count: told.append((count, writer.count_undelivered())))
    assert taken == 4
    assert [left for count, left in told if count] == [3, 2, 1, 0]


def test_what_comes_during_a_delivery_waits_for_the_next(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(place.store, a_trial(0))
    writer = place.writer()
    log = Mlflow.log

    def log_while_more_comes(self: Mlflow, run_id: str, **told: Any) -> None:
        log(self, run_id, **told)
        tell(place, f"{SWEEP}-0", [place.store.outbox.count_undelivered()])

    monkeypatch.setattr(Mlflow, "log", log_while_more_comes)
    assert writer.deliver() == 2  # and it ends
    assert writer.count_undelivered() == 2


def test_eight_writers_and_a_delivery_side_by_side_lose_nothing(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, *(a_trial(number) for number in range(8)))
    writer = place.writer()

    def write(number: int) -> None:
        for start in range(0, 200, 10):
            tell(place, f"{SWEEP}-{number}", range(start, start + 10))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    taken = 0
    while any(thread.is_alive() for thread in threads) or writer.count_undelivered():
        taken += writer.deliver()
    assert taken == 8 * 200 + 9
    held = content(mlflow_client(place.home))
    for number in range(8):
        expected = [(step, step / 8) for step in range(200)]
        assert curve(held[f"{SWEEP}-{number}"], "epsilon") == expected
