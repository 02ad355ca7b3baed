"""Whole sweeps: the installed command in a process of its own, a real Ray, a real MLflow store."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import sqlalchemy as sa

import accounting
from sweeps import driver
from sweeps.database.states import Wish
from sweeps.database.tables import attempts, checkpoints, open_database, trials, writing
from tests.sweeps.whole_cluster import cluster
from tests.sweeps.whole_sweep import (
    DEADLINE_SECS,
    attempts_at,
    branch_rows,
    charges,
    command,
    freeze,
    rows_of,
    running,
    store_of,
    store_of_when_there,
    wait_for,
    worker_of,
)
from tests.trainer.killed_trial import arrays

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPEC = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {"policy": "per_trial", "target_epsilon": 3.0, "target_delta": 1e-5},
    "search_space": {
        "optimizer": {"grid_search": ["sgd", "adam"]},
        "learning_rate": {"grid_search": [8.0, 1e-6]},
        "expected_batch_size": {"grid_search": [128, 512]},
        "iterations": 30,
        "noise_multiplier": 2.0,
        "l2_clip_norm": 1.0,
    },
    "scheduler": {"name": "async_hyperband", "grace_period": 5, "reduction_factor": 2},
    "report_every_steps": 5,
    "seed": 12345,
    # One after the other, so that a trial which learns nothing always meets one that did.
    "resources": {"max_concurrent_trials": 1},
}
# Long enough to be interrupted: it never ends by itself within a test.
ENDLESS = {
    **SPEC,
    "privacy": {**SPEC["privacy"], "target_epsilon": 1e5, "accountant": "rdp"},
    "search_space": {
        **SPEC["search_space"],
        "optimizer": "sgd",
        "expected_batch_size": 128,
        "iterations": 1_000_000,
    },
    "scheduler": {"name": "fifo"},
    "resources": {"max_concurrent_trials": 2},
}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """One finished sweep: its printed document, notes, and home."""
    folder = tmp_path_factory.mktemp("sweep")
    with running(folder, SPEC) as process:
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 0, err
    return json.loads(out), err, folder


def by_state(document, state):
    return [trial for trial in document["trials"] if trial["state"] == state]


def test_trials_complete_are_pruned_and_are_rejected(sweep):
    document, _, _ = sweep
    assert document["state"] == "COMPLETED"
    assert len(document["trials"]) == 8
    assert len(by_state(document, "REJECTED")) == 4
    completed, pruned = by_state(document, "COMPLETED"), by_state(document, "PRUNED")
    assert len(completed) + len(pruned) == 4
    assert completed
    assert pruned, "a learning rate of 1e-6 learns nothing, so a later one of 8 beats it"
    for trial in completed:
        assert trial["step"] == 30
        assert trial["epsilon"] == trial["planned_epsilon"] <= 3.0
    for trial in pruned:
        assert trial["step"] < 30
        assert trial["epsilon"] < trial["planned_epsilon"]
        assert "was not among the best of those that had reached step" in trial["reason"]
    for trial in by_state(document, "REJECTED"):
        assert trial["config"]["expected_batch_size"] == 512
        assert trial["epsilon"] > 3.0
        assert "exceeds the budget" in trial["reason"]
    accuracies = [trial["eval_accuracy"] for trial in document["trials"]]
    measured = [accuracy for accuracy in accuracies if accuracy is not None]
    assert measured == sorted(measured, reverse=True), "best first"
    assert measured[0] > 0.5


def test_epsilon_is_that_of_the_steps_really_taken(sweep):
    document, _, _ = sweep
    for trial in by_state(document, "COMPLETED") + by_state(document, "PRUNED"):
        config = trial["config"]
        for point in trial["curve"]:
            mechanism = accounting.DpSgdMechanism(
                noise_multiplier=config["noise_multiplier"],
                sampling_prob=config["sampling_prob"],
                iterations=point["step"],
                neighboring_relation="zero_out",
            )
            assert point["epsilon"] == accounting.epsilon(mechanism, delta=1e-5)


def test_a_rejected_trial_never_reached_a_worker(sweep):
    document, _, folder = sweep
    _, home = store_of(folder)
    rejected = {trial["trial_id"] for trial in by_state(document, "REJECTED")}
    admitted = {trial["trial_id"] for trial in document["trials"]} - rejected
    with open_database(home).connect() as connection:
        started = set(connection.scalars(sa.select(attempts.c.trial_id)))
        configured = set(
            connection.scalars(
                sa.select(trials.c.trial_id).where(trials.c.trial_config.is_not(None))
            )
        )
    assert started == configured == admitted
    sweep_dir = home.sweep_dir(document["sweep_id"])
    assert {path.name for path in (sweep_dir / "checkpoints").iterdir()} == admitted
    assert not (sweep_dir / "tune").exists(), "a cache, which is thrown away"


def test_every_step_was_charged(sweep):
    document, _, folder = sweep
    _, home = store_of(folder)
    with open_database(home).connect() as connection:
        rows = connection.execute(sa.select(trials)).all()
    steps = {trial["trial_id"]: trial["step"] for trial in document["trials"]}
    assert {row.trial_id: row.charged_iterations for row in rows} == steps


def test_workers_are_reused(sweep):
    _, _, folder = sweep
    _, home = store_of(folder)
    with open_database(home).connect() as connection:
        workers = list(connection.scalars(sa.select(attempts.c.worker)))
    assert len(workers) == 4
    assert len(set(workers)) == 1


def test_mlflow_read_back_by_its_own_search(sweep):
    document, _, folder = sweep
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert [run.info.run_id for run in parents] == [document["mlflow_run_id"]]
    ran = {t["trial_id"]: t for t in document["trials"] if t["state"] != "REJECTED"}
    assert {run.data.tags["dp_sweeps.trial_id"] for run in children} == set(ran)
    assert len(children) == len(ran)

    client = mlflow.MlflowClient()
    for run in children:
        trial = ran[run.data.tags["dp_sweeps.trial_id"]]
        assert run.data.tags["mlflow.parentRunId"] == document["mlflow_run_id"]
        assert run.info.run_id == trial["mlflow_run_id"]
        for name in ("epsilon", "eval_accuracy"):
            history = client.get_metric_history(run.info.run_id, name)
            curve = {point["step"]: point[name] for point in trial["curve"]}
            assert {metric.step: metric.value for metric in history} == curve
        for name in (
            "policy",
            "delta",
            "accountant",
            "neighboring_relation",
            "sampling",
            "spec_hash",
        ):
            assert run.data.tags[f"dp_sweeps.{name}"]
        assert run.data.params["optimizer"] == trial["config"]["optimizer"]
        told = [*run.data.params, *run.data.metrics, *run.data.tags]
        assert not [name for name in told if re.search("seed|train_loss|grad|norms|key", name)]
        assert "12345" not in [*run.data.params.values(), *run.data.tags.values()]


def test_the_report_is_written(sweep):
    document, _, _ = sweep
    report = {name: Path(path) for name, path in document["report"].items()}
    assert set(report) == {"png", "html", "json", "spec"}
    assert report["png"].read_bytes().startswith(b"\x89PNG")
    assert "plotly" in report["html"].read_text()
    written = json.loads(report["json"].read_text())
    assert written["trials"][0]["config"] == document["trials"][0]["config"]
    assert written["state"] == "COMPLETED"


def test_notes_are_plain_lines_where_there_is_no_terminal(sweep):
    _, err, _ = sweep
    assert "\x1b" not in err
    assert "completed" in err
    assert "rejected" in err
    assert "Traceback" not in err


def test_state_is_for_its_owner_alone(sweep):
    _, _, folder = sweep
    assert (folder / "home").stat().st_mode & 0o077 == 0


def copy_of(folder, sweep_folder):
    """A finished sweep in another place, with its own checkpoints."""
    shutil.copytree(sweep_folder / "home", folder / "home", symlinks=True)
    store, home = store_of(folder)
    before, after = str(sweep_folder / "home"), str(home.path)
    with writing(store.ledger.engine) as connection:
        where = sa.func.replace(checkpoints.c.location, before, after)
        connection.execute(checkpoints.update().values(location=where))
    return store


def test_a_pruned_trial_that_goes_on_is_as_if_it_never_had_been_pruned(sweep, tmp_path):
    document, _, folder = sweep
    trial_id = max(trial["trial_id"] for trial in by_state(document, "PRUNED"))
    before = charges(store_of(folder)[0])[trial_id]
    chosen = ["--trial", trial_id]
    ends = []
    for name in ("resumed", "undisturbed"):
        (tmp_path / name).mkdir()
        store = copy_of(tmp_path / name, folder)
        if name == "undisturbed":  # on its branch from the first step, in one go
            with writing(store.ledger.engine) as connection:
                connection.execute(checkpoints.delete())
            shutil.rmtree(store_of(tmp_path / name)[1].sweep_dir(document["sweep_id"]))
        with running(tmp_path / name, None, "--dry-run", *chosen) as process:
            said, err = process.communicate(timeout=DEADLINE_SECS)
        assert process.returncode == 0, err
        assert charges(store)[trial_id] == before, "nothing has changed"
        with running(tmp_path / name, None, *chosen) as process:
            _, err = process.communicate(timeout=DEADLINE_SECS)
        assert process.returncode == 0, err
        (decision,) = json.loads(said)["trials"]
        assert decision["new_iterations"] == 30 - before
        (row,) = [row for row in rows_of(store) if row.trial_id == trial_id]
        assert row.state == "COMPLETED"
        assert row.charged_iterations == store.ledger.reservation(trial_id).charged == 30
        last = [each for each in store.reports(row.sweep_id) if each.trial_id == trial_id][-1]
        assert (last.step, last.epsilon) == (decision["iterations"], decision["epsilon_after"])
        assert store.ledger.verify().ok
        ends.append((last_checkpoint_of(store, trial_id), last.eval_loss, branch_rows(store)))
    assert ends[0] == ends[1]


def last_checkpoint_of(store, trial_id):
    """Everything that a trial's newest checkpoint holds, as bytes."""
    query = sa.select(checkpoints.c.location).where(checkpoints.c.trial_id == trial_id)
    with store.ledger.engine.connect() as connection:
        newest = connection.scalars(query.order_by(checkpoints.c.step.desc())).first()
    assert newest is not None
    return arrays(Path(newest))


