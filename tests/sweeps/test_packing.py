"""Several trials in one worker: handed out by shape, one program, each a trial of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from sweeps.database.attempts import Attempts
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.errors import DatabaseError
from sweeps.home import HOME_VARIABLE
from sweeps.schedule import Schedule
from sweeps.spec.reading import parse_spec
from sweeps.trial_queue import TrialQueue
from tests.sweeps.packed_sweep import SPEC, pack_of, recorded, run_on
from tests.sweeps.whole_sweep import (
    DEADLINE_SECS,
    attempts_at,
    branch_rows,
    rows_of,
    running,
    store_of,
)
from trainer import pack
from trainer.errors import PackTooLarge
from trainer.mechanism.keys import BranchKeys
from trainer.training import devices

TWO_SHAPES = {**SPEC["search_space"], "expected_batch_size": {"grid_search": [64, 128]}}
ASHA = {"name": "async_hyperband", "grace_period": 4, "reduction_factor": 2}


@pytest.fixture
def known_roots(monkeypatch):
    """Trials get the same keys again, in the order in which they begin."""

    def begin_again():
        roots = iter(bytes([number]) * 32 for number in range(20))
        monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(next(roots)))

    begin_again()
    return begin_again


def reports_of(store, sweep_id):
    """What each trial reported."""
    return sorted(
        (row.trial_id[-4:], row.step, row.charged_iterations, row.eval_accuracy)
        for row in store.reports(sweep_id)
    )


# --- Handing out -------------------------------------------------------------------------------


def queue_of(home, store, sweep_id, **changes):
    spec = parse_spec(json.dumps({**SPEC, **changes}))
    return TrialQueue(
        spec,
        sweep_id,
        store,
        waiting=store.runnable(sweep_id),
        schedule=Schedule(spec, store, home),
        proposals=None,
        limit=100,
    )


def test_a_pack_is_of_one_shape_and_leaves_work_for_other_workers(tmp_path):
    home, store, sweep_id = recorded(tmp_path, search_space=TWO_SHAPES)
    batches = {row.trial_id: row.config["expected_batch_size"] for row in store.trials(sweep_id)}

    def packs(size, workers):
        queue, found = queue_of(home, store, sweep_id, search_space=TWO_SHAPES), []
        while not queue.is_over():
            found.append([batches[each] for each in queue.take_pack(size, workers)])
        assert queue.take_pack(size, workers) == []
        return found

    assert packs(8, 1) == [[64] * 4, [128] * 4]
    assert packs(3, 1) == [[64] * 3, [64], [128] * 3, [128]]
    assert packs(8, 4) == [[64] * 2, [64] * 2, [128], [128], [128], [128]]
    assert packs(1, 1) == [[batch] for batch in (64, 64, 64, 64, 128, 128, 128, 128)]


def test_what_was_taken_runs_though_the_next_cannot_be_taken(tmp_path, monkeypatch):
    home, store, sweep_id = recorded(tmp_path)
    queue = queue_of(home, store, sweep_id)
    take, left = queue.take, [True, True, False]

    def at_times():
        if left and not left.pop(0):
            raise DatabaseError("away")
        return take()

    monkeypatch.setattr(queue, "take", at_times)
    first = queue.take_pack(4, 1)
    second = queue.take_pack(4, 1)
    assert [len(first), len(second)] == [2, 2]
    assert {*first, *second} == {row.trial_id for row in store.trials(sweep_id)}
    left[:] = [False]
    with pytest.raises(DatabaseError):
        queue.take_pack(4, 1)


# --- One worker --------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_ends_and_is_charged_as_it_would_be_alone(tmp_path, known_roots):
    home, store, sweep_id = recorded(tmp_path / "packed")
    run_on(store, home, sweep_id)
    known_roots()
    other, alone, alone_id = recorded(tmp_path / "alone")
    run_on(alone, other, alone_id, width=1)
    assert reports_of(store, sweep_id) == reports_of(alone, alone_id)
    for row in store.trials(sweep_id):
        assert row.state == TrialState.COMPLETED
        assert row.charged_iterations == store.ledger.reservation(row.trial_id).charged == 12
        assert [each.end for each in attempts_at(store, row.trial_id)] == ["ended"]
        log = home.trial_log(sweep_id, row.trial_id).read_text()
        assert [each.trial_id for each in store.trials(sweep_id) if each.trial_id in log] == [
            row.trial_id  # of the others nothing
        ]


@pytest.mark.slow
def test_the_others_go_on_when_some_are_pruned_taken_away_or_fail(
    tmp_path, known_roots, monkeypatch
):
    home, store, sweep_id = recorded(tmp_path / "calm")
    run_on(store, home, sweep_id)
    want = [each for each in reports_of(store, sweep_id) if each[0] == "0000"]
    known_roots()
    home, store, sweep_id = recorded(tmp_path / "packed")
    run = pack_of(store, home, sweep_id)
    assert [report.step for report in run.next_reports().values()] == [4] * 4
    first, pruned, taken, failing = (row.trial_id for row in store.trials(sweep_id))
    store.end_trial(pruned, TrialState.PRUNED, "made up")
    store.attempts.begin(taken, worker="another")
    charge = Attempts.charge

    def refuse(self, attempt, branch, step):
        if attempt.trial_id == failing:
            raise ValueError("made up")
        return charge(self, attempt, branch, step)

    monkeypatch.setattr(Attempts, "charge", refuse)
    while not run.is_over:
        run.next_reports()
    rows = {row.trial_id: row for row in store.trials(sweep_id)}
    assert [rows[each].state for each in (first, pruned, taken, failing)] == [
        TrialState.COMPLETED,
        TrialState.PRUNED,
        TrialState.RUNNING,
        TrialState.FAILED,
    ]
    assert [rows[each].charged_iterations for each in rows] == [12, 4, 4, 4]
    assert [each for each in reports_of(store, sweep_id) if each[0] == "0000"] == want


@pytest.mark.slow
def test_a_paused_pack_goes_on_with_no_step_paid_twice(tmp_path):
    home, store, sweep_id = recorded(tmp_path)
    run = pack_of(store, home, sweep_id)
    run.next_reports()
    store.set_wish(sweep_id, Wish.PAUSE)
    while not run.is_over:
        run.next_reports()
    assert {row.state for row in store.trials(sweep_id)} == {TrialState.PAUSED}
    store.end_sweep(sweep_id, SweepState.PAUSED, [])
    store.reopen(sweep_id)
    run_on(store, home, sweep_id)
    for row in store.trials(sweep_id):
        assert (row.state, row.charged_iterations) == (TrialState.COMPLETED, 12)
        assert [each.trial_id for each in branch_rows(store)].count(row.trial_id) == 1


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_pays_nothing_twice(tmp_path):
    home, store, sweep_id = recorded(tmp_path)
    command = [sys.executable, "-m", "tests.sweeps.packed_sweep", sweep_id, "8"]
    done = subprocess.run(command, env={**os.environ, HOME_VARIABLE: str(tmp_path)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(row.charged_iterations for row in store.trials(sweep_id)) == [4, 4, 8, 8]
    run_on(store, home, sweep_id)
    for row in store.trials(sweep_id):
        assert (row.state, row.charged_iterations) == (TrialState.COMPLETED, 12)
        assert [each.trial_id for each in branch_rows(store)].count(row.trial_id) == 1
        assert [each.end for each in attempts_at(store, row.trial_id)] == ["lost", "ended"]
    assert store.ledger.verify().ok


@pytest.mark.slow
def test_a_pack_that_does_not_fit_runs_one_by_one(tmp_path, monkeypatch):
    home, store, sweep_id = recorded(tmp_path)

    def too_large(group):
        raise PackTooLarge(f"made up, for {len(group)}")

    monkeypatch.setattr(pack, "_take", too_large)
    run_on(store, home, sweep_id)
    for row in store.trials(sweep_id):
        assert (row.state, row.charged_iterations) == (TrialState.COMPLETED, 12)
        assert [each.end for each in attempts_at(store, row.trial_id)] == [
            "out_of_memory",
            "ended",
        ]


# --- On Ray ------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_a_packed_sweep_decides_and_ends_as_one_that_is_not(tmp_path):
    # So little noise on all the examples that keys do not matter.
    quiet = {
        **SPEC["search_space"],
        "learning_rate": {"grid_search": [8.0, 1e-6, 2e-6, 4e-6]},
        "expected_batch_size": "full",
        "noise_multiplier": 0.01,
    }
    spec = {
        **SPEC,
        "privacy": {**SPEC["privacy"], "target_epsilon": 1e9},
        "search_space": quiet,
        "scheduler": ASHA,
    }
    with running(tmp_path, spec) as process:
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 0, err
    assert json.loads(out)["state"] == "COMPLETED"
    store, _ = store_of(tmp_path)
    packed = rows_of(store)
    assert [row.state for row in packed] == [TrialState.COMPLETED] + [TrialState.PRUNED] * 3
    begun = [attempts_at(store, row.trial_id)[0] for row in packed]
    assert len({each.worker for each in begun}) == 1
    assert max(each.started_at for each in begun) < min(each.ended_at for each in begun)
    home, alone, sweep_id = recorded(tmp_path / "alone", **spec)
    run_on(alone, home, sweep_id, width=1)
    accuracies = {
        (row.trial_id[-4:], row.step): row.eval_accuracy for row in alone.reports(sweep_id)
    }
    for row in store.reports(packed[0].sweep_id):
        want = accuracies[row.trial_id[-4:], row.step]
        assert row.eval_accuracy == pytest.approx(want, abs=2 / 360)
    last = store.last_reports(packed[0].sweep_id)
    for row in packed:
        assert row.charged_iterations == last[row.trial_id].step
