"""How soon trials train again: after a driver's death, and at the resume of a long sweep."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from benchmarks.figures import Figure
from sweeps.admission import prepare_dataset
from sweeps.database.store import Store, open_store
from sweeps.database.tables import reading, trials
from sweeps.home import HOME_VARIABLE, Home
from sweeps.service import make_plan, record

Tell = Callable[[str], None]

KILLS = 10
# As long as whoever stands by needs to be ready; it was told nothing of the kill to come.
CALM_SECS = 30.0
LONG = 5000
_DEADLINE_SECS = 180.0
_COMMAND = str(Path(sys.executable).with_name("dp-sweeps"))
_CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": os.cpu_count()})
print("address", cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""
SPEC: dict[str, Any] = {
    "version": 1,
    "name": "benchmark",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {
        "policy": "per_trial",
        "target_epsilon": 1e6,
        "target_delta": 1e-5,
        "accountant": "rdp",
    },
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": {"grid_search": [8.0, 2.0]},
        "expected_batch_size": 64,
        "iterations": 10_000_000,
        "noise_multiplier": 4.0,
        "l2_clip_norm": 1.0,
    },
    "scheduler": {"name": "fifo"},
    "report_every_steps": 500,
    "seed": 1,
    "resources": {"max_concurrent_trials": 2},
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A home, and the command in it."""

    home: Home
    store: Store

    @classmethod
    def at(cls, path: Path) -> "Place":
        """A home of its own."""
        home = Home.from_environment({HOME_VARIABLE: str(path)})
        return cls(home, open_store(home))

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        """Starts the command, in a process group of its own."""
        return subprocess.Popen(
            [_COMMAND, *arguments],
            env={**os.environ, HOME_VARIABLE: str(self.home.path)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def charged(self) -> int:
        """Steps that all trials of the sweep have been charged."""
        # One number: to read thousands of rows would take the processor from what is measured.
        with reading(self.store.ledger.engine) as connection:
            return connection.scalar(sa.select(sa.func.sum(trials.c.charged_iterations))) or 0

    def driver(self) -> int:
        """The process that drives the sweep, or did last."""
        return int(self.store.sweeps()[0].driver.rpartition(":")[2] or 0)


def driver_killed(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Kills the driver on a cluster, again and again; how long until a step is charged after."""
    place = Place.at(folder / "driver")
    spec = place.home.path / "spec.yaml"
    spec.write_text(json.dumps(SPEC))
    took: list[float] = []
    with _cluster() as address:
        place.start("run", str(spec), "--address", address, "--detach").wait(_DEADLINE_SECS)
        _wait(lambda: place.charged() > 0)
        for number in range(KILLS):
            tell(f"driver killed {number} times")
            time.sleep(CALM_SECS)
            killed = place.driver()
            begin = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            _wait(lambda killed=killed: place.driver() != killed)
            before = place.charged()
            _wait(lambda before=before: place.charged() > before)
            took.append(time.monotonic() - begin)
        place.start("cancel", place.store.sweeps()[0].sweep_id).wait(_DEADLINE_SECS)
    note = f"{KILLS} times, median {np.median(took):.1f}, longest {max(took):.1f}"
    yield Figure("driver killed until training again, s, p95", np.percentile(took, 95), 10, note)


def long_sweep(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Resumes a sweep of thousands of trials that nobody drives, on a Ray of its own."""
    tell(f"recording {LONG} trials")
    place = Place.at(folder / "long")
    rates = [float(rate) for rate in np.geomspace(0.01, 10.0, LONG)]
    space = {**SPEC["search_space"], "learning_rate": {"grid_search": rates}}
    spec = place.home.path / "spec.yaml"
    spec.write_text(json.dumps({**SPEC, "search_space": space}))
    plan = make_plan(spec, place.home)
    prepare_dataset(plan.spec, place.home.data_dir)
    record(plan, place.store)
    tell("resuming them")
    begin = time.monotonic()
    process = place.start("resume")
    try:
        _wait(lambda: place.charged() > 0)
        took = time.monotonic() - begin
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    yield Figure(f"resume of {LONG} trials until the first trains, s", took, 15, "one time")


@contextlib.contextmanager
def _cluster() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-c", _CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield next(line for line in process.stdout if line.startswith("address")).split()[1]
        finally:
            process.communicate("\n", timeout=_DEADLINE_SECS)


def _wait(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_SECS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing came of it")
        time.sleep(0.02)