def test_two_drivers_draw_on_one_budget_at_once(tmp_path):
    spec = json.loads(json.dumps(SPEC))
    # Each sweep alone would fill it almost.
    spec["privacy"] = {"policy": "open", "target_epsilon": 4.0, "target_delta": 1e-5}
    spec["privacy"]["budget"] = "shared"
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    create = ["budget", "create", "shared", "--from", str(tmp_path / "spec.yaml")]
    arguments, env = command(tmp_path, spec)
    subprocess.run([arguments[0], *create], env=env, check=True, capture_output=True)
    with running(tmp_path, spec) as first, running(tmp_path, spec) as second:
        said = [each.communicate(timeout=DEADLINE_SECS) for each in (first, second)]
    # 3: the other was quicker, and left nothing for this one.
    assert {first.returncode, second.returncode} <= {0, 3}, said
    store, _ = store_of(tmp_path)
    ledger = store.ledger
    assert len(store.sweeps()) == 2
    rows = [row for each in store.sweeps() for row in store.trials(each.sweep_id)]
    states = {row.state for row in rows}
    assert "REJECTED" in states, "both together ask for more than there is"
    assert "COMPLETED" in states
    paid = {name: ledger.reservation(name).charged for name in ledger.reservation_ids("shared")}
    assert {name: n for name, n in paid.items() if n} == {
        row.trial_id: row.charged_iterations for row in rows if row.charged_iterations
    }
    level = ledger.status("shared").level
    assert level is not None
    assert level.spent + level.reserved <= level.limit
    assert ledger.verify().ok


