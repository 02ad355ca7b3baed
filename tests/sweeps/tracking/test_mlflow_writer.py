"""What MLflow hears, read back through MLflow itself: all of it, and nothing private."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sweeps.database.states import SweepState, TrialState
from sweeps.database.tables import outbox
from sweeps.home import HOME_VARIABLE, Home
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
    run_a_sweep,
)

ROOT = Path(__file__).parents[3]
PRIVATE = ("seed", "train_loss", "grad_norm", "fingerprint", "clipped_fraction")
SWEEP_PARAMS = ("dataset", "model", "clipping")


# -- what MLflow then shows ------------------------------------------------------------------


def test_a_sweep_is_one_parent_and_a_child_per_admitted_trial(place: Place) -> None:
    import mlflow

    run_a_sweep(place.store, place.home.path)
    place.writer().deliver()
    mlflow.set_tracking_uri(place.home.mlflow_uri)
    runs = mlflow.search_runs(experiment_names=["digits"], output_format="list")
    roles = [run.data.tags["dp_sweeps.role"] for run in runs]
    assert sorted(roles) == ["sweep", "trial", "trial", "trial"]
    (parent,) = (run for run in runs if run.data.tags["dp_sweeps.role"] == "sweep")
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.info.run_name for run in children} == {f"{SWEEP}-{n}" for n in range(3)}
    assert place.store.sweep(SWEEP).mlflow_run_id == parent.info.run_id
    rows = {row.trial_id: row.mlflow_run_id for row in place.store.trials(SWEEP)}
    assert rows == {
        **{run.info.run_name: run.info.run_id for run in children},
        f"{SWEEP}-3": None,
    }


@pytest.fixture
def shown(place: Place, mlflow_client: Callable[[Home], Any]) -> dict[str, Any]:
    """What MLflow holds after a whole sweep."""
    run_a_sweep(place.store, place.home.path)
    pending = place.store.outbox.count_undelivered()
    assert place.writer().deliver() == pending
    assert place.store.outbox.count_undelivered() == 0
    return content(mlflow_client(place.home))


def test_the_curves_are_the_reports(place: Place, shown: dict[str, Any]) -> None:
    rows = place.store.reports(SWEEP)
    for number in range(3):
        trial_id = f"{SWEEP}-{number}"
        for name in ("epsilon", "eval_accuracy", "eval_loss"):
            expected = [
                (row.step, value)
                for row in rows
                if row.trial_id == trial_id and (value := getattr(row, name)) is not None
            ]
            assert curve(shown[trial_id], name) == expected
    assert curve(shown[f"{SWEEP}-2"], "epsilon") == []  # it was infinite
    assert curve(shown[f"{SWEEP}-2"], "eval_accuracy") == [(10, 10 / 64)]


def test_a_child_says_what_it_was_and_how_it_ended(shown: dict[str, Any]) -> None:
    states = {name: run["tags"]["dp_sweeps.state"] for name, run in shown.items()}
    assert states == {
        SWEEP: "COMPLETED",
        f"{SWEEP}-0": "COMPLETED",
        f"{SWEEP}-1": "PRUNED",
        f"{SWEEP}-2": "DIVERGED",
    }
    statuses = {name: run["status"] for name, run in shown.items()}
    assert statuses == {
        SWEEP: "FINISHED",
        f"{SWEEP}-0": "FINISHED",
        f"{SWEEP}-1": "KILLED",
        f"{SWEEP}-2": "FAILED",
    }
    pruned = shown[f"{SWEEP}-1"]
    assert pruned["params"] == {
        "dataset": "digits:1.0.0",
        "model": "mlp",
        "clipping": "flat",
        "optimizer": "adam",
        "learning_rate": "0.1",
        "expected_batch_size": "64.0",
        "iterations": "40",
        "noise_multiplier": "1.5",
        "l2_clip_norm": "1.0",
        "sampling_prob": "0.05",
    }
    assert pruned["tags"]["dp_sweeps.reason"] == "behind"
    assert pruned["tags"]["dp_sweeps.delta"] == "1e-05"
    assert pruned["tags"]["dp_sweeps.planned_epsilon"] == "2.5"
    assert shown[f"{SWEEP}-2"]["tags"]["dp_sweeps.planned_epsilon"] == "inf"


def test_repeats_of_a_configuration_are_told_by_a_tag_and_summed_up_by_their_mean(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    first = f"{SWEEP}-0"
    create(place.store, a_trial(0), a_trial(1, repeat_of=first), search={"repeats": 2})
    for number, accuracy in enumerate((0.5, 0.7)):
        Worker(place.store, number).report(10, eval_accuracy=accuracy)
        place.store.end_trial(f"{SWEEP}-{number}", TrialState.PRUNED, "")
    assert place.store.end_sweep(SWEEP, SweepState.COMPLETED)
    place.writer().deliver()
    held = content(mlflow_client(place.home))
    tags = [held[f"{SWEEP}-{number}"]["tags"] for number in range(2)]
    assert [each["dp_sweeps.configuration"] for each in tags] == [first, first]
    assert held[SWEEP]["tags"]["dp_sweeps.best_trial_id"] == f"{SWEEP}-1"
    assert curve(held[SWEEP], "best_eval_accuracy") == [(0, pytest.approx(0.6))]
    assert curve(held[SWEEP], "best_eval_accuracy_std") == [(0, pytest.approx(0.02**0.5))]


def test_a_sweep_names_its_mechanism_and_what_else_it_trains_with(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(
        place.store,
        a_trial(0),
        a_trial(1, config={**CONFIG, "sampling_prob": 1.0}),
        data={"name": "digits", "user_feature": "patient"},
        search_space={"expected_batch_size": {"grid_search": [64.0, "full"]}},
        mechanism={"bands": 1, "truncated_batch_size": None, "examples_per_user": 1},
        augmentation={"views": 4, "flip": True, "crop_padding": 0},
        averaging={"ema_decay": 0.99, "polyak": True},
    )
    Worker(place.store, 0).report(10, ema_eval_accuracy=0.5, polyak_eval_loss=1.5)
    place.writer().deliver()
    held = content(mlflow_client(place.home))
    params, run = held[SWEEP]["params"], held[f"{SWEEP}-0"]
    expected = {
        "examples_per_user": "1",
        "augmentation_views": "4",
        "augmentation_flip": "True",
        "ema_decay": "0.99",
        "polyak": "True",
    }
    assert {name: params[name] for name in params if name not in SWEEP_PARAMS} == expected
    assert run["params"].items() >= expected.items()
    tags = {name: one["tags"]["dp_sweeps.sampling"] for name, one in held.items()}
    assert tags == {SWEEP: "poisson", f"{SWEEP}-0": "poisson", f"{SWEEP}-1": "full_batch"}
    assert run["tags"]["dp_sweeps.privacy_unit"] == "user"
    assert curve(run, "ema_eval_accuracy") == [(10, 0.5)]
    assert curve(run, "polyak_eval_loss") == [(10, 1.5)]
    assert curve(run, "ema_eval_loss") == []


def test_every_run_names_its_guarantee(shown: dict[str, Any]) -> None:
    for run in shown.values():
        tags = run["tags"]
        told = {
            name.removeprefix("dp_sweeps."): value
            for name, value in tags.items()
            if name.startswith("dp_sweeps.")
        }
        assert told["policy"] == "per_trial"
        assert told["target_epsilon"] == "3.0"
        assert told["target_delta"] == "1e-05"
        assert told["accountant"] == "pld"
        assert told["neighboring_relation"] == "zero_out"
        assert told["sampling"] == "poisson"
        assert told["privacy_unit"] == "example"
        assert told["eval_data"] == "public"
        assert told["spec_hash"] == "abc"
        assert "differentially private" in told["guarantee"]
        assert tags["mlflow.note.content"] == told["guarantee"]


def test_the_parent_sums_up(shown: dict[str, Any]) -> None:
    parent = shown[SWEEP]
    values = {name: points[-1][1] for name, points in parent["curves"].items()}
    assert values == {
        "trials_completed": 1,
        "trials_pruned": 1,
        "trials_diverged": 1,
        "trials_rejected": 1,
        "trials_failed": 0,
        "trials_cancelled": 0,
        "best_eval_accuracy": 40 / 64,
        "best_epsilon": 2.5,
    }
    assert parent["tags"]["dp_sweeps.best_trial_id"] == f"{SWEEP}-0"
    assert parent["artifacts"] == ["report/report.html", "report/report.png"]
    assert parent["tags"]["dp_sweeps.missing_artifacts"] == "absent.json"


def test_nothing_private_leaves(shown: dict[str, Any]) -> None:
    for run in shown.values():
        for name in [*run["params"], *run["tags"], *run["curves"]]:
            assert not any(word in name.lower() for word in PRIVATE), name
        assert set(run["curves"]) <= {
            "epsilon",
            "eval_accuracy",
            "eval_loss",
            "best_eval_accuracy",
            "best_epsilon",
            *(f"trials_{state.lower()}" for state in TrialState),
        }


def test_artifacts_lie_in_the_home(place: Place, shown: dict[str, Any]) -> None:
    run_id = place.store.sweep(SWEEP).mlflow_run_id
    path = place.home.artifacts_dir / run_id / "artifacts" / "report" / "report.png"
    assert path.read_text() == "report.png"


def test_states_are_told_while_the_sweep_runs(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0), a_trial(1))
    writer = place.writer()
    writer.deliver()
    Worker(place.store, 0).report(10)
    writer.deliver()
    held = content(mlflow_client(place.home))
    assert held[f"{SWEEP}-0"]["tags"]["dp_sweeps.state"] == "RUNNING"
    assert held[f"{SWEEP}-1"]["tags"]["dp_sweeps.state"] == "ADMITTED"
    assert held[SWEEP]["status"] == "RUNNING"


def test_long_texts_are_cut_and_long_curves_are_whole(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0, config={**CONFIG, "optimizer": "o" * 7000}))
    rows = [
        {
            "sweep_id": SWEEP,
            "trial_id": f"{SWEEP}-0",
            "kind": "metrics",
            "payload": {"step": step, "metrics": {"epsilon": step / 8, "eval_accuracy": 0.5}},
            "created_at": 1.7e9 + step,
        }
        for step in range(1, 1201)
    ]
    with place.engine.begin() as connection:
        connection.execute(outbox.insert(), rows)
    place.store.end_trial(f"{SWEEP}-0", TrialState.FAILED, "x" * 9000)
    place.writer().deliver()
    run = content(mlflow_client(place.home))[f"{SWEEP}-0"]
    assert curve(run, "epsilon") == [(step, step / 8) for step in range(1, 1201)]
    assert len(run["tags"]["dp_sweeps.reason"]) == 8000
    assert len(run["params"]["optimizer"]) == 6000


def test_the_experiment_is_the_callers_then_the_environments(
    place: Place, mlflow_client: Callable[[Home], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-environment")
    create(place.store, a_trial(0), sweep_id="s-1")
    place.writer().deliver()
    create(place.store, a_trial(0, trial_id="t-2"), sweep_id="s-2")
    MlflowWriter(place.store, place.home, "of-the-caller").deliver()
    client = mlflow_client(place.home)
    assert set(content(client, "of-the-environment")) == {"s-1", f"{SWEEP}-0"}
    assert set(content(client, "of-the-caller")) == {"s-2", "t-2"}
    assert client.get_experiment_by_name("digits") is None


def test_a_second_creator_of_the_experiment_uses_the_firsts(
    place: Place, mlflow_client: Callable[[Home], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    client = mlflow_client(place.home)
    client.create_experiment("digits")
    ask = MlflowClient.get_experiment_by_name
    asked: list[str] = []

    def ask_too_early(self: Any, name: str) -> Any:
        asked.append(name)
        return None if len(asked) == 1 else ask(self, name)

    create(place.store, a_trial(0))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_experiment_by_name", ask_too_early)
        place.writer().deliver()
    assert asked == ["digits", "digits"]
    assert set(content(client)) == {SWEEP, f"{SWEEP}-0"}


# -- manners ---------------------------------------------------------------------------------


def run_python(code: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "DO_NOT"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
        check=True,
    )


def test_mlflow_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, sweeps.tracking.mlflow_writer; print('mlflow' in sys.modules)"
    assert run_python(code).stdout == "False\n"


@pytest.mark.slow
def test_who_is_killed_while_mlflow_makes_its_tables_leaves_none(place: Place) -> None:
    create(place.store, a_trial(0))
    (place.home.path / "mlflow.db").unlink()
    code = (
        "import os, signal\n"
        "import sqlalchemy as sa\n"
        "from sweeps.home import Home\n"
        "from sweeps.tracking.mlflow_client import Mlflow\n"
        "@sa.event.listens_for(sa.Engine, 'before_cursor_execute')\n"
        "def die(connection, cursor, statement, *more):\n"
        "    if statement.strip().startswith('DROP TABLE'):\n"  # a table is rebuilt
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Mlflow(Home.from_environment())\n"
    )
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_python(code, **{HOME_VARIABLE: str(place.home.path)})
    assert caught.value.returncode == -signal.SIGKILL
    place.writer().deliver()
    assert place.store.outbox.count_undelivered() == 0


@pytest.mark.slow
def test_a_first_delivery_is_silent_and_does_not_phone_home(place: Place) -> None:
    create(place.store, a_trial(0))
    (place.home.path / "mlflow.db").unlink()  # so that MLflow has its tables to create
    code = (
        "import os\n"
        "from sweeps.home import Home\n"
        "from sweeps.database.store import open_store\n"
        "from sweeps.tracking.mlflow_writer import MlflowWriter\n"
        "home = Home.from_environment()\n"
        "MlflowWriter(open_store(home), home).deliver()\n"
        "assert os.environ['MLFLOW_DISABLE_TELEMETRY'] == 'true'\n"
    )
    done = run_python(code, **{HOME_VARIABLE: str(place.home.path)})
    assert (done.stdout, done.stderr) == ("", "")
    assert place.store.outbox.count_undelivered() == 0
