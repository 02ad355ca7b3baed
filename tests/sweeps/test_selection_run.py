"""A private selection in its worker: all of it is charged, drawn once, and kept to itself."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

import accounting
import trainer.loop
from sweeps.database.states import Wish
from sweeps.database.store import open_store
from sweeps.database.tables import checkpoints, reading, sweeps, writing
from sweeps.errors import StoreError
from sweeps.home import Home
from sweeps.selection_run import SelectionRun
from sweeps.verification import verify
from tests.sweeps.selections import paid_for, secret_with, spec_of
from tests.sweeps.small_selection import EVERY, STEPS, Selection, submitted
from tests.trainer.killed_trial import arrays
from trainer.alone.charges import FileCharges
from trainer.errors import CheckpointError, OutOfMemory
from trainer.weights import checkpoint_writer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROCESS_SECS = 120
DIVERGES = {"learning_rate": "1e38", "optimizer": "sgd", "l2_clip_norm": "1000"}
# Of the trials that this secret draws the last learns; those before it drown in noise.
LEARNS_LAST = {
    "optimizer": "sgd",
    "learning_rate": "{uniform: [0.5, 2]}",
    "expected_batch_size": "128",
    "noise_multiplier": "{loguniform: [1, 1000]}",
}


def of_three(draws):
    if draws.count != 3:
        return False
    noises = [draws.trial(number).config.noise_multiplier for number in range(3)]
    return min(noises[:2]) > 100 and noises[2] < 1.5


THREE = secret_with(spec_of(**LEARNS_LAST), of_three)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def three(tmp_path, data_dir):
    return submitted(tmp_path, data_dir, THREE, **LEARNS_LAST)


def everything(selection):
    """All rows of all tables."""
    metadata = sa.MetaData()
    with reading(selection.store.ledger.engine) as connection:
        metadata.reflect(connection)
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        }


def files_below(home):
    return [path for path in home.path.rglob("*") if path.is_file() and not path.is_symlink()]


def readable(home, *numbers):
    """Those of some numbers that stand anywhere below a home, as text or as SQLite keeps them."""
    found = []
    for number in numbers:
        as_text, as_real = repr(number)[:10].encode(), struct.pack(">d", number)
        for path in files_below(home):
            content = path.read_bytes()
            found += [(path.name, number, "text")] if as_text in content else []
            found += [(path.name, number, "real")] if as_real in content else []
    return found


@pytest.fixture
def seen(monkeypatch):
    """The reports of all trials, one list each, as nobody but a test may see them."""
    trials = [[]]
    goes_on = SelectionRun._goes_on

    def note(self, report):
        trials[-1].append(report)
        if report.outcome != "running":
            trials.append([])
        return goes_on(self, report)

    monkeypatch.setattr(SelectionRun, "_goes_on", note)
    return trials


def last_checkpoint(selection):
    query = sa.select(checkpoints.c.location)
    with reading(selection.store.ledger.engine) as connection:
        return Path(connection.scalars(query).one())


def assert_charged(selection, epsilon):
    """All of it, whatever came of it, and the ledger says so, too."""
    assert selection.row.charged_iterations == 1
    ledger = selection.store.ledger
    reservation = ledger.reservation(selection.trial_id)
    assert (reservation.state, reservation.charged, reservation.committed) == ("closed", 1, 1)
    level = ledger.status(selection.sweep_id).level
    assert level.epsilon_spent == pytest.approx(epsilon, rel=1e-9)
    assert level.reserved == 0


def price(selection):
    return accounting.selection_epsilon([paid_for(selection.spec)], delta=1e-5)


def assert_nothing_secret_is_left(selection):
    assert not list(selection.home.secrets_dir.rglob("*"))


def test_the_winner_alone_is_seen(three, seen):
    drawn = [three.draws.trial(number) for number in range(3)]
    told = three.end()
    *losers, winner = seen[:3]
    assert [len(trial) for trial in seen] == [3, 3, 3, 0]
    assert winner[-1].eval_accuracy > max(trial[-1].eval_accuracy for trial in losers)
    assert (told.step, told.eval_accuracy, told.epsilon) == (
        STEPS, winner[-1].eval_accuracy, price(three),
    )  # fmt: skip

    row = three.row
    assert (row.state, row.reason) == ("COMPLETED", "")
    assert row.config == drawn[2].shown
    curve = three.store.reports(three.sweep_id)
    assert [(r.step, r.eval_loss) for r in curve] == [(r.step, r.eval_loss) for r in winner]
    assert {r.epsilon for r in curve} == {price(three)}
    assert_charged(three, price(three))
    found = verify(three.store, three.home, three.sweep_id, with_mlflow=False)
    assert (found.ok, found.differences) == (True, ())

    # Nothing of the others is anywhere, once the database is closed.
    assert_nothing_secret_is_left(three)
    three.store.ledger.close()
    hidden = [trial.setting.learning_rate for trial in drawn[:2]]
    hidden += [report.eval_loss for trial in losers for report in trial]
    assert readable(three.home, *hidden) == []
    # As what is shown would be found.
    rate, loss = drawn[2].setting.learning_rate, winner[-1].eval_loss
    found = readable(three.home, rate, loss)
    assert {("ledger.db", rate, "text"), ("ledger.db", loss, "real")} <= set(found)
    names = {str(path.relative_to(three.home.path)) for path in files_below(three.home)}
    assert not [name for name in names if "cache" in name or "clipping" in name]
    log = three.home.trial_log(three.sweep_id, three.trial_id).read_text()
    assert len(log.splitlines()) == 1
    assert "attempt 1 on" in log


def test_nothing_changes_while_it_runs(three, monkeypatch, capfd):
    charge, rows, printed = FileCharges.charge, [], []

    def look(self, branch, step):
        os.write(1, b"to the terminal")
        sys.stderr.write("to a log")
        rows.append(everything(three))
        printed.append(capfd.readouterr())
        return charge(self, branch, step)

    monkeypatch.setattr(FileCharges, "charge", look)
    three.run_on()
    assert len(rows) == 9
    assert all(each == rows[0] for each in rows), "no row tells one step from another"
    assert all(each == ("", "") for each in printed)
    assert capfd.readouterr() == ("", "")
    assert three.row.state == "COMPLETED"


def test_rows_are_as_many_whatever_was_drawn(tmp_path, data_dir):
    counts = []
    for number in (1, 4):
        secret = secret_with(spec_of(), lambda draws, n=number: draws.count == n)
        selection = submitted(_folder(tmp_path / str(number)), data_dir, secret)
        selection.run_on()
        counts.append({name: len(rows) for name, rows in everything(selection).items()})
        assert_charged(selection, price(selection))
    assert counts[0] == counts[1]


def _folder(path):
    path.mkdir()
    return path


def test_the_winners_checkpoint_does_not_tell_when_it_was_trained(three, monkeypatch):
    times, winner = [], SelectionRun._winner

    def look(self, draws):  # all trials have ended
        times.append(time.time_ns())
        return winner(self, draws)

    monkeypatch.setattr(SelectionRun, "_winner", look)
    three.run_on()
    path = last_checkpoint(three)
    assert path.is_relative_to(three.home.checkpoint_dir(three.sweep_id, three.trial_id))
    told = [file.stat().st_mtime_ns for file in path.rglob("*")]
    for file in path.rglob("_CHECKPOINT_METADATA"):
        told += [value for name, value in json.loads(file.read_text()).items() if "nsecs" in name]
    assert len(told) > 10
    # A file system's clock may lag by a tick.
    assert min(told) > times[0] - 20_000_000


def killed(selection, number, step):
    process = subprocess.run(
        [sys.executable, "-m", "tests.sweeps.small_selection", str(number), str(step)],
        cwd=ROOT,
        env={**os.environ, "DP_SWEEPS_HOME": str(selection.home.path), "PYTHONPATH": str(ROOT)},
        timeout=PROCESS_SECS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert (process.stdout, process.stderr) == ("", "")


def copied(selection, path):
    """The same, elsewhere."""
    shutil.copytree(selection.home.path, path / "home", symlinks=True)
    home = Home.from_environment({"DP_SWEEPS_HOME": str(path / "home")})
    return Selection(home, open_store(home), selection.trial_id, selection.spec)


def test_a_killed_selection_goes_on_as_if_it_had_not_been(three, tmp_path):
    killed(three, 2, 8)
    assert three.progress.number == 2
    assert three.progress.secret == THREE
    wanted = three.draws.trial(2).shown
    assert_not_yet_shown(three)
    # Beside it, one that takes the steps of the trial under way from its first, with its keys.
    calm = copied(three, _folder(tmp_path / "calm"))
    shutil.rmtree(calm.folder.trial(2) / "checkpoints")
    for each in (three, calm):
        assert each.end().step == STEPS
        assert each.row.config == wanted
        assert_charged(each, price(each))
        assert_nothing_secret_is_left(each)
    ours, theirs = last_checkpoint(three), last_checkpoint(calm)
    assert arrays(ours) == arrays(theirs)
    assert _curve(three) == _curve(calm)
    assert len(_curve(three)) == STEPS // EVERY


def _curve(selection):
    rows = selection.store.reports(selection.sweep_id)
    return [(row.step, row.eval_accuracy, row.eval_loss) for row in rows]


def assert_not_yet_shown(selection):
    row = selection.row
    assert (row.state, row.charged_iterations) == ("RUNNING", 1)
    assert (row.trial_config, row.setting) == (None, {})
    assert "learning_rate" not in row.config
    assert selection.store.reports(selection.sweep_id) == []


def test_without_its_secret_a_selection_fails_and_stays_paid(three):
    interrupted(three)
    three.folder.remove()
    assert three.run_on() is None
    row = three.row
    assert row.state == "FAILED"
    assert "the secret of its private selection is gone" in row.reason
    assert_charged(three, price(three))
    assert_nothing_secret_is_left(three)


def interrupted(selection, after=4):
    """Runs a selection until so many reports were made, and leaves it as a crash would."""
    with pytest.MonkeyPatch.context() as patch:
        goes_on, count = SelectionRun._goes_on, iter(range(after))

        def stop(self, report):
            goes_on(self, report)
            if next(count, None) is None:
                raise KeyboardInterrupt
            return True

        patch.setattr(SelectionRun, "_goes_on", stop)
        with pytest.raises(KeyboardInterrupt):
            SelectionRun(selection.store, selection.home, selection.trial_id).next_report()


def test_one_that_is_cut_off_at_a_trials_last_report_goes_on_with_the_next(three):
    interrupted(three, after=STEPS // EVERY - 1)
    assert (three.progress.number, three.progress.curve) == (1, ())
    wanted = three.draws.trial(2).shown
    assert three.end().step == STEPS
    assert three.row.config == wanted
    assert_nothing_secret_is_left(three)


def test_a_damaged_secret_fails_it_too(three):
    interrupted(three)
    (three.home.secrets_dir / "selections" / three.trial_id / "progress.json").write_text("{")
    assert three.run_on() is None
    assert three.row.state == "FAILED"
    assert_charged(three, price(three))


def test_noise_that_cannot_be_repeated_is_drawn_anew_and_costs_nothing(three):
    interrupted(three)
    for path in three.home.secrets_dir.rglob("*.key"):
        path.unlink()
    assert three.run_on() is not None
    assert three.row.state == "COMPLETED"
    assert_charged(three, price(three))


def test_workers_that_die_without_getting_further_end_it(three):
    interrupted(three)
    for _ in range(4):
        three.store.attempts.begin(three.trial_id)
    interrupted(three, after=0)  # it gets further
    for _ in range(4):
        three.store.attempts.begin(three.trial_id)
    assert three.row.state == "RUNNING"
    three.store.attempts.begin(three.trial_id)
    three.store.attempts.begin(three.trial_id)
    assert three.run_on() is None
    assert three.row.state == "FAILED"
    assert "workers died over it without getting any further" in three.row.reason
    assert_nothing_secret_is_left(three)


def test_of_none_there_is_no_winner(tmp_path, data_dir):
    law = "{distribution: poisson, mean: 1}"
    secret = secret_with(spec_of(law), lambda draws: draws.count == 0)
    none = submitted(tmp_path, data_dir, secret, law)
    assert none.run_on() is None
    assert (none.row.state, none.row.trial_config) == ("COMPLETED", None)
    assert "there is no winner" in none.row.reason
    assert none.store.reports(none.sweep_id) == []
    assert_charged(none, price(none))
    assert_nothing_secret_is_left(none)
    assert verify(none.store, none.home, none.sweep_id, with_mlflow=False).ok


def test_a_trial_that_diverges_counts_and_loses(tmp_path, data_dir, seen):
    rates = {**DIVERGES, "learning_rate": "{choice: [1e38, 0.001]}"}

    def diverges_first(draws):
        drawn = [draws.trial(number).setting.learning_rate for number in range(3)]
        return draws.count == 3 and drawn == [1e38, 0.001, 1e38]

    secret = secret_with(spec_of(**rates), diverges_first)
    selection = submitted(tmp_path, data_dir, secret, **rates)
    selection.run_on()
    assert [trial[-1].outcome for trial in seen[:3]] == ["diverged", "completed", "diverged"]
    assert (selection.row.state, selection.row.config["learning_rate"]) == ("COMPLETED", 0.001)


def test_where_all_diverge_the_winner_has_too(tmp_path, data_dir):
    secret = secret_with(spec_of(**DIVERGES), lambda draws: draws.count == 2)
    selection = submitted(tmp_path, data_dir, secret, **DIVERGES)
    assert selection.end().outcome == "diverged"
    assert selection.row.state == "DIVERGED"
    assert "no longer finite" in selection.row.reason
    assert_nothing_secret_is_left(selection)


def test_a_pause_and_a_resume_change_nothing(three, monkeypatch):
    goes_on = SelectionRun._goes_on

    def pause_at_last(self, report):
        if self._progress.number == 1 and report.step == 8:
            three.store.set_wish(three.sweep_id, Wish.PAUSE)
        return goes_on(self, report)

    monkeypatch.setattr(SelectionRun, "_goes_on", pause_at_last)
    wanted = three.draws.trial(2).shown
    assert three.run_on() is None
    assert (three.row.state, three.row.reason) == ("PAUSED", "")
    assert three.progress.number == 1
    three.store.reopen(three.sweep_id)
    assert three.end().step == STEPS
    assert (three.row.state, three.row.config) == ("COMPLETED", wanted)
    assert_charged(three, price(three))


def test_a_cancelled_selection_stays_paid_and_leaves_nothing(three, monkeypatch):
    charge = FileCharges.charge

    def cancel(self, branch, step):
        if step == 8:
            three.store.cancel_sweep(three.sweep_id)
        return charge(self, branch, step)

    monkeypatch.setattr(FileCharges, "charge", cancel)
    monkeypatch.setattr("sweeps.worker._LOOK_EVERY_SECS", 0.0)
    assert three.run_on() is None
    assert three.row.state == "CANCELLED"
    assert_charged(three, price(three))
    assert_nothing_secret_is_left(three)
    with pytest.raises(StoreError, match="under private_selection nothing that has ended goes on"):
        three.store.readmit({three.trial_id: None})


def test_one_that_never_began_is_free_again(three):
    three.store.cancel_sweep(three.sweep_id)
    assert three.store.ledger.reservation(three.trial_id).state == "released"
    assert three.store.ledger.status(three.sweep_id).level.epsilon == 0
    assert three.run_on() is None


def test_a_frozen_budget_lets_nothing_begin(three):
    three.store.ledger.freeze(three.sweep_id)
    assert three.run_on() is None
    assert three.row.state == "FAILED"
    assert "the budget is frozen" in three.row.reason
    assert three.row.charged_iterations == 0


def test_data_that_has_changed_is_not_trained_on(three):
    with writing(three.store.ledger.engine) as connection:
        connection.execute(sweeps.update().values(dataset_fingerprint="another"))
    assert three.run_on() is None
    assert "its data set digits has changed" in three.row.reason
    assert three.row.charged_iterations == 0, "it had not begun"


def test_what_an_error_says_stays_secret(three, monkeypatch):
    def broken(config, **_):
        raise ZeroDivisionError(f"learning_rate {config.learning_rate} is bad")
        yield

    monkeypatch.setattr(trainer.loop, "trial_reports", broken)
    rate = three.draws.trial(0).setting.learning_rate
    assert three.run_on() is None
    assert three.row.state == "FAILED"
    assert three.row.reason.startswith("ZeroDivisionError in one of its trials; what it said is")
    assert_charged(three, price(three))
    assert readable(three.home, rate) == []


def test_a_trial_that_does_not_fit_goes_on_with_half(three, monkeypatch):
    trial_reports, sizes = trainer.loop.trial_reports, []

    def too_large(config, **named):
        sizes.append(config.clipping.microbatch_size)
        if sizes[-1] is None or sizes[-1] > 16:
            raise OutOfMemory("out of memory", microbatch_size=sizes[-1] or 64)
        yield from trial_reports(config, **named)

    monkeypatch.setattr(trainer.loop, "trial_reports", too_large)
    assert three.run_on() is not None
    assert sizes == [None, 32, 16, 16, 16]
    assert (three.row.state, three.row.microbatch_size) == ("COMPLETED", None)
    assert len(three.store.attempt_times(three.sweep_id)) == 1


def test_a_full_disk_pauses_the_sweep_and_tells_of_no_trial(three, monkeypatch):
    save, wanted = checkpoint_writer.save_checkpoint, three.draws.trial(2).shown

    def full(path, **contents):
        if "trial-1" in str(path):
            raise CheckpointError(f"checkpoint {str(path)!r}: No space left on device")
        save(path, **contents)

    with monkeypatch.context() as disk:
        disk.setattr(checkpoint_writer, "save_checkpoint", full)
        assert three.run_on() is None
    assert three.row.state == "PAUSED"
    assert "Is there room on the disk" in three.row.reason
    assert "trial-1" not in three.row.reason
    assert three.store.wish(three.sweep_id) is Wish.PAUSE
    three.store.reopen(three.sweep_id)
    assert three.run_on() is not None
    assert three.row.config == wanted


def test_a_checkpoint_that_cannot_be_gone_on_with_is_left(three, monkeypatch):
    interrupted(three, after=4)
    start = trainer.loop.Trial.start

    def refuses(self, resume_from, *given, **named):
        if resume_from is not None:
            raise CheckpointError("its noise is correlated with that of earlier steps")
        return start(self, resume_from, *given, **named)

    monkeypatch.setattr(trainer.loop.Trial, "start", refuses)
    assert three.progress.number == 1
    assert three.run_on() is not None
    assert three.row.state == "COMPLETED"