def wait_for_more(store, before=None):
    """Waits until every trial has been charged for more than it had been; gives the charges."""

    def found():
        now = charges(store)
        return now and all(now[name] > (before or {}).get(name, 0) for name in now) and now

    return wait_for(found)


def interrupted_twice(process, store, number):
    """Interrupts a command twice before any worker could pause; gives what it said."""
    sweep_id = store.sweeps()[0].sweep_id
    workers = {worker_of(store, row.trial_id) for row in rows_of(store)}
    freeze(store, workers)  # or they would pause before it is asked again
    try:
        process.send_signal(number)
        wait_for(lambda: store.wish(sweep_id) is Wish.PAUSE)
        process.send_signal(number)
        return process.communicate(timeout=DEADLINE_SECS)[1]
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def test_a_sweep_outlives_its_workers_and_its_drivers_interrupts(tmp_path):
    with running(tmp_path, ENDLESS) as process:
        store, home = store_of_when_there(tmp_path)
        victim = min(wait_for_more(store))
        os.kill(worker_of(store, victim), signal.SIGKILL)
        wait_for(lambda: len(attempts_at(store, victim)) == 2)
        wait_for_more(store, charges(store))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE_SECS)
    # The first interrupt: everything waits at a checkpoint.
    assert process.returncode == 130, err
    assert "finishing checkpoints; interrupt again to end now" in err
    document = json.loads(out)
    sweep_id = document["sweep_id"]
    assert document["state"] == store.sweep(sweep_id).state == "PAUSED"
    assert {trial["state"] for trial in document["trials"]} == {"PAUSED"}
    assert [each.end for each in attempts_at(store, victim)] == ["lost", "paused"]
    paused = charges(store)
    assert len(branch_rows(store)) == 2, "the worker that died cost no step twice"
    states = {store.ledger.reservation(trial_id).state for trial_id in paused}
    assert states == {"open"}

    with running(tmp_path, None) as process:
        wait_for_more(store, paused)
        err = interrupted_twice(process, store, signal.SIGTERM)
    # The second: all is left where it is.
    assert process.returncode == 130, err
    assert f"interrupted; `dp-sweeps resume {sweep_id}` goes on" in err
    assert {row.state for row in rows_of(store)} == {"RUNNING"}
    assert store.sweep(sweep_id).state == "RUNNING"
    assert not store.is_driven(sweep_id)
    assert len(branch_rows(store)) == 2

    driver.cancel(sweep_id, store, home)
    ended = rows_of(store)
    assert {row.state for row in ended} == {"CANCELLED"}
    assert all(row.charged_iterations > paused[row.trial_id] for row in ended)
    assert store.ledger.verify().ok


