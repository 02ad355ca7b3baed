"""Whatever dies while MLflow is told, and however often it is told: it has everything once."""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeps.database.outbox_rows import OutboxRows
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store, open_store
from sweeps.database.tables import outbox, trials
from sweeps.home import Home
from sweeps.tracking.mlflow_client import Mlflow
from sweeps.tracking.mlflow_writer import MlflowWriter
from tests.sweeps.tracking.tracked_sweep import (
    CONFIG,
    DEADLINE_SECS,
    SWEEP,
    Place,
    Worker,
    a_trial,
    content,
    create,
    curve,
    opened,
    run_a_sweep,
)

# -- crashes ---------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: nothing of it runs any more, `finally` included."""


class Mortal:
    """Makes the calls by which a delivery changes anything die, from a chosen one on.

    Each of them can die before it does anything and after it has done it.
    """

    PLACES = (
        (Mlflow, "create_run"),
        (Mlflow, "log"),
        (Mlflow, "upload"),
        (Mlflow, "end_run"),
        (Mlflow, "reopen_run"),
        (OutboxRows, "set_mlflow_run_id"),
        (OutboxRows, "mark_delivered"),
    )

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.moments = 0
        self.dies_at: int | None = None
        for owner, name in self.PLACES:
            monkeypatch.setattr(owner, name, self._mortal(getattr(owner, name)))

    def _mortal(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._live()
            result = function(*args, **kwargs)
            self._live()
            return result

        return call

    def _live(self) -> None:
        self.moments += 1
        if self.dies_at is not None and self.moments >= self.dies_at:
            raise Crash


def pause_and_end(store: Store, folder: Path) -> None:
    """One trial ends, the sweep is set aside and goes on, and another is taken up again."""
    create(store, a_trial(0), a_trial(1))
    Worker(store, 0).report(20, end=TrialState.COMPLETED)
    Worker(store, 1).report(10)
    store.end_trial(f"{SWEEP}-1", TrialState.PRUNED, "behind")
    store.end_sweep(SWEEP, SweepState.PAUSED)
    go_on(store)
    (folder / "report.png").write_text("picture")
    store.end_sweep(SWEEP, SweepState.COMPLETED, [str(folder / "report.png")])


def go_on(store: Store) -> None:
    """A driver takes the sweep over, and a worker the trial that was pruned, to its end."""
    (decision,) = store.readmit({f"{SWEEP}-1": None})
    assert decision.admitted
    store.reopen(SWEEP)
    Worker(store, 1, start=10).report(40, end=TrialState.COMPLETED)


@pytest.mark.slow
@pytest.mark.parametrize("live", [run_a_sweep, pause_and_end])
def test_a_crash_at_any_moment_and_a_replay_give_the_same(
    tmp_path: Path,
    empty_mlflow: Path,
    mlflow_client: Callable[[Home], Any],
    monkeypatch: pytest.MonkeyPatch,
    live: Callable[[Store, Path], None],
) -> None:
    ledger = tmp_path / "ledger"
    with opened(ledger) as place:
        live(place.store, tmp_path)
        expected = {SWEEP, *(row.trial_id for row in place.store.trials(SWEEP))}
        expected -= {f"{SWEEP}-3"}  # rejected
    mortal = Mortal(monkeypatch)

    def deliver_with_crash(number: int, dies_at: int | None) -> dict[str, Any]:
        folder = tmp_path / str(number)
        shutil.copytree(ledger, folder)
        with opened(folder, empty_mlflow) as place:
            mortal.moments, mortal.dies_at = 0, dies_at
            if dies_at is not None:
                with pytest.raises(Crash):
                    place.writer().deliver()
                mortal.dies_at = None
            place.writer().deliver()
            assert place.store.outbox.count_undelivered() == 0
            held = content(mlflow_client(place.home))
        shutil.rmtree(folder)
        return held

    whole = deliver_with_crash(0, None)
    moments = mortal.moments
    assert set(whole) == expected
    assert moments > 20
    for moment in range(1, moments + 1):
        assert deliver_with_crash(moment, moment) == whole


@pytest.mark.parametrize("told_between", [False, True])
def test_what_goes_on_does_so_in_its_run(
    place: Place, mlflow_client: Callable[[Home], Any], told_between: bool
) -> None:
    store, writer, client = place.store, place.writer(), mlflow_client(place.home)

    def status_of_all() -> dict[str, str]:
        writer.deliver()
        return {name: run["status"] for name, run in content(client).items()}

    create(store, a_trial(0))
    Worker(store, 0).report(10)
    store.end_trial(f"{SWEEP}-0", TrialState.PRUNED, "behind")
    store.end_sweep(SWEEP, SweepState.PAUSED)
    if told_between:
        assert status_of_all() == {SWEEP: "SCHEDULED", f"{SWEEP}-0": "KILLED"}
    store.readmit({f"{SWEEP}-0": None})
    store.reopen(SWEEP)
    worker = Worker(store, 0, start=10)
    worker.report(20)
    if told_between:
        assert status_of_all() == {SWEEP: "RUNNING", f"{SWEEP}-0": "RUNNING"}
        tags = content(client)[f"{SWEEP}-0"]["tags"]
        assert (tags["dp_sweeps.state"], tags["dp_sweeps.reason"]) == ("RUNNING", "")
    worker.report(40, end=TrialState.COMPLETED)
    store.end_sweep(SWEEP, SweepState.COMPLETED)
    assert status_of_all() == {SWEEP: "FINISHED", f"{SWEEP}-0": "FINISHED"}
    run = content(client)[f"{SWEEP}-0"]
    assert curve(run, "epsilon") == [(10, 10 / 16), (20, 20 / 16), (40, 40 / 16)]
    assert run["tags"]["dp_sweeps.state"] == "COMPLETED"


def test_a_sweep_that_goes_on_in_the_batch_in_which_it_paused_is_running(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0))
    writer = place.writer()
    writer.deliver()
    place.store.end_sweep(SWEEP, SweepState.PAUSED)
    place.store.reopen(SWEEP)
    writer.deliver()
    run = content(mlflow_client(place.home))[SWEEP]
    assert (run["status"], run["tags"]["dp_sweeps.state"]) == ("RUNNING", "RUNNING")


