"""Whole sweeps: the installed command in a process of its own, a real Ray, a real MLflow store."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import sqlalchemy as sa
import yaml

import accounting
from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from sweeps.database.tables import attempts, open_database, trials
from sweeps.home import Home
from sweeps.report.results import read_results

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEADLINE_SECS = 240

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


def command(folder, spec, **environment):
    """The command line and environment of ``dp-sweeps run`` on a spec in a folder."""
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    home = folder / "home"
    binary = Path(sys.executable).with_name("dp-sweeps")
    clean = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS",)}
    return [str(binary), "run", str(path), "--json"], {
        **clean,
        "DP_SWEEPS_HOME": str(home),
        **environment,
    }


@contextlib.contextmanager
def running(folder, spec, **environment):
    """A sweep under way, in a process group of its own; killed if the block leaves it running."""
    arguments, env = command(folder, spec, **environment)
    # Whoever started the tests in the background made them deaf to it, and so their children.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        arguments,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        signal.signal(signal.SIGINT, heard)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def store_of(folder):
    home = Home.from_environment({"DP_SWEEPS_HOME": str(folder / "home")})
    return open_store(home), home


def wait_for(condition):
    """Polls until a condition gives something true, within the deadline."""
    end = time.monotonic() + DEADLINE_SECS
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("the deadline passed")


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
        assert "rung" in trial["reason"]
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
    tune_files = [path for path in (sweep_dir / "tune").rglob("*") if path.is_file()]
    text = " ".join(str(path) for path in tune_files) + " ".join(
        path.read_bytes().decode(errors="replace") for path in tune_files
    )
    assert not [trial_id for trial_id in rejected if trial_id in text]
    assert all(trial_id in text for trial_id in admitted)


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


def charged(store):
    sweeps = store.sweeps()
    if not sweeps:
        return []
    rows = store.trials(sweeps[0].sweep_id)
    return [row for row in rows if row.state == TrialState.RUNNING and row.charged_iterations >= 5]


def wait_until_charged(folder):
    _, home = store_of_when_there(folder)
    store = open_store(home)
    rows = wait_for(lambda: charged(store))
    return store, rows[0]


def store_of_when_there(folder):
    wait_for((folder / "home" / "ledger.db").exists)
    return store_of(folder)


def test_a_killed_worker_costs_its_own_trial_and_keeps_the_charge(tmp_path):
    spec = {**ENDLESS, "search_space": {**ENDLESS["search_space"], "learning_rate": 8.0}}
    with running(tmp_path, spec) as process:
        store, row = wait_until_charged(tmp_path)
        with store._engine.connect() as connection:
            worker = connection.scalar(
                sa.select(attempts.c.worker).where(attempts.c.trial_id == row.trial_id)
            )
        assert worker is not None
        os.kill(int(worker.rpartition(":")[2]), signal.SIGKILL)
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 1, err
    document = json.loads(out)
    assert document["state"] == "FAILED"
    trial = document["trials"][0]
    assert trial["state"] == "FAILED"
    assert "worker died" in trial["reason"]
    ended = store.trials(document["sweep_id"])[0]
    assert ended.charged_iterations >= row.charged_iterations
    # Whatever was charged is shown, reported or not.
    assert trial["epsilon"] > 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_ends_in_order(tmp_path, how):
    with running(tmp_path, ENDLESS) as process:
        store, row = wait_until_charged(tmp_path)
        process.send_signal(how)
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["state"] == "CANCELLED"
    assert {trial["state"] for trial in document["trials"]} == {"CANCELLED"}
    spent = {trial["trial_id"]: trial["epsilon"] for trial in document["trials"]}
    assert spent[row.trial_id] > 0
    results = read_results(store, document["sweep_id"])
    assert all(trial.state is TrialState.CANCELLED for trial in results.trials)


def test_a_trial_that_fails_leaves_the_others_alone(tmp_path):
    # A file where its checkpoints should go stands for whatever breaks inside a worker.
    spec = json.loads(json.dumps(SPEC))
    spec["search_space"].update(
        optimizer="sgd", expected_batch_size=128, learning_rate={"grid_search": [8.0, 1.0]}
    )
    spec["scheduler"] = {"name": "fifo"}
    arguments, env = command(tmp_path, spec)
    program = f"""
import sys
from pathlib import Path
from sweeps import cli
from sweeps.database.store import Store

create_sweep = Store.create_sweep

def create_and_obstruct(self, sweep, trials):
    create_sweep(self, sweep, trials)
    folder = Path({str(tmp_path / "home" / "sweeps")!r}, sweep.sweep_id, "checkpoints")
    folder.mkdir(parents=True)
    (folder / trials[0].trial_id).touch()

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
    failed = by_state(document, "FAILED")[0]
    assert "see " in failed["reason"]
    log = re.search(r"\(see (.*)\)", failed["reason"])
    assert log is not None
    assert "Traceback" in Path(log[1]).read_text()
    # The steps were charged before the checkpoint failed, and stay charged.
    assert failed["epsilon"] > 0


CLUSTER = """
import sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
print("address", cluster.address, flush=True)
sys.stdin.readline()
print("alive", bool(cluster.head_node.live_processes()), flush=True)
cluster.shutdown()
"""


def test_a_sweep_on_a_cluster_that_is_there_already(tmp_path):
    spec = json.loads(json.dumps(SPEC))
    spec["search_space"].update(optimizer="sgd", iterations=10, learning_rate=8.0)
    spec["scheduler"] = {"name": "fifo"}
    # More than any node has would wait for ever.
    greedy = {**spec, "resources": {"cpus_per_trial": 64}}
    with subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as cluster:
        assert cluster.stdout is not None
        address = next(line for line in cluster.stdout if line.startswith("address")).split()[1]
        runs = []
        for name, wanted in (("modest", spec), ("greedy", greedy)):
            (tmp_path / name).mkdir()
            arguments, env = command(tmp_path / name, wanted)
            runs.append(
                subprocess.run(
                    [*arguments, "--address", address],
                    env=env,
                    capture_output=True,
                    text=True,
                    timeout=DEADLINE_SECS,
                    check=False,
                )
            )
        said, _ = cluster.communicate("\n", timeout=DEADLINE_SECS)
    assert "alive True" in said, "it is left running"
    joined, refused = runs
    assert joined.returncode == 0, joined.stderr
    states = [trial["state"] for trial in json.loads(joined.stdout)["trials"]]
    assert states == ["COMPLETED", "COMPLETED"]
    assert refused.returncode == 1
    assert "asks for 64 CPU on one node" in refused.stderr
    store, _ = store_of(tmp_path / "greedy")
    assert not store.sweeps(), "nothing is recorded"


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