def test_a_sweep_whose_driver_is_killed_goes_on_with_one_command(tmp_path):
    spec = json.loads(json.dumps(SPEC))
    spec["privacy"].update(target_epsilon=100.0)
    spec["search_space"].update(
        optimizer="sgd",
        expected_batch_size=64,
        iterations=300,
        learning_rate={"grid_search": [8.0, 4.0, 2.0]},
    )
    spec["scheduler"] = {"name": "fifo"}
    with running(tmp_path, spec) as process:
        store, home = store_of_when_there(tmp_path)

        def in_the_middle():
            states = [(row.state, row.charged_iterations > 20) for row in rows_of(store)]
            return states[:2] == [("COMPLETED", True), ("RUNNING", True)]

        wait_for(in_the_middle)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == -signal.SIGKILL
    first, second, third = rows_of(store)
    assert (first.state, second.state, third.state) == ("COMPLETED", "RUNNING", "ADMITTED")
    assert store.sweep(first.sweep_id).state == "RUNNING"
    before = [row for row in store.reports(first.sweep_id) if row.trial_id == first.trial_id]

    with running(tmp_path, None) as process:
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 0, err
    document = json.loads(out)
    assert document["state"] == "COMPLETED"
    assert [trial["state"] for trial in document["trials"]] == ["COMPLETED"] * 3
    ends = [[each.end for each in attempts_at(store, row.trial_id)] for row in rows_of(store)]
    assert ends == [["ended"], ["interrupted", "ended"], ["ended"]]
    # Each step of each trial was paid once, also what was taken again.
    assert [row.charged_iterations for row in rows_of(store)] == [300] * 3
    assert len(branch_rows(store)) == 3
    reports = store.reports(first.sweep_id)
    assert [row for row in reports if row.trial_id == first.trial_id] == before
    steps = list(range(5, 301, 5))
    assert [row.step for row in reports if row.trial_id == second.trial_id] == steps
    assert store.ledger.verify().ok
    mlflow.set_tracking_uri(home.mlflow_uri)
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert sorted(run.info.status for run in runs) == ["FINISHED"] * 4
    curves = mlflow.MlflowClient()
    run_id = rows_of(store)[1].mlflow_run_id
    assert [each.step for each in curves.get_metric_history(run_id, "epsilon")] == steps