def test_parameters_told_again_after_a_trial_got_more_iterations_hold_up_nobody(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0))
    writer = place.writer()
    writer.deliver()
    with place.engine.begin() as connection:  # as if the process had died before it marked them
        connection.execute(outbox.update().values(delivered_at=None))
        changed = trials.update().values(config={**CONFIG, "iterations": 80})
        connection.execute(changed.where(trials.c.trial_id == f"{SWEEP}-0"))
    assert writer.deliver() == 2
    assert content(mlflow_client(place.home))[f"{SWEEP}-0"]["params"]["iterations"] == "40"


def test_delivering_everything_twice_changes_nothing(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    run_a_sweep(place.store, place.home.path)
    place.writer().deliver()
    once = content(mlflow_client(place.home))
    with place.engine.begin() as connection:
        connection.execute(outbox.update().values(delivered_at=None))
    assert place.writer().deliver() > 0
    assert content(mlflow_client(place.home)) == once


def test_two_that_deliver_at_once_make_one_run_each(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, *(a_trial(number) for number in range(12)))
    deadline = time.monotonic() + DEADLINE_SECS
    errors: list[BaseException] = []

    def deliver_all() -> None:
        store = open_store(place.home)
        try:
            writer = MlflowWriter(store, place.home)
            while writer.count_undelivered() and time.monotonic() < deadline:
                writer.deliver()
        except BaseException as error:
            errors.append(error)
        finally:
            store.ledger.close()

    threads = [threading.Thread(target=deliver_all) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(content(mlflow_client(place.home))) == 13  # asserts that no name comes twice
