"""A worker's trial: whatever happens to the process, nothing is lost and nothing paid twice."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

import trainer.loop
from sweeps import worker
from sweeps.database.attempts import Attempts
from sweeps.database.states import Wish
from sweeps.database.store import Store, open_store
from sweeps.database.tables import checkpoints, reading, writing
from sweeps.errors import DatabaseError
from sweeps.home import HOME_VARIABLE, Home
from sweeps.worker import TrialRun
from tests.sweeps.small_run import EVERY, STEPS, SWEEP, TRIAL, last_checkpoint, run_on, submit
from trainer.errors import CheckpointError, OutOfMemory
from trainer.weights import checkpoint_writer

ROOT = Path(__file__).parents[2]
PROCESS_SECS = 120

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


class Place:
    """A home with its store."""

    def __init__(self, path: Path) -> None:
        self.home = Home.from_environment({HOME_VARIABLE: str(path)})
        self.store = open_store(self.home)

    @property
    def trial(self) -> sa.Row[Any]:
        row = self.store.trial(TRIAL)
        assert row is not None
        return row

    def run_on(self) -> list[int]:
        """Takes the trial up; gives the steps that it reported."""
        return [report.step for report in run_on(self.store, self.home)]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with reading(self.store.ledger.engine) as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]

    def branches(self) -> list[tuple[Any, ...]]:
        return self.rows("SELECT branch_id, start_step, charged_step FROM branches")

    def ends(self) -> list[Any]:
        return [end for (end,) in self.rows('SELECT "end" FROM attempts ORDER BY number')]

    def checkpoint_steps(self) -> list[int]:
        return [step for (step,) in self.rows("SELECT step FROM checkpoints ORDER BY step")]

    def log(self) -> str:
        return self.home.trial_log(SWEEP, TRIAL).read_text()

    def everything(self) -> dict[str, list[str]]:
        """All rows of all tables."""
        metadata = sa.MetaData()
        with reading(self.store.ledger.engine) as connection:
            metadata.reflect(connection)
            return {
                table.name: sorted(map(repr, connection.execute(sa.select(table))))
                for table in metadata.sorted_tables
            }

    def undisturbed(self, path: Path) -> "Place":
        """A copy in which the trial runs on its branch from its beginning, in one go.

        The root of its noise is there, and no checkpoint: so it repeats every step to the bit.
        """
        shutil.copytree(self.home.path, path, symlinks=True)
        calm = Place(path)
        with writing(calm.store.ledger.engine) as connection:
            connection.execute(checkpoints.delete())
        shutil.rmtree(calm.home.sweep_dir(SWEEP))
        calm.store.reopen(SWEEP)
        assert calm.run_on()[-1] == STEPS
        assert len(calm.branches()) == 1
        return calm


@pytest.fixture
def place(tmp_path: Path, data_dir: Path) -> Place:
    place = Place(tmp_path / "home")
    place.home.data_dir.symlink_to(data_dir)
    submit(place.store)
    return place


def assert_ended_alike(ours: Place, theirs: Place) -> None:
    """Both have come to the end on one branch, paid each step once, and are equal to the bit."""
    for each in (ours, theirs):
        assert each.trial.state == "COMPLETED"
        assert each.trial.charged_iterations == STEPS
        assert each.store.ledger.reservation(TRIAL).charged == STEPS
        assert each.store.ledger.verify().ok
    assert ours.branches() == theirs.branches()
    assert len(ours.branches()) == 1
    assert last_checkpoint(ours.store) == last_checkpoint(theirs.store)
    shown = "SELECT step, epsilon, eval_accuracy, eval_loss FROM reports ORDER BY step"
    assert ours.rows(shown) == theirs.rows(shown)
    assert [row[0] for row in ours.rows(shown)] == list(range(EVERY, STEPS + 1, EVERY))


def writes_of(store: Store, run: Callable[[], object]) -> int:
    """How many transactions that write something takes."""
    engine, statements = store.ledger.engine, list[str]()

    def note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    run()
    event.remove(engine, "before_cursor_execute", note)
    return statements.count("BEGIN IMMEDIATE")


def test_a_trial_that_has_ended_is_put_down_with_its_last_report(place: Place) -> None:
    reports = STEPS // EVERY
    # It is begun; each step that is shown is charged and reported, each but the last recorded.
    assert writes_of(place.store, place.run_on) == 1 + 3 * reports - 1
    assert place.checkpoint_steps() == [STEPS]
    assert [path.name for path in places_of(place)] == [f"step-{STEPS:08d}-attempt-0001"]
    assert place.trial.state == "COMPLETED"


def places_of(place: Place) -> list[Path]:
    """The checkpoints of the trial on the disk."""
    return sorted(place.home.checkpoint_dir(SWEEP, TRIAL).glob("step-*"))


def test_a_last_checkpoint_whose_report_was_cut_off_is_none(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Attempts.report

    def dies(self: Attempts, *args: Any, **more: Any) -> Any:
        if more["end"] is not None:
            raise KeyboardInterrupt
        return report(self, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(Attempts, "report", dies)
        with pytest.raises(KeyboardInterrupt):
            place.run_on()
    assert (place.trial.state, place.checkpoint_steps()) == ("RUNNING", [4, 8])
    assert len(place.store.attempts.assignment(TRIAL).checkpoints) == 2
    assert place.run_on() == [STEPS]
    assert (place.trial.state, place.checkpoint_steps()) == ("COMPLETED", [STEPS])
    assert place.store.ledger.reservation(TRIAL).charged == place.trial.charged_iterations == STEPS
    assert len(place.branches()) == 1, "the root of its noise was there, and nothing is paid twice"
    assert not list(place.home.secrets_dir.iterdir()), "and now it is not"
    assert place.store.ledger.verify().ok


def test_an_answer_that_is_lost_loses_no_model(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, lost = Attempts.report, list[int]()

    def loses_the_answer(self: Attempts, *args: Any, **more: Any) -> Any:
        told = report(self, *args, **more)
        if more["end"] is not None:
            lost.append(1)
            raise DatabaseError("the connection is gone")
        return told

    monkeypatch.setattr(Attempts, "report", loses_the_answer)
    place.run_on()
    assert lost == [1], "asked again, it is told that the trial has ended"
    assert (place.trial.state, place.checkpoint_steps()) == ("COMPLETED", [STEPS])
    assert last_checkpoint(place.store)


def child(place: Place, how: str, step: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps.small_run", how, str(step)],
        cwd=ROOT,
        env={**os.environ, HOME_VARIABLE: str(place.home.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_trial_runs_to_its_end(place: Place) -> None:
    assert place.run_on() == [4, 8, 12]
    assert (place.trial.state, place.trial.charged_iterations) == ("COMPLETED", STEPS)
    assert place.ends() == ["ended"]
    assert [row.step for row in place.store.reports(SWEEP)] == [4, 8, 12]
    assert place.checkpoint_steps()[-1] == STEPS
    kinds = [message.kind for message in place.store.outbox.undelivered()]
    assert kinds == ["sweep_start", "trial_start", *["metrics"] * 3, "trial_end"]
    assert place.store.ledger.reservation(TRIAL).state == "closed"
    assert not list(place.home.secrets_dir.iterdir())
    assert "attempt 1" in place.log()


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_killed_worker_costs_nothing(place: Place, tmp_path: Path, step: int) -> None:
    process = child(place, "kill", step)
    _, err = process.communicate(timeout=PROCESS_SECS)
    assert process.returncode == -signal.SIGKILL, err
    assert (place.trial.state, place.trial.charged_iterations) == ("RUNNING", step)
    assert [row.step for row in place.store.reports(SWEEP)] == list(range(EVERY, step, EVERY))
    theirs = place.undisturbed(tmp_path / "calm")

    assert place.run_on() == list(range(step, STEPS + 1, EVERY))
    assert place.ends() == ["lost", "ended"]
    assert_ended_alike(place, theirs)


def test_a_frozen_worker_writes_nothing_once_it_is_woken(place: Place) -> None:
    process = child(place, "freeze", 8)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert place.run_on() == [8, 12]
        before = place.everything()
    finally:
        process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=PROCESS_SECS)
    assert (process.returncode, out) == (0, "[4]\n"), err
    assert place.everything() == before
    assert place.trial.state == "COMPLETED"
    assert len(place.branches()) == 1
    assert "attempt 1 may no longer write" in place.log()


def test_a_paused_trial_goes_on_as_if_it_never_had(place: Place, tmp_path: Path) -> None:
    with TrialRun(place.store, place.home, TRIAL) as run:
        assert run.next_report() is not None
        place.store.set_wish(SWEEP, Wish.PAUSE)
        assert run.next_report() is None
    assert (place.trial.state, place.ends()) == ("PAUSED", ["paused"])
    assert place.checkpoint_steps() == [4, 8]
    assert [row.step for row in place.store.reports(SWEEP)] == [4, 8]
    before = place.everything()
    assert place.run_on() == [], "the sweep is still to pause"
    assert place.everything() == before

    theirs = place.undisturbed(tmp_path / "calm")
    place.store.reopen(SWEEP)
    assert place.run_on() == [12]
    assert_ended_alike(place, theirs)


def test_a_trial_that_somebody_ends_is_left_soon(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_LOOK_EVERY_SECS", 0.0)
    with TrialRun(place.store, place.home, TRIAL) as run:
        assert run.next_report() is not None
        place.store.cancel_sweep(SWEEP)
        before = place.trial
        assert run.next_report() is None
    assert place.trial == before
    assert (place.trial.state, place.trial.charged_iterations) == ("CANCELLED", EVERY)
    assert place.checkpoint_steps() == [EVERY], "it may be gone on with"


def absent(store: Store, times: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has every method of a worker fail so many times in a row when it is called."""
    seen: list[str] = []
    for name in ("begin", "assignment", "charge", "report", "checkpoint"):
        method = getattr(Attempts, name)
        left = [times]

        def call(self: Attempts, *given: Any, method=method, left=left, name=name, **named: Any):
            if left[0]:
                left[0] -= 1
                seen.append(name)
                raise DatabaseError("the database is away")
            left[0] = times
            return method(self, *given, **named)

        monkeypatch.setattr(Attempts, name, call)
    return seen