def test_a_trial_that_fails_leaves_the_others_alone(tmp_path):
    # Data that nobody has stands for whatever breaks inside a worker.
    spec = json.loads(json.dumps(SPEC))
    spec["search_space"].update(
        optimizer="sgd", expected_batch_size=128, learning_rate={"grid_search": [8.0, 1.0]}
    )
    spec["scheduler"] = {"name": "fifo"}
    arguments, env = command(tmp_path, spec)
    program = """
import dataclasses
from sweeps import cli
from sweeps.database.store import Store
from trainer.config import DataConfig

create_sweep = Store.create_sweep

def create_and_obstruct(self, sweep, trials):
    config = dataclasses.replace(trials[0].trial_config, data=DataConfig(name="nowhere"))
    broken = dataclasses.replace(trials[0], trial_config=config)
    create_sweep(self, sweep, [broken, *trials[1:]])

Store.create_sweep = create_and_obstruct
cli.main()
"""
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments[1:]],
        env=env,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
        check=False,
    )
    assert run.returncode == 1, run.stderr
    document = json.loads(run.stdout)
    assert sorted(trial["state"] for trial in document["trials"]) == ["COMPLETED", "FAILED"]
    (failed,) = by_state(document, "FAILED")
    assert "nowhere" in failed["reason"]
    assert f"`dp-sweeps logs {failed['trial_id']}` says more" in failed["reason"]
    _, home = store_of(tmp_path)
    log = home.trial_log(document["sweep_id"], failed["trial_id"]).read_text()
    assert "Traceback" in log
    assert failed["epsilon"] == 0


def test_a_sweep_on_a_cluster_that_is_there_already(tmp_path):
    spec = json.loads(json.dumps(SPEC))
    spec["search_space"].update(optimizer="sgd", iterations=10, learning_rate=8.0)
    spec["scheduler"] = {"name": "fifo"}
    # More than any node has would wait for ever.
    greedy = {**spec, "resources": {"cpus_per_trial": 64}}
    with cluster(1) as (_, address):
        runs = []
        for name, wanted in (("modest", spec), ("greedy", greedy)):
            (tmp_path / name).mkdir()
            arguments, env = command(tmp_path / name, wanted, "--address", address)
            runs.append(
                subprocess.run(
                    arguments,
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE_SECS,
                    check=False,
                )
            )
    joined, refused = runs
    assert joined.returncode == 0, joined.stderr
    states = [trial["state"] for trial in json.loads(joined.stdout)["trials"]]
    assert states == ["COMPLETED", "COMPLETED"]
    assert refused.returncode == 1
    assert "asks for 64 CPU on one node" in refused.stderr
    store, _ = store_of(tmp_path / "greedy")
    assert not store.sweeps(), "nothing is recorded"


