"""MLflow refuses, is away, or is killed: nothing is lost, nobody is held up."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeps.database.states import SweepState, TrialState
from sweeps.database.tables import outbox
from sweeps.errors import RefusedError, TrackingError
from sweeps.home import Home
from sweeps.tracking.outbox import OutboxThread
from tests.sweeps.tracking.tracked_sweep import (
    SWEEP,
    Place,
    Server,
    Worker,
    a_trial,
    content,
    create,
    curve,
    free_port,
    opened,
    run_a_sweep,
    tell,
    wait_until,
)

# -- refusals and outages --------------------------------------------------------------------


def test_a_run_that_somebody_deleted_holds_up_nobody(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0), a_trial(1))
    writer = place.writer()
    writer.deliver()
    client = mlflow_client(place.home)
    client.delete_run(place.store.trials(SWEEP)[0].mlflow_run_id)
    for number in range(2):
        Worker(place.store, number).report(10)
    assert writer.deliver() == 2
    assert set(content(client)) == {SWEEP, f"{SWEEP}-1"}


def test_a_refusal_keeps_its_messages_and_holds_up_nobody(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0), a_trial(1))
    writer = place.writer()
    writer.deliver()
    place.store.outbox.set_mlflow_run_id(SWEEP, f"{SWEEP}-0", "f" * 32)
    for number in range(2):
        Worker(place.store, number).report(10)
    with pytest.raises(RefusedError, match=r"f{32} not found"):
        writer.deliver()
    assert [message.trial_id for message in place.store.outbox.undelivered()] == [f"{SWEEP}-0"]
    assert curve(content(mlflow_client(place.home))[f"{SWEEP}-1"], "eval_accuracy")


def test_a_message_of_a_later_version_is_kept(place: Place) -> None:
    create(place.store, a_trial(0))
    with place.engine.begin() as connection:
        connection.execute(
            outbox.insert().values(sweep_id=SWEEP, kind="novelty", payload={}, created_at=1.7e9)
        )
    with pytest.raises(RefusedError, match="novelty"):
        place.writer().deliver()


def may_deliver(place: Place) -> bool:
    with place.store.outbox.delivery_lock() as held:
        return held


def test_an_unreachable_mlflow_loses_nothing_and_is_said_shortly(
    tmp_path: Path, empty_mlflow: Path, mlflow_client: Callable[[Home], Any]
) -> None:
    folder = tmp_path / "home"
    uri = f"http://me:secretword@127.0.0.1:{free_port()}"
    with opened(folder, mlflow_uri=uri) as place:
        writer = place.writer()
        run_a_sweep(place.store, tmp_path)
        with pytest.raises(TrackingError) as caught:
            writer.deliver()
        assert "Connection refused" in str(caught.value)
        assert "secretword" not in str(caught.value)
        assert len(str(caught.value)) < 250
        pending = place.store.outbox.count_undelivered()
        with OutboxThread(writer, flush_secs=0.5) as background:
            place.store.end_sweep(SWEEP, SweepState.COMPLETED)
        assert background.remaining == pending + 1
        assert isinstance(background.last_error, TrackingError)
        wait_until(lambda: may_deliver(place))  # its last attempt may take a while yet
    with opened(folder, empty_mlflow) as place:
        assert place.writer().deliver() == pending + 1
        assert len(content(mlflow_client(place.home))) == 4


@pytest.mark.slow
def test_a_server_killed_again_under_load_loses_nothing_and_doubles_nothing(
    tmp_path: Path,
    server: Server,
    mlflow_client: Callable[[Home], Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.start()
    loaded, bursts, points = 4, 25, 20
    with opened(tmp_path / "home", mlflow_uri=server.uri) as place:
        store = place.store
        create(store, *(a_trial(number) for number in range(loaded + 1)))
        worker = Worker(store, loaded)
        capfd.readouterr()

        def load(number: int) -> None:
            for burst in range(bursts):
                begin = burst * points
                tell(place, f"{SWEEP}-{number}", range(begin, begin + points))

        threads = [threading.Thread(target=load, args=(number,)) for number in range(loaded)]
        with OutboxThread(
            place.writer(), first_after_secs=0.0, every_secs=0.05, max_backoff_secs=0.5
        ) as background:
            for thread in threads:
                thread.start()
            for step in (10, 20):
                server.kill()
                worker.report(step)
                wait_until(lambda: isinstance(background.last_error, TrackingError))
                server.start()
                wait_until(lambda: background.last_error is None)
            for thread in threads:
                thread.join()
            worker.report(40, end=TrialState.COMPLETED)
            for number in range(loaded):
                store.end_trial(f"{SWEEP}-{number}", TrialState.CANCELLED)
            picture = tmp_path / "report.png"
            picture.write_text("picture")
            assert store.end_sweep(SWEEP, SweepState.COMPLETED, [str(picture)])
        assert (background.remaining, background.last_error) == (0, None)
        held = content(mlflow_client(place.home))
    assert set(held) == {SWEEP, *(f"{SWEEP}-{number}" for number in range(loaded + 1))}
    for number in range(loaded):
        expected = [(step, step / 8) for step in range(bursts * points)]
        assert curve(held[f"{SWEEP}-{number}"], "epsilon") == expected
    ended = held[f"{SWEEP}-{loaded}"]
    assert curve(ended, "epsilon") == [(step, step / 16) for step in (10, 20, 40)]
    assert ended["status"] == held[SWEEP]["status"] == "FINISHED"
    assert held[SWEEP]["artifacts"] == ["report/report.png"]
    assert capfd.readouterr() == ("", "")
