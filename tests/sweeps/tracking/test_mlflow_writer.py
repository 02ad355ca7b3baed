"""What MLflow hears, read back through MLflow itself: all of it, once, and nothing private."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from accounting import BudgetTerms, DpSgdMechanism
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Attempt, NewSweep, NewTrial, Store, open_store
from sweeps.database.tables import outbox
from sweeps.errors import RefusedError, TrackingError
from sweeps.home import HOME_VARIABLE, MLFLOW_VARIABLE, Home
from sweeps.tracking import mlflow_writer as tracking
from sweeps.tracking.mlflow_writer import MlflowWriter, delivering
from sweeps.tracking.outbox import OutboxThread

ROOT = Path(__file__).parents[3]
SWEEP = "digits-1"
PRIVATE = ("seed", "train_loss", "grad_norm", "fingerprint", "clipped_fraction")
DEADLINE_SECS = 120.0
SPEC = {
    "name": "digits",
    "seed": 7,
    "data": {"name": "digits"},
    "model": {"name": "mlp", "hidden_sizes": [64]},
    "privacy": {
        "policy": "per_trial",
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "accountant": "pld",
        "neighboring_relation": "zero_out",
    },
}
CONFIG = {
    "optimizer": "adam",
    "learning_rate": 0.1,
    "expected_batch_size": 64.0,
    "iterations": 40,
    "noise_multiplier": 1.5,
    "l2_clip_norm": 1.0,
    "sampling_prob": 0.05,
    "seed": 7,
    "train_loss": 0.1,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """An installation: its state, and the database's two ends."""

    home: Home
    engine: sa.Engine
    store: Store

    def writer(self) -> MlflowWriter:
        return MlflowWriter(self.store, self.home)


@pytest.fixture(scope="session")
def mlflow_client() -> Callable[[Home], Any]:
    """Gives MLflow's own client for a home, by which tests read."""
    from mlflow import MlflowClient

    return lambda home: MlflowClient(tracking_uri=home.mlflow_uri)


@pytest.fixture(scope="session")
def empty_mlflow(
    tmp_path_factory: pytest.TempPathFactory, mlflow_client: Callable[[Home], Any]
) -> Path:
    """An MLflow database without experiments: to copy it is quicker than to migrate one."""
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow_client(Home.from_environment({HOME_VARIABLE: str(folder)})).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


@pytest.fixture
def place(tmp_path: Path, empty_mlflow: Path) -> Iterator[Place]:
    with opened(tmp_path / "home", empty_mlflow) as place:
        yield place


@contextmanager
def opened(
    folder: Path, mlflow_db: Path | None = None, *, mlflow_uri: str = ""
) -> Iterator[Place]:
    """A place in a folder, closed at the end of the block."""
    home = Home.from_environment({HOME_VARIABLE: str(folder), MLFLOW_VARIABLE: mlflow_uri})
    store = open_store(home)
    if mlflow_db is not None:
        shutil.copy(mlflow_db, folder / "mlflow.db")
    yield Place(home, store.ledger.engine, store)
    store.ledger.close()


# -- what a sweep writes ---------------------------------------------------------------------


SWEEP_PARAMS = ("dataset", "model", "clipping")
MECHANISM = DpSgdMechanism(
    noise_multiplier=4.0, sampling_prob=0.01, iterations=40, neighboring_relation="zero_out"
)


def a_trial(number: int, state: TrialState = TrialState.ADMITTED, **fields: Any) -> NewTrial:
    given: dict[str, Any] = {
        "trial_id": f"{SWEEP}-{number}",
        "number": number,
        "mechanism": None if state is TrialState.REJECTED else MECHANISM,
        "reason": "",
        "config": CONFIG,
        "trial_config": None,
        "planned_iterations": 40,
        "planned_epsilon": 2.5,
    }
    return NewTrial(**{**given, **fields})