def test_what_runs_on_a_cluster_is_interrupted_from_anywhere(tmp_path):
    with cluster(2) as (_, address):
        where = ["--address", address]
        with running(tmp_path, ENDLESS, *where) as process:
            store, _ = store_of_when_there(tmp_path)
            wait_for_more(store)
            process.send_signal(signal.SIGKILL)  # who only watches
            process.communicate(timeout=DEADLINE_SECS)
        sweep_id = store.sweeps()[0].sweep_id
        wait_for_more(store, charges(store))
        with running(tmp_path, None, *where) as process:
            _, err = process.communicate(timeout=DEADLINE_SECS)
        assert process.returncode == 0
        assert "its driver takes it from here" in err
        driver.ask(sweep_id, Wish.PAUSE, *store_of(tmp_path))
        wait_for(lambda: store.sweep(sweep_id).state == "PAUSED")
        assert {row.state for row in rows_of(store)} == {"PAUSED"}
        paused = charges(store)

        with running(tmp_path, None, *where) as process:
            wait_for_more(store, paused)
            err = interrupted_twice(process, store, signal.SIGINT)
        assert process.returncode == 130, err
        assert f"interrupted; `dp-sweeps resume {sweep_id}` goes on" in err
        assert {row.state for row in rows_of(store)} == {"RUNNING"}
        assert (store.sweep(sweep_id).state, store.is_driven(sweep_id)) == ("RUNNING", False)
        assert len(branch_rows(store)) == 2
    driver.cancel(sweep_id, *store_of(tmp_path))


@pytest.mark.postgres
def test_a_sweep_on_postgresql(tmp_path, postgres_url):
    spec = json.loads(json.dumps(SPEC))
    spec["search_space"].update(optimizer="sgd", iterations=10, learning_rate=8.0)
    spec["scheduler"] = {"name": "fifo"}
    arguments, env = command(tmp_path, spec, DP_SWEEPS_DATABASE_URL=postgres_url)
    run = subprocess.run(
        arguments, env=env, capture_output=True, text=True, timeout=DEADLINE_SECS, check=False
    )
    assert run.returncode == 0, run.stderr
    states = [trial["state"] for trial in json.loads(run.stdout)["trials"]]
    assert states == ["COMPLETED", "COMPLETED"]
    assert not (tmp_path / "home" / "ledger.db").exists()


# -- correlated noise, and averages ----------------------------------------------------------


BANDED = {
    **SPEC,
    "name": "banded",
    "search_space": {
        **SPEC["search_space"],
        "optimizer": "sgd",
        "learning_rate": 4.0,
        "expected_batch_size": 64,
        "iterations": 10,
        "noise_multiplier": "calibrated",
    },
    "mechanism": {"bands": 4},
    "augmentation": {"views": 2, "crop_padding": 1},
    "averaging": {"ema_decay": 0.9, "polyak": True},
    "scheduler": {"name": "fifo"},
}


@pytest.fixture(scope="module")
def banded(tmp_path_factory):
    """A finished sweep of one trial with correlated noise, and its home."""
    folder = tmp_path_factory.mktemp("banded")
    with running(folder, BANDED) as process:
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 0, err
    return json.loads(out), folder


def test_correlated_noise_is_charged_by_groups_of_steps(banded):
    document, _ = banded
    (trial,) = by_state(document, "COMPLETED")
    assert document["sampling"] == "cyclic_poisson"
    assert trial["config"]["sampling_prob"] == 4 * 64 / 1437
    for point, repetitions in zip(trial["curve"], (2, 3), strict=True):  # after 5 and 10 steps
        mechanism = accounting.DpSgdMechanism(
            noise_multiplier=trial["config"]["noise_multiplier"],
            sampling_prob=trial["config"]["sampling_prob"],
            iterations=repetitions,
            neighboring_relation="zero_out",
        )
        assert point["epsilon"] == accounting.epsilon(mechanism, delta=1e-5)
    assert trial["epsilon"] == trial["planned_epsilon"] <= 3.0


def test_averages_are_shown_beside_the_last_iterate(banded):
    document, folder = banded
    (trial,) = document["trials"]
    store, home = store_of(folder)
    (row,) = [row for row in store.reports(document["sweep_id"]) if row.step == 10]
    store.ledger.close()
    mlflow.set_tracking_uri(home.mlflow_uri)
    run = mlflow.get_run(trial["mlflow_run_id"])
    for name in ("ema_eval_accuracy", "ema_eval_loss", "polyak_eval_accuracy", "polyak_eval_loss"):
        assert trial[name] == getattr(row, name) == run.data.metrics[name] > 0
    assert trial["eval_accuracy"] == row.eval_accuracy
    assert run.data.tags["dp_sweeps.sampling"] == "cyclic_poisson"
    assert run.data.params["bands"] == "4"
    assert run.data.params["augmentation_views"] == "2"
