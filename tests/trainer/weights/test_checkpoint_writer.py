"""Checkpoints that somebody is told of, and that neither a crash nor a full disk spoils."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.killed_trial import CONFIG, arrays, charges_of, train
from trainer.errors import CheckpointError
from trainer.weights import checkpoint_writer
from trainer.weights.checkpoint_writer import CheckpointWriter, checkpoint_path, checkpoints_in
from trainer.weights.checkpoints import first_readable, read_manifest, save_checkpoint

ROOT = Path(__file__).resolve().parents[3]


def contents(step):
    return {
        "params": {"layer": np.full(3, step, np.float32)},
        "opt_state": (),
        "step": step,
        "architecture": {},
        "dataset_fingerprint": "f",
        "config_digest": "c",
    }


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_is_told_of_once_it_is_whole_and_before_older_ones_go(tmp_path):
    told = []

    def on_checkpoint(step, path):
        assert threading.current_thread() is threading.main_thread()
        assert read_manifest(path).step == step
        told.append((step, names(tmp_path)))

    with CheckpointWriter(tmp_path, on_checkpoint=on_checkpoint) as writer:
        for step in (1, 2, 3, 4):
            writer.save(lambda step=step: contents(step))
            writer.finish()
            writer.finish()  # tells nothing twice
    assert [step for step, _ in told] == [1, 2, 3, 4]
    for step, there in told:
        wanted = {f"step-{number:08d}" for number in (step, step - 1, step - 2) if number > 0}
        assert wanted <= set(there)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_are_kept_and_newer_ones_are_left_alone(tmp_path, keep):
    save_checkpoint(checkpoint_path(tmp_path, 9), **contents(9))
    with CheckpointWriter(tmp_path, keep=keep) as writer:
        for step in range(1, 6):
            writer.save(lambda step=step: contents(step))
    kept = [f"step-{step:08d}" for step in range(6 - keep, 6)]
    assert names(tmp_path) == [*kept, "step-00000009"]


def test_whoever_is_told_may_stop_it_and_nothing_is_removed(tmp_path):
    def on_checkpoint(step, path):
        if step == 3:
            raise RuntimeError("fenced")

    writer = CheckpointWriter(tmp_path, on_checkpoint=on_checkpoint)
    with pytest.raises(RuntimeError, match="fenced"), writer:  # noqa: PT012
        for step in (1, 2, 3):
            writer.save(lambda step=step: contents(step))
            writer.finish()
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_why_it_ended_is_the_error_that_came_first(tmp_path, caplog):
    def on_checkpoint(step, path):
        raise RuntimeError("fenced")

    writer = CheckpointWriter(tmp_path, on_checkpoint=on_checkpoint)
    with pytest.raises(KeyError, match="first"), writer:  # noqa: PT012
        writer.save(lambda: contents(1))
        raise KeyError("first")
    assert "fenced" in caplog.text


def test_what_a_killed_one_left_is_cleared_away(tmp_path):
    for left in (".step-00000001.partial", ".step-00000002.removed"):
        (tmp_path / left / "params").mkdir(parents=True)
    with CheckpointWriter(tmp_path):
        pass
    assert names(tmp_path) == []


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, path = set(), tmp_path / "step"
    sync, rename = os.fsync, Path.rename

    def spy_sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def spy_rename(self, target):
        if target == path:
            within = {below.stat().st_ino for below in [self, *self.rglob("*")]}
            assert within <= synced
            assert len(within) > 4
            synced.clear()
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    save_checkpoint(path, **contents(1))
    assert synced == {tmp_path.stat().st_ino}  # and then its name


def test_one_that_is_replaced_is_there_until_the_other_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "step"
    save_checkpoint(path, **contents(1))

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError) as refused:
            save_checkpoint(path, **contents(2))
    assert str(refused.value) == (
        f"checkpoint {str(path)!r}: cannot be written: No space left on device; allowed is a "
        "directory with room for it, where the trial can then be gone on with from the checkpoint "
        "before"
    )
    assert names(tmp_path) == ["step"]
    assert read_manifest(path).step == 1


def test_the_first_readable_of_several(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(checkpoint_path(tmp_path, step), **contents(step))
    candidates = checkpoints_in(tmp_path)
    assert candidates == [checkpoint_path(tmp_path, step) for step in (3, 2, 1)]
    assert first_readable(candidates).path == candidates[0]
    (candidates[0] / "checkpoint.json").unlink()
    next((candidates[1] / "params").rglob("*")).rename(tmp_path / "elsewhere")
    found = first_readable([tmp_path / "absent", *candidates])
    assert found.path == candidates[2]
    assert found.manifest == read_manifest(candidates[2])
    reasons = ("no such directory", "holds no checkpoint.json", "damaged, its files differ")
    for message, path, reason in zip(
        found.passed_over, [tmp_path / "absent", *candidates], reasons, strict=False
    ):
        assert str(path) in message
        assert reason in message
    assert len(found.passed_over) == 3
    assert first_readable([]) == (None, None, [])


# --- In a trial ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_a_checkpoint_is_told_of_before_more_is_charged_or_reported(data_home, tmp_path):
    events = []
    train(
        tmp_path,
        data_home,
        on_charge=lambda step: events.append(f"charge {step}"),
        on_checkpoint=lambda step, path: events.append(f"checkpoint {step}"),
        on_report=lambda report: events.append(f"report {report.step}"),
    )
    order = {event: number for number, event in enumerate(events)}
    assert len(order) == len(events) == 9
    for step in (4, 8, 12):
        assert order[f"charge {step}"] < order[f"checkpoint {step}"]
        assert order[f"charge {step}"] < order[f"report {step}"]
    for step in (4, 8):
        assert order[f"checkpoint {step}"] < order[f"charge {step + 4}"]
    assert order["checkpoint 12"] < order["report 12"]


def test_a_checkpoint_that_is_fenced_off_ends_the_trial(data_home, tmp_path):
    charged, reported = [], []

    def on_checkpoint(step, path):
        if step == 8:
            raise RuntimeError("another attempt has taken over")

    with pytest.raises(RuntimeError, match="another attempt"):
        train(
            tmp_path,
            data_home,
            on_charge=charged.append,
            on_checkpoint=on_checkpoint,
            on_report=lambda report: reported.append(report.step),
        )
    assert charged == reported == [4, 8]
    assert names(tmp_path / "checkpoints") == ["step-00000004", "step-00000008"]


def test_a_trial_that_is_left_tells_of_its_last_checkpoint(data_home, tmp_path, monkeypatch):
    from trainer.loop import trial_reports

    gate, told = threading.Event(), []
    save = checkpoint_writer.save_checkpoint

    def slow(*arguments, **more):
        gate.wait(60)
        save(*arguments, **more)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    running = trial_reports(
        CONFIG,
        data_home=data_home,
        checkpoint_dir=tmp_path,
        on_checkpoint=lambda step, path: told.append(step),
    )
    next(running)
    assert told == []
    gate.set()
    running.close()
    assert told == [4]
    assert read_manifest(checkpoint_path(tmp_path, 4)).step == 4


@pytest.mark.slow
def test_a_full_disk_ends_the_trial_and_spoils_nothing(data_home, tmp_path):
    folder = tmp_path / "full"
    command = [sys.executable, "-m", "tests.trainer.weights.full_disk", folder, data_home]
    process = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    told = json.loads(process.stdout)
    assert told["left"] == ["step-00000004"]
    assert told["error"].startswith(
        f"checkpoint {told['refused']!r}: cannot be written: File too large; allowed is"
    )
    # With room again it goes on, and what it repeats is free.
    kept = arrays(checkpoint_path(folder / "checkpoints", 4))
    assert kept
    result = train(folder, data_home)
    assert result.report.outcome == "completed"
    charges = charges_of(folder)
    assert (len(charges.branches), charges.iterations) == (1, CONFIG.iterations)
