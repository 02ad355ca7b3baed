"""A sweep as its driver and its workers write it, and what MLflow then holds, for tests."""

import dataclasses
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from accounting import BudgetTerms
from sweeps.database.admitting import NewTrial
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import NewSweep, Store, open_store
from sweeps.database.tables import outbox, writing
from sweeps.home import DATABASE_VARIABLE, HOME_VARIABLE, MLFLOW_VARIABLE, Home
from sweeps.tracking.mlflow_writer import MlflowWriter
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.mechanism.branch import Branch
from trainer.training.plan import mechanism_of

SWEEP = "digits-1"
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


@contextmanager
def opened(
    folder: Path, mlflow_db: Path | None = None, *, mlflow_uri: str = "", database_url: str = ""
) -> Iterator[Place]:
    """A place in a folder, closed at the end of the block."""
    variables = {HOME_VARIABLE: str(folder), MLFLOW_VARIABLE: mlflow_uri}
    home = Home.from_environment({**variables, DATABASE_VARIABLE: database_url})
    home.create()
    store = open_store(home)
    if mlflow_db is not None:
        shutil.copy(mlflow_db, folder / "mlflow.db")
    yield Place(home, store.ledger.engine, store)
    store.ledger.close()


TRIAL_CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="adam",
    learning_rate=0.1,
    l2_clip_norm=1.0,
    noise_multiplier=4.0,
    sampling_prob=0.01,
    expected_batch_size=64.0,
    iterations=40,
    report_every_steps=10,
    target_delta=1e-5,
)


def a_trial(number: int, state: TrialState = TrialState.ADMITTED, **fields: Any) -> NewTrial:
    given: dict[str, Any] = {
        "trial_id": f"{SWEEP}-{number}",
        "number": number,
        "mechanism": None if state is TrialState.REJECTED else mechanism_of(TRIAL_CONFIG),
        "reason": "",
        "config": CONFIG,
        "trial_config": TRIAL_CONFIG,
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


class Worker:
    """A worker's attempt at a trial, on a branch of noise of its own."""

    def __init__(self, store: Store, number: int, sweep_id: str = SWEEP, start: int = 0) -> None:
        self._attempts = store.attempts
        self._attempt = store.attempts.begin(f"{sweep_id}-{number}")
        self._branch = Branch(secrets.token_hex(8), start)

    def charge(self, step: int) -> int:
        """Charges steps and gives what the trial has been charged in all."""
        return self._attempts.charge(self._attempt, self._branch, step)

    def report(
        self, step: int, *, end: TrialState | None = None, reason: str = "", **metrics: float
    ) -> Wish:
        """Charges a step and reports it."""
        self.charge(step)
        given = {"epsilon": step / 16, "eval_accuracy": step / 64, "eval_loss": 1 / step}
        given |= metrics
        branch_id = self._branch.branch_id
        told = self._attempts.report(self._attempt, branch_id, step, given, end=end, reason=reason)
        return told.wish

    def checkpoint(self, step: int, location: str) -> None:
        """Records a checkpoint."""
        self._attempts.checkpoint(self._attempt, step, location)


def tell(place: Place, trial_id: str, steps: Iterable[int]) -> None:
    """Leaves a message for each step of a trial, with the time that belongs to the step."""
    rows = [
        {
            "sweep_id": SWEEP,
            "trial_id": trial_id,
            "kind": "metrics",
            "payload": {"step": step, "metrics": {"epsilon": step / 8}},
            "created_at": 1.7e9 + step,
        }
        for step in steps
    ]
    with writing(place.engine) as connection:
        connection.execute(outbox.insert(), rows)


def run_a_sweep(store: Store, folder: Path) -> None:
    """Two trials run, of which one is pruned; one diverges and one is rejected."""
    rejected = a_trial(3, TrialState.REJECTED, reason="needs 9.1", planned_epsilon=float("inf"))
    create(store, a_trial(0), a_trial(1), a_trial(2, planned_epsilon=float("inf")), rejected)
    first, second, third = (Worker(store, number) for number in range(3))
    for step in (10, 20, 30):
        first.report(step)
        if step <= 20:
            second.report(step)
    store.end_trial(f"{SWEEP}-1", TrialState.PRUNED, "behind")
    first.report(40, end=TrialState.COMPLETED)
    third.report(
        10,
        end=TrialState.DIVERGED,
        reason="loss is not finite",
        epsilon=float("inf"),
        eval_loss=float("nan"),
    )
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


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


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECS
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)