def create(
    store: Store,
    *trials: NewTrial,
    sweep_id: str = SWEEP,
    **sections: Any,
) -> None:
    sweep = NewSweep(
        sweep_id=sweep_id,
        name="digits",
        spec={**SPEC, **sections},
        spec_hash="abc",
        dataset="digits:1.0.0",
        dataset_fingerprint="0123",
        terms=BudgetTerms(epsilon=8.0, delta=1e-5, policy="per_trial"),
    )
    store.create_sweep(sweep, trials)


def report(store: Store, attempt: Attempt, step: int, **metrics: float) -> None:
    store.charge(attempt, step)
    given = {"epsilon": step / 16, "eval_accuracy": step / 64, "eval_loss": 1 / step}
    store.add_report(attempt, step, {**given, **metrics})


def run_a_sweep(store: Store, folder: Path) -> None:
    """Two trials run, of which one is pruned; one diverges and one is rejected."""
    rejected = a_trial(3, TrialState.REJECTED, reason="needs 9.1", planned_epsilon=float("inf"))
    create(store, a_trial(0), a_trial(1), a_trial(2, planned_epsilon=float("inf")), rejected)
    first, second, third = (store.begin_attempt(f"{SWEEP}-{number}") for number in range(3))
    for step in (10, 20, 30, 40):
        report(store, first, step)
        if step <= 20:
            report(store, second, step)
    report(store, third, 10, epsilon=float("inf"), eval_loss=float("nan"))
    store.finish_attempt(second, TrialState.PRUNED, "behind")
    store.finish_attempt(first, TrialState.COMPLETED)
    store.finish_attempt(third, TrialState.DIVERGED, "loss is not finite")
    artifacts = [folder / "report.png", folder / "report.html"]
    for path in artifacts:
        path.write_text(path.name)
    missing = folder / "absent.json"
    store.end_sweep(SWEEP, SweepState.COMPLETED, [str(path) for path in [*artifacts, missing]])


def content(client: Any, experiment: str = "digits") -> dict[str, Any]:
    """Everything that MLflow holds of an experiment, by names instead of its random ids."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    runs = client.search_runs([found.experiment_id], max_results=1000)
    names = {run.info.run_id: run.info.run_name for run in runs}
    held: dict[str, Any] = {}
    for run in runs:
        tags = dict(run.data.tags)
        if "mlflow.parentRunId" in tags:
            tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
        assert run.info.run_name not in held, "two runs of one trial"
        held[run.info.run_name] = {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": tags,
            "curves": {
                name: [(m.step, m.value, m.timestamp) for m in history]
                for name in sorted(run.data.metrics)
                if (history := client.get_metric_history(run.info.run_id, name))
            },
            "artifacts": sorted(f.path for f in client.list_artifacts(run.info.run_id, "report")),
        }
    return held


def curve(run: dict[str, Any], name: str) -> list[tuple[int, float]]:
    return [(step, value) for step, value, _ in run["curves"].get(name, [])]


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
    pending = place.store.count_undelivered()
    assert place.writer().deliver() == pending
    assert place.store.count_undelivered() == 0
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
    attempt = place.store.begin_attempt(f"{SWEEP}-0")
    report(place.store, attempt, 10, ema_eval_accuracy=0.5, polyak_eval_loss=1.5)
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
    report(place.store, place.store.begin_attempt(f"{SWEEP}-0"), 10)
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


# -- crashes ---------------------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: nothing of it runs any more, `finally` included."""