def test_a_database_that_is_away_for_a_while_is_waited_for(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "_LONGEST_PAUSE_SECS", 0.0)
    seen = absent(place.store, 2, monkeypatch)
    assert place.run_on() == [4, 8, 12]
    assert {name: seen.count(name) for name in seen} == {
        "begin": 2, "assignment": 2, "charge": 6, "report": 6, "checkpoint": 4,
    }  # fmt: skip
    assert (place.trial.state, place.trial.charged_iterations) == ("COMPLETED", STEPS)
    assert place.ends() == ["ended"]


def test_a_database_that_stays_away_leaves_a_trial_where_it_is(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrialRun(place.store, place.home, TRIAL) as run:
        assert run.next_report() is not None
        with monkeypatch.context() as away:
            away.setattr(worker, "_DATABASE_PATIENCE_SECS", 0.0)
            absent(place.store, 1, away)
            assert run.next_report() is None
    assert (place.trial.state, place.trial.charged_iterations) == ("RUNNING", EVERY)
    assert place.run_on()[-1] == STEPS
    assert (place.trial.state, place.trial.charged_iterations) == ("COMPLETED", STEPS)


def test_a_trial_that_does_not_fit_goes_on_with_half(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial_reports = trainer.loop.trial_reports
    sizes: list[int | None] = []

    def too_large(config: Any, **named: Any):
        size = config.clipping.microbatch_size
        sizes.append(size)
        if size is None or size > 16:
            raise OutOfMemory("out of memory", microbatch_size=size or 64)
        yield from trial_reports(config, **named)

    monkeypatch.setattr(trainer.loop, "trial_reports", too_large)
    assert place.run_on() == [4, 8, 12]
    assert sizes == [None, 32, 16]
    assert place.ends() == ["out_of_memory", "out_of_memory", "ended"]
    assert (place.trial.state, place.trial.microbatch_size) == ("COMPLETED", 16)


def test_where_nothing_smaller_is_left_a_trial_fails(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_config: Any, **_: Any):
        raise OutOfMemory("out of memory with 1 at a time", microbatch_size=1)
        yield

    monkeypatch.setattr(trainer.loop, "trial_reports", too_large)
    assert place.run_on() == []
    assert place.trial.state == "FAILED"
    assert "OutOfMemory: out of memory with 1 at a time" in place.trial.reason


def test_a_bug_fails_the_trial_and_says_where(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(*_: object) -> None:
        raise ZeroDivisionError("a bug in the model")

    monkeypatch.setattr("trainer.loop.Trial.report", report)
    assert place.run_on() == []
    row = place.trial
    assert (row.state, row.charged_iterations) == ("FAILED", EVERY)
    assert row.reason == (
        f"ZeroDivisionError: a bug in the model (`dp-sweeps logs {TRIAL}` says more)"
    )
    assert "Traceback" in place.log()
    assert "a bug in the model" in place.log()
    assert place.store.reports(SWEEP) == []
    # Paid once, and gone on with when the bug is mended.
    monkeypatch.undo()
    place.store.readmit({TRIAL: None})
    assert place.run_on() == [4, 8, 12]
    assert (place.trial.charged_iterations, len(place.branches())) == (STEPS, 1)


def test_a_checkpoint_that_cannot_be_written_pauses_the_sweep(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint = checkpoint_writer.save_checkpoint

    def full(path: Path, *, step: int, **contents: Any) -> None:
        if step == 8:
            raise CheckpointError(f"checkpoint {str(path)!r}: No space left on device")
        save_checkpoint(path, step=step, **contents)

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint_writer, "save_checkpoint", full)
        assert place.run_on() == [4, 8]
    row = place.trial
    assert (row.state, place.ends()) == ("PAUSED", ["paused"])
    assert "No space left on device" in row.reason
    assert place.store.wish(SWEEP) is Wish.PAUSE
    assert place.checkpoint_steps() == [4]

    theirs = place.undisturbed(tmp_path / "calm")
    place.store.reopen(SWEEP)
    assert place.run_on() == [8, 12]
    assert_ended_alike(place, theirs)
