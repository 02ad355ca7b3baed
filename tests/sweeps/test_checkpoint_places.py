"""Checkpoints in an object store: whole or not there, and gone on with by any machine."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

import accounting
from sweeps.checkpoint_places import CheckpointPlaces
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.errors import HomeError, PlaceError
from sweeps.home import CHECKPOINTS_VARIABLE, HOME_VARIABLE, Home
from sweeps.service import cluster_for
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.worker import TrialRun
from tests.sweeps.fork_parents import SPEC, home_at, paid_for, row_of, submitted
from trainer.errors import CheckpointError
from trainer.weights.checkpoints import read_manifest, save_checkpoint

SWEEP, TRIAL = "digits-1", "digits-1-0000"
NAME = "step-00000005-attempt-0001"


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    """A place that nobody has used yet, of each kind in turn."""
    if request.param == "file":
        return f"file://{tmp_path}/bucket"
    MemoryFileSystem.store.clear()
    return f"memory://{tmp_path.name}/bucket"


@pytest.fixture
def home(tmp_path, url):
    return home_at(tmp_path / "home", url)


@pytest.fixture
def elsewhere(tmp_path, url):
    """Another machine, with the same object store."""
    return home_at(tmp_path / "elsewhere", url)


def written(home, step=5):
    """A whole checkpoint where the trainer writes it."""
    path = home.checkpoint_dir(SWEEP, TRIAL) / "attempt-0001" / f"step-{step:08d}"
    save_checkpoint(
        path,
        params={"w": np.arange(4.0, dtype=np.float32)},
        opt_state=(),
        step=step,
        architecture={},
        dataset_fingerprint="print",
        config_digest="digest",
    )
    return path


def put(home, step=5):
    return CheckpointPlaces(home).put(written(home, step), SWEEP, TRIAL, 1)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def file_system(location):
    fs = LocalFileSystem() if location.startswith("file:") else MemoryFileSystem()
    return fs, fs._strip_protocol(location)


def below(location):
    fs, path = file_system(location)
    return [name.removeprefix(path).lstrip("/") for name in fs.find(path)]


# --- The setting ---------------------------------------------------------------------------


def test_a_home_reads_where_checkpoints_are_kept(tmp_path):
    def read(url):
        variables = {HOME_VARIABLE: str(tmp_path), CHECKPOINTS_VARIABLE: url}
        return Home.from_environment(variables).checkpoints_url

    assert read("") == ""
    assert read("s3://bucket/team/") == "s3://bucket/team"
    for bad in ("bucket", "s3:/bucket", "s3://b?x=1", "s3://a b", "filecache::s3://bucket"):
        with pytest.raises(HomeError, match=r"cannot be read as a URL; allowed are .*s3://BUCKET"):
            read(bad)
    with pytest.raises(HomeError, match="holds a password") as refusal:
        read("sftp://me:secret@host/x")
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("url", ["nowhere://bucket", "s3://bucket"])
def test_a_place_that_cannot_be_spoken_to_is_refused_before_anything_starts(tmp_path, url):
    spec = SweepSpec.model_validate(SPEC)
    home = home_at(tmp_path, url)
    with pytest.raises(PlaceError, match=f"{url}.*(not known|Install s3fs)"):
        cluster_for(spec, home, "local").__enter__()


# --- One checkpoint ------------------------------------------------------------------------


def test_without_an_object_store_a_checkpoint_is_taken_over_on_the_disk(tmp_path):
    home = home_at(tmp_path / "home")
    path = written(home)
    before = contents(path)
    places = CheckpointPlaces(home)
    location = places.put(path, SWEEP, TRIAL, 1)
    assert location == str(home.checkpoint_dir(SWEEP, TRIAL) / NAME)
    assert not path.exists()
    assert contents(places.get(location)) == before
    places.remove(location)
    assert not Path(location).exists()


def test_a_checkpoint_is_uploaded_with_its_manifest_last(home, monkeypatch):
    order = []
    for kind in (LocalFileSystem, MemoryFileSystem):
        put_file = kind.put_file

        def noted(self, local, remote, *args, put_file=put_file, **more):
            order.append(Path(remote).name)
            return put_file(self, local, remote, *args, **more)

        monkeypatch.setattr(kind, "put_file", noted)
    location = put(home)
    assert location == f"{home.checkpoints_url}/{SWEEP}/{TRIAL}/{NAME}"
    local = CheckpointPlaces(home).get(location)
    assert local == home.checkpoint_dir(SWEEP, TRIAL) / NAME
    assert set(below(location)) == set(contents(local))
    assert order[-1] == "checkpoint.json"
    assert order.count("checkpoint.json") == 1


def test_what_is_at_hand_is_not_fetched(home):
    location = put(home)
    fs, path = file_system(location)
    fs.rm(path, recursive=True)
    assert read_manifest(CheckpointPlaces(home).get(location)).step == 5


def test_another_machine_fetches_it_once(home, elsewhere):
    location = put(home)
    local = CheckpointPlaces(elsewhere).get(location)
    assert local.is_relative_to(elsewhere.path)
    assert contents(local) == contents(CheckpointPlaces(home).get(location))
    fs, path = file_system(location)
    fs.rm(path, recursive=True)
    assert CheckpointPlaces(elsewhere).get(location) == local
    assert [path.name for path in local.parent.iterdir()] == [NAME]


def test_a_damaged_copy_is_fetched_again(home):
    location = put(home)
    local = CheckpointPlaces(home).get(location)
    before = contents(local)
    (local / sorted(before)[-1]).write_bytes(b"damaged")
    assert contents(CheckpointPlaces(home).get(location)) == before


@pytest.mark.parametrize("what", ["no manifest", "half a manifest", "no file", "half a file"])
def test_what_is_not_whole_is_no_checkpoint(home, elsewhere, what):
    location = put(home)
    fs, path = file_system(location)
    (file,) = (name for name in below(location) if name.startswith("params/_METADATA"))
    target = f"{path}/{'checkpoint.json' if 'manifest' in what else file}"
    whole = fs.cat_file(target)
    fs.rm_file(target)
    if what.startswith("half"):
        fs.pipe_file(target, whole[: len(whole) // 2])
    local = CheckpointPlaces(elsewhere).get(location)
    with pytest.raises(CheckpointError, match="no such directory"):
        read_manifest(local)
    assert contents(local.parent) == {}


@pytest.mark.parametrize("name", ["../../stolen", "/stolen", ""])
def test_a_manifest_that_names_files_elsewhere_is_none(home, elsewhere, tmp_path, name):
    location = put(home)
    fs, path = file_system(location)
    manifest = json.loads(fs.cat_file(f"{path}/checkpoint.json"))
    manifest["files"][name] = "0" * 64
    fs.pipe_file(f"{path}/checkpoint.json", json.dumps(manifest).encode())
    local = CheckpointPlaces(elsewhere).get(location)
    assert not local.exists()
    assert not list(tmp_path.rglob("stolen"))


@pytest.mark.parametrize("tail", ["../x/y", "a/../b", "a/b/..", "a/b/c d", "x"])
def test_a_location_never_leads_out_of_the_home(home, tail):
    kept = home.path / "sweeps" / "kept"
    kept.mkdir(parents=True)
    places = CheckpointPlaces(home)
    location = f"memory://{tail}"
    with pytest.raises(PlaceError, match="allowed"):
        places.get(location)
    places.remove(location)
    assert kept.exists()


@pytest.mark.parametrize("place", ["outside", "sweeps/../../outside"])
def test_nothing_outside_of_the_home_is_removed(home, tmp_path, place):
    outside = tmp_path / "outside"
    outside.mkdir()
    CheckpointPlaces(home).remove(str((tmp_path if place == "outside" else home.path) / place))
    assert outside.exists()


def test_removing_removes_the_copy_and_the_upload(home):
    location, other = put(home, 5), put(home, 10)
    places = CheckpointPlaces(home)
    places.remove(location)
    assert below(location) == []
    assert not places.get(location).exists()
    assert read_manifest(places.get(other)).step == 10
    places.remove(location)  # again changes nothing


def full(*_args, **_more):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_upload_that_fails_leaves_nothing(home, monkeypatch):
    path = written(home)
    uploads = []
    for kind in (LocalFileSystem, MemoryFileSystem):
        put_file = kind.put_file

        def second_fails(self, local, remote, *args, put_file=put_file, **more):
            uploads.append(remote)
            if len(uploads) > 1:
                full()
            return put_file(self, local, remote, *args, **more)

        monkeypatch.setattr(kind, "put_file", second_fails)
    with pytest.raises(PlaceError, match="No space left on device; allowed in DP_SWEEPS_CHECK"):
        CheckpointPlaces(home).put(path, SWEEP, TRIAL, 1)
    assert below(f"{home.checkpoints_url}/{SWEEP}") == []
    assert contents(home.path) == {}


def test_a_store_that_is_away_is_no_missing_checkpoint(home, elsewhere, monkeypatch):
    location = put(home)

    def away(*_args, **_more):
        raise ConnectionError("nobody answers")

    for kind in (LocalFileSystem, MemoryFileSystem):
        monkeypatch.setattr(kind, "get_file", away)
    with pytest.raises(PlaceError, match="nobody answers"):
        CheckpointPlaces(elsewhere).get(location)
    assert contents(elsewhere.path) == {}


# --- A worker ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_on_another_machine_goes_on_from_the_object_store(home, elsewhere):
    store, (trial, _) = submitted(home, privacy={"target_epsilon": 9.0})
    with TrialRun(store, home, trial) as run:
        steps = [report.step for report in (run.next_report(), run.next_report()) if report]
    assert steps == [5, 10]
    newest, before = store.attempts.assignment(trial).checkpoints
    assert newest.startswith(home.checkpoints_url)
    # As if this machine had died over the newest upload: the one before is gone on with.
    fs, path = file_system(newest)
    fs.rm_file(f"{path}/checkpoint.json")
    with TrialRun(store, elsewhere, trial) as run:
        report = run.next_report()
        assert report is not None
        # Its noise cannot be repeated here, so the steps from 5 to 10 are paid for again.
        assert (report.step, row_of(store, trial).charged_iterations) == (10, 15)
        while report.outcome == "running":
            report = run.next_report()
            assert report is not None
    row = row_of(store, trial)
    assert (row.state, row.charged_iterations) == (TrialState.COMPLETED, 25)
    paid = paid_for(store, trial)
    assert paid.charged == 25
    expected = accounting.epsilon(paid.mechanism.after(25), delta=1e-5, accountant="rdp")
    assert report.epsilon == expected
    (kept,) = store.attempts.assignment(trial).checkpoints
    assert kept.endswith("step-00000020-attempt-0002")
    assert below(before) == below(newest) == []
    assert not list((elsewhere.path / "secrets").glob("*"))


@pytest.mark.slow
def test_a_worker_whose_uploads_fail_sets_its_trial_aside_and_goes_on_later(tmp_path, monkeypatch):
    home = home_at(tmp_path / "home", f"file://{tmp_path}/bucket")
    store, (trial, other) = submitted(home)
    with TrialRun(store, home, trial) as run:
        assert run.next_report() is not None
        with monkeypatch.context() as patch:
            patch.setattr(LocalFileSystem, "put_file", full)
            reports = [run.next_report() for _ in range(2)]
    assert reports[-1] is None
    row = row_of(store, trial)
    assert row.state == TrialState.PAUSED
    assert "No space left on device" in row.reason
    sweep = store.sweep(row.sweep_id)
    assert (sweep.state, sweep.wish) == (SweepState.RUNNING, Wish.PAUSE)
    store.reopen(row.sweep_id)
    for each in (trial, other):
        with TrialRun(store, home, each) as run:
            while report := run.next_report():
                if report.outcome != "running":
                    break
    # On the branch that it was on: nothing is paid for twice.
    row = row_of(store, trial)
    assert (row.state, row.charged_iterations) == (TrialState.COMPLETED, 20)


@pytest.mark.slow
def test_a_worker_that_cannot_fetch_waits_and_does_not_begin_anew(tmp_path, monkeypatch):
    home = home_at(tmp_path / "home", f"file://{tmp_path}/bucket")
    store, (trial, _) = submitted(home)
    with TrialRun(store, home, trial) as run:
        assert run.next_report() is not None
    shutil.rmtree(home.path / "sweeps")

    def away(*_args, **_more):
        raise PermissionError("the store says no")

    with monkeypatch.context() as patch, TrialRun(store, home, trial) as run:
        patch.setattr(LocalFileSystem, "get_file", away)
        assert run.next_report() is None
    row = row_of(store, trial)
    assert (row.state, row.charged_iterations) == (TrialState.PAUSED, 5)
    assert "the store says no" in row.reason
    store.reopen(row.sweep_id)
    with TrialRun(store, home, trial) as run:
        report = run.next_report()
    assert report is not None
    assert (report.step, row_of(store, trial).charged_iterations) == (10, 10)


def test_where_checkpoints_are_kept_is_told_to_every_worker(tmp_path, monkeypatch):
    home = home_at(tmp_path, f"file://{tmp_path}/bucket")
    told = {}

    class Stop(Exception):
        pass

    def connect(_address, *, env_vars):
        told.update(env_vars)
        raise Stop

    monkeypatch.setattr("sweeps.service.connect", connect)
    with pytest.raises(Stop):
        cluster_for(SweepSpec.model_validate(SPEC), home, "local").__enter__()
    assert told[CHECKPOINTS_VARIABLE] == home.checkpoints_url