class Mortal:
    """Makes the calls by which a delivery changes anything die, from a chosen one on.

    Each of them can die before it does anything and after it has done it.
    """

    PLACES = (
        (tracking._Mlflow, "create_run"),
        (tracking._Mlflow, "log"),
        (tracking._Mlflow, "upload"),
        (tracking._Mlflow, "end_run"),
        (Store, "set_mlflow_run_id"),
        (Store, "mark_delivered"),
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


@pytest.mark.slow
def test_a_crash_at_any_moment_and_a_replay_give_the_same(
    tmp_path: Path,
    empty_mlflow: Path,
    mlflow_client: Callable[[Home], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ledger = tmp_path / "ledger"
    with opened(ledger) as place:
        run_a_sweep(place.store, tmp_path)
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
            assert place.store.count_undelivered() == 0
            held = content(mlflow_client(place.home))
        shutil.rmtree(folder)
        return held

    whole = deliver_with_crash(0, None)
    moments = mortal.moments
    assert set(whole) == {SWEEP, *(f"{SWEEP}-{number}" for number in range(3))}
    assert moments > 30
    for moment in range(1, moments + 1):
        assert deliver_with_crash(moment, moment) == whole


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
        report(place.store, place.store.begin_attempt(f"{SWEEP}-{number}"), 10)
    assert writer.deliver() == 2
    assert set(content(client)) == {SWEEP, f"{SWEEP}-1"}


def test_a_refusal_keeps_its_messages_and_holds_up_nobody(
    place: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    create(place.store, a_trial(0), a_trial(1))
    writer = place.writer()
    writer.deliver()
    place.store.set_mlflow_run_id(SWEEP, f"{SWEEP}-0", "f" * 32)
    for number in range(2):
        report(place.store, place.store.begin_attempt(f"{SWEEP}-{number}"), 10)
    with pytest.raises(RefusedError, match=r"f{32} not found"):
        writer.deliver()
    assert [message.trial_id for message in place.store.undelivered()] == [f"{SWEEP}-0"]
    assert curve(content(mlflow_client(place.home))[f"{SWEEP}-1"], "eval_accuracy")


def test_a_message_of_a_later_version_is_kept(place: Place) -> None:
    create(place.store, a_trial(0))
    with place.engine.begin() as connection:
        connection.execute(
            outbox.insert().values(sweep_id=SWEEP, kind="novelty", payload={}, created_at=1.7e9)
        )
    with pytest.raises(RefusedError, match="novelty"):
        place.writer().deliver()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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
        pending = place.store.count_undelivered()
        with OutboxThread(writer, flush_secs=0.5) as background:
            place.store.end_sweep(SWEEP, SweepState.COMPLETED)
        assert background.remaining == pending + 1
        assert isinstance(background.last_error, TrackingError)
    with opened(folder, empty_mlflow) as place:
        assert place.writer().deliver() == pending + 1
        assert len(content(mlflow_client(place.home))) == 4


class Server:
    """A real MLflow server on loopback; its state outlives it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            command,
            cwd=self._folder,
            env={**os.environ, **quiet},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + DEADLINE_SECS
        while not self._healthy():
            assert self._process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9, workers included."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path, empty_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECS
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_server_killed_mid_sweep_loses_nothing(
    tmp_path: Path,
    server: Server,
    mlflow_client: Callable[[Home], Any],
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.start()
    with opened(tmp_path / "home", mlflow_uri=server.uri) as place:
        store = place.store
        capfd.readouterr()
        with delivering(place.writer()) as background:
            create(store, a_trial(0), a_trial(1))
            attempts = [store.begin_attempt(f"{SWEEP}-{number}") for number in range(2)]
            for attempt in attempts:
                report(store, attempt, 10)
            wait_until(lambda: store.count_undelivered() == 0)
            server.kill()
            for attempt in attempts:
                report(store, attempt, 20)
            wait_until(lambda: isinstance(background.last_error, TrackingError))
            for attempt in attempts:
                report(store, attempt, 30)
                store.finish_attempt(attempt, TrialState.COMPLETED)
            picture = tmp_path / "report.png"
            picture.write_text("picture")
            store.end_sweep(SWEEP, SweepState.COMPLETED, [str(picture)])
            server.start()
        assert (background.remaining, background.last_error) == (0, None)
        held = content(mlflow_client(place.home))
    assert set(held) == {SWEEP, f"{SWEEP}-0", f"{SWEEP}-1"}
    for number in range(2):
        expected = [(step, step / 16) for step in (10, 20, 30)]
        assert curve(held[f"{SWEEP}-{number}"], "epsilon") == expected
        assert held[f"{SWEEP}-{number}"]["status"] == "FINISHED"
    assert held[SWEEP]["artifacts"] == ["report/report.png"]
    assert capfd.readouterr() == ("", "")


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
    assert place.store.count_undelivered() == 0
