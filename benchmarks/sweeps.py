"""What a sweep adds to its training, beside plain Ray Tune, and how far it scales.

    python benchmarks/sweeps.py                    # everything, about 15 minutes on two cores
    python benchmarks/sweeps.py --only short --only refused
    python benchmarks/sweeps.py --save             # also writes benchmarks/results/

The sweeps are run by the command line, in homes of their own, with two trials at a time. Plain
Tune (`benchmarks.sweeps_plain`) trains by the same code, keeps no ledger and no checkpoints, and
is run right before ours and right after. Neither's time holds the start of Ray or the making of
MLflow's tables.

A *slot* is what a trial takes of a worker: from where the worker begins it to where the worker
begins its next one. *Training* is the time inside the trainer's steps. What is left is overhead:
taking a trial up and down, reports with their charges, evaluation, checkpoints, and Tune.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# See the top of benchmarks/clipping.py.
_HERE = Path(__file__).resolve().parent
sys.path = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

import mlflow
import numpy as np
import ray
import sqlalchemy as sa
from rich.console import Console

from benchmarks.figures import Figure, arguments, conclude
from benchmarks.sweeps_watch import FOLDER_VARIABLE, STEP_PROGRAM, Worker, read
from sweeps.admission import prepare_dataset
from sweeps.database.store import open_store
from sweeps.database.tables import attempts, outbox, reading, trials
from sweeps.home import HOME_VARIABLE, Home
from sweeps.service import make_plan, record

Tell = Callable[[str], None]

SLOTS = 2
TRIALS = 64
# Plain Tune's trials are alike, each in a process of its own, and take long.
PLAIN_TRIALS = 16
# About a second of steps; what they really take is told.
ITERATIONS = 1500
REPORTS = 2
CONFIGURATIONS = 10_000
TRIVIAL, WARM_UP, STRETCH = 2000, 50, 200
_COMMAND = "from benchmarks.sweeps_worker import main; main()"
_MEBIBYTE = 2**20


def spec(space: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A specification on digits; of a multilayer perceptron if nothing else is said."""
    return {
        "version": 1,
        "name": "benchmark",
        "data": {"name": "digits"},
        "model": {"name": "mlp"},
        "privacy": {
            "policy": "per_trial",
            "target_epsilon": 1e6,
            "target_delta": 1e-5,
            "accountant": "rdp",
        },
        "search_space": {
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "expected_batch_size": 256,
            "iterations": ITERATIONS,
            "noise_multiplier": 2.0,
            "l2_clip_norm": 1.0,
            **space,
        },
        "scheduler": {"name": "fifo"},
        "report_every_steps": ITERATIONS // REPORTS,
        "resources": {"max_concurrent_trials": SLOTS},
        **more,
    }


def rates(count: int) -> list[float]:
    """So many learning rates."""
    return [float(f"{rate:.6g}") for rate in np.geomspace(0.1, 1.0, count)]


@dataclasses.dataclass(frozen=True)
class Slot:
    """What a trial took of a worker.

    Attributes:
        trial_id: The trial.
        secs: Until the worker began the next one; None of its last.
        training_secs: Of that, inside the steps.
    """

    trial_id: str
    secs: float | None
    training_secs: float


class Run:
    """A sweep that has been run by the command line, and what is known of it.

    Args:
        folder: Of its home; several sweeps may share it.
        document: Its specification.
        number: Of the sweep in the home.
    """

    def __init__(self, folder: Path, document: Mapping[str, Any], number: int = 0) -> None:
        self.home = Home.from_environment({HOME_VARIABLE: str(folder / "home")})
        self.store = open_store(self.home)
        self.notes = folder / f"notes-{number}"
        self.notes.mkdir()
        self.spec = folder / f"spec-{number}.yaml"
        self.spec.write_text(json.dumps(document))
        mlflow.MlflowClient(self.home.mlflow_uri).search_experiments()  # makes its tables

    def run(self) -> None:
        """Runs it to its end."""
        command = [sys.executable, "-c", _COMMAND, "run", str(self.spec)]
        environment = {HOME_VARIABLE: str(self.home.path), FOLDER_VARIABLE: str(self.notes)}
        _call(command, environment)

    @property
    def sweep(self) -> sa.Row[Any]:
        """The newest sweep's row."""
        return self.store.sweeps()[0]

    def count_ended(self) -> int:
        """Trials of the newest sweep that have ended, once there is a sweep."""
        with reading(self.store.ledger.engine) as connection:
            query = sa.select(sa.func.count()).select_from(trials)
            return connection.scalar(query.where(trials.c.state == "COMPLETED")) or 0

    def secs(self) -> float:
        """From where it was recorded to its end, MLflow's last message included."""
        with reading(self.store.ledger.engine) as connection:
            delivered = connection.scalar(
                sa.select(sa.func.max(outbox.c.delivered_at)).where(
                    outbox.c.sweep_id == self.sweep.sweep_id
                )
            )
        return max(self.sweep.ended_at, delivered or 0.0) - self.sweep.created_at

    def workers(self) -> list[Worker]:
        """What its workers wrote."""
        return read(self.notes)

    def attempts(self) -> dict[int, list[sa.Row[Any]]]:
        """What each worker took up, in order."""
        ours = sa.select(trials.c.trial_id).where(trials.c.sweep_id == self.sweep.sweep_id)
        with reading(self.store.ledger.engine) as connection:
            found = connection.execute(
                sa.select(attempts)
                .where(attempts.c.trial_id.in_(ours))
                .order_by(attempts.c.started_at)
            ).all()
        by_process: dict[int, list[sa.Row[Any]]] = {}
        for row in found:
            by_process.setdefault(int(row.worker.rpartition(":")[2]), []).append(row)
        return by_process

    def slots(self) -> list[Slot]:
        """What each trial took."""
        training = {worker.process: worker.training_secs for worker in self.workers()}
        found: list[Slot] = []
        for process, taken in self.attempts().items():
            for index, row in enumerate(taken):
                later = taken[index + 1].started_at if index + 1 < len(taken) else None
                secs = None if later is None else later - row.started_at
                found.append(Slot(row.trial_id, secs, training[process][index]))
        return found


# --- Short trials --------------------------------------------------------------------------


def short(folder: Path, tell: Tell) -> Iterator[Figure]:
    """64 trials of a second and of one shape, between some of them by plain Tune; then others."""
    document = spec({"learning_rate": {"grid_search": rates(TRIALS)}})
    run = Run(folder, document)
    tell(f"{PLAIN_TRIALS // 2} trials of a second by plain Tune")
    theirs_before = _plain(folder / "before", run)
    tell(f"{TRIALS} of ours")
    run.run()
    tell(f"{PLAIN_TRIALS // 2} more by plain Tune")
    theirs_after = _plain(folder / "after", run)
    plain_secs, plain_training = map(sum, zip(theirs_before, theirs_after, strict=True))
    secs, slots = run.secs(), run.slots()
    ours, theirs = 60 * TRIALS / secs, 60 * PLAIN_TRIALS / plain_secs
    note = (
        f"{ours:.1f} trials a minute, of {TRIALS}, against {theirs:.1f}, of {PLAIN_TRIALS}: "
        f"x{ours / theirs:.2f}"
    )
    yield Figure("time of a short trial, x plain Tune's", theirs / ours, 1 / 5, note)
    overheads = [1e3 * (slot.secs - slot.training_secs) for slot in slots if slot.secs is not None]
    training = statistics.median(slot.training_secs for slot in slots)
    plain_training /= PLAIN_TRIALS
    plain = 1e3 * (SLOTS * plain_secs / PLAIN_TRIALS - plain_training)
    note = (
        f"90th percentile {np.percentile(overheads, 90):.0f}; beside {training:.2f} s of steps "
        f"with {REPORTS} reports; plain Tune {plain:.0f}, "
        f"beside {plain_training:.2f} s, which compile"
    )
    yield Figure("overhead of a trial, ms, median", statistics.median(overheads), 150, note)
    yield from _reuse(run, shapes=1)
    tell("a second sweep in the same home")
    again = Run(folder, spec({"learning_rate": {"grid_search": rates(2 * SLOTS)}}), 1)
    again.run()
    compiled = _total(again.workers(), "compiled")
    note = f"{_total(again.workers(), 'cached').total()} had the persistent cache"
    yield Figure("functions compiled by a second sweep", compiled.total(), 0, note)


def _plain(folder: Path, run: Run) -> tuple[float, float]:
    """Seconds of plain Tune for half of its share of a sweep's trials, and of all their steps."""
    plain, notes = folder / "plain", folder / "notes"
    plain.mkdir(parents=True)
    notes.mkdir()
    plan = make_plan(run.spec, run.home)
    prepare_dataset(plan.spec, run.home.data_dir)
    configs = [p.config.to_json() for p in plan.admitted if p.config is not None]
    config = {
        "slots": SLOTS,
        "trial": configs[0],
        "learning_rates": [
            each["learning_rate"] for each in configs[:: 2 * TRIALS // PLAIN_TRIALS]
        ],
        "data_home": str(run.home.data_dir),
    }
    path = folder / "plain.json"
    path.write_text(json.dumps(config))
    mlflow.MlflowClient(f"sqlite:///{plain}/mlflow.db").search_experiments()
    command = [sys.executable, "-m", "benchmarks.sweeps_plain", str(path), str(plain)]
    answer = _call(command, {FOLDER_VARIABLE: str(notes)})
    return json.loads(answer)["secs"], sum(sum(worker.training_secs) for worker in read(notes))


def _reuse(run: Run, shapes: int) -> Iterator[Figure]:
    """Whether workers, programs and data are used again."""
    workers = run.workers()
    beyond = len(workers) - SLOTS
    yield Figure("worker processes beyond one per slot", beyond, 0, f"{len(workers)}")
    compiled, cached = _total(workers, "compiled"), _total(workers, "cached")
    note = (
        f"{shapes} x {len(workers)}; {compiled[STEP_PROGRAM]} compiled, {cached[STEP_PROGRAM]} "
        f"from the persistent cache; of all functions {compiled.total()} and {cached.total()}"
    )
    beyond = compiled[STEP_PROGRAM] - shapes * len(workers)
    yield Figure("step programs compiled beyond shapes x workers", beyond, 0, note)
    again = Counter[str]()
    for worker in workers:
        if shapes == 1:
            again += sum((*worker.traced[1:], *worker.compiled[1:]), Counter[str]())
        else:
            steps = sum(counts[STEP_PROGRAM] for counts in worker.traced)
            again += Counter({STEP_PROGRAM: steps - shapes})
    note = ", ".join(f"{name} {count}" for name, count in again.most_common(5)) or "none"
    yield Figure("functions traced or compiled again", again.total(), 0, note)
    beyond = sum(worker.loaded + worker.placed - 2 for worker in workers)
    note = ", ".join(f"{worker.loaded} and {worker.placed}" for worker in workers)
    yield Figure("data read or put beyond once per worker", beyond, 0, note)


def _total(workers: list[Worker], kind: str) -> Counter[str]:
    return sum(
        (counts for worker in workers for counts in getattr(worker, kind)), start=Counter[str]()
    )


# --- Several shapes ------------------------------------------------------------------------


def shapes(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Three shapes, which the order of the grid mixes."""
    tell("24 trials of three shapes")
    batches = [64, 128, 256]
    space = {
        "noise_multiplier": {"grid_search": [2.0, 3.0]},
        "expected_batch_size": {"grid_search": batches},
        "learning_rate": {"grid_search": rates(4)},
        "iterations": 300,
    }
    run = Run(folder, spec(space, report_every_steps=100))
    run.run()
    yield from _reuse(run, shapes=len(batches))
    shape_of = {
        row.trial_id: row.config["expected_batch_size"]
        for row in run.store.trials(run.sweep.sweep_id)
    }
    changes = [
        sum(shape_of[a.trial_id] != shape_of[b.trial_id] for a, b in itertools.pairwise(taken))
        for taken in run.attempts().values()
    ]
    beyond = max(changes) - (len(batches) - 1)
    note = f"{' and '.join(map(str, changes))} changes of {len(batches)} shapes"
    yield Figure("changes of shape in a worker beyond shapes - 1", beyond, 0, note)


# --- Refusals ------------------------------------------------------------------------------

# Of 10,000 configurations, about 500 fit.
_REFUSED: dict[str, dict[str, Any]] = {
    "per_trial, 20 mechanisms": {
        "privacy": {"policy": "per_trial", "target_epsilon": 1.0, "accountant": "pld"},
        "space": {
            "noise_multiplier": {"grid_search": [*np.linspace(0.5, 1.5, 19), 8.0]},
            "learning_rate": {"grid_search": rates(500)},
        },
    },
    "per_trial, 10,000 mechanisms": {
        "privacy": {"policy": "per_trial", "target_epsilon": 1.0, "accountant": "pld"},
        "space": {"noise_multiplier": {"uniform": [0.5, 2.03]}},
        "search": {"num_samples": 10_000},
    },
    "open, one mechanism": {
        "privacy": {"policy": "open", "target_epsilon": 6.0, "accountant": "rdp"},
        "space": {"noise_multiplier": 8.0, "learning_rate": {"grid_search": rates(10_000)}},
    },
    "open, 10,000 mechanisms": {
        "privacy": {"policy": "open", "target_epsilon": 6.0, "accountant": "rdp"},
        "space": {"noise_multiplier": {"uniform": [6.0, 10.0]}},
        "search": {"num_samples": 10_000},
    },
}


def refused(folder: Path, tell: Tell) -> Iterator[Figure]:
    """10,000 configurations, of which a budget allows few: decided and recorded."""
    for number, (name, given) in enumerate(_REFUSED.items()):
        tell(f"10,000 configurations, {name}")
        privacy = {"target_delta": 1e-5, **given["privacy"]}
        space = {"expected_batch_size": 64, "iterations": 100, **given["space"]}
        document = spec(space, privacy=privacy, report_every_steps=50)
        document |= {"search": given["search"]} if "search" in given else {}
        home = folder / f"refused-{number}"
        # Memory is that of a process of its own.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            admitted, planned, recorded, grown = process.submit(
                _decide, str(home), document
            ).result()
        secs = planned + recorded
        note = f"{admitted} admitted; decided in {planned:.1f} s, recorded in {recorded:.1f} s"
        yield Figure(f"{CONFIGURATIONS} configurations, {name}, s", secs, 60, note)
        yield Figure(f"memory for them, {name}, MiB", grown / _MEBIBYTE, 200, "grown at most")


def _decide(path: str, document: dict[str, Any]) -> tuple[int, float, float, int]:
    """Admitted trials, seconds to decide and to record, and bytes that the process grew by."""
    home = Home.from_environment({HOME_VARIABLE: path})
    store = open_store(home)
    spec_path = home.path / "spec.yaml"
    small = spec({"iterations": 100}, report_every_steps=50)
    spec_path.write_text(json.dumps(small))
    prepare_dataset(make_plan(spec_path, home).spec, home.data_dir)  # imports what is needed
    spec_path.write_text(json.dumps(document))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest is what it is now
    begin = time.perf_counter()
    plan = make_plan(spec_path, home)
    decided = time.perf_counter()
    record(plan, store)
    recorded = time.perf_counter()
    admitted = sum(row.state == "ADMITTED" for row in store.trials(store.sweeps()[0].sweep_id))
    return admitted, decided - begin, recorded - decided, _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


# --- Many trials ---------------------------------------------------------------------------


def trivial(folder: Path, tell: Tell) -> Iterator[Figure]:
    """2,000 trials of a step: whether the last are as quick as the first, and as small."""
    document = spec(
        {"learning_rate": {"grid_search": rates(TRIVIAL)}, "iterations": 1},
        model={"name": "logistic_regression"},
        report_every_steps=1,
    )
    run = Run(folder, document)
    sizes: list[int] = []

    def weigh() -> None:
        for part in range(4):
            while (ended := run.count_ended()) < TRIVIAL * (part + 1) // 4:
                tell(f"{ended} of {TRIVIAL} trials of a step")
                time.sleep(0.5)
            sizes.append(_size(run.home.path))

    sizes.append(_size(run.home.path))
    thread = threading.Thread(target=weigh, daemon=True)
    thread.start()
    run.run()
    thread.join(60)
    ended = sorted(row.ended_at for taken in run.attempts().values() for row in taken)
    first = ended[WARM_UP + STRETCH] - ended[WARM_UP]
    last = ended[-1] - ended[-1 - STRETCH]
    note = f"{STRETCH / first:.1f} a second at first, {STRETCH / last:.1f} at last"
    yield Figure("time of the last 200 of 2000 trials, x the first", last / first, 1.25, note)
    each = [(b - a) / (TRIVIAL / 4) for a, b in itertools.pairwise(sizes)]
    kept = (_size(run.home.path) - sizes[0]) / TRIVIAL
    note = f"{' '.join(f'{size / 1024:.0f}' for size in each)} KiB a trial by quarters; "
    note += f"{kept / 1024:.0f} KiB stay"
    yield Figure("disk of a trial, last quarter x second", each[3] / each[1], 1.1, note)


def _size(folder: Path) -> int:
    """Bytes that a folder takes of its disk."""
    answer = subprocess.run(["du", "-sk", folder], capture_output=True, check=False)
    return 1024 * int(answer.stdout.split()[0])


# --- The table -----------------------------------------------------------------------------

PARTS = {"short": short, "shapes": shapes, "refused": refused, "trivial": trivial}


def _call(command: list[str], environment: Mapping[str, str]) -> str:
    """Runs a command in an environment of its own; gives what it prints."""
    ours = {"PYTHONPATH": str(_HERE.parent), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        command,
        env={**os.environ, **ours, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    """Measures, prints a table, and exits with 1 if a limit was missed."""
    asked = arguments("What a sweep adds to its training.", PARTS)
    notes = Console(stderr=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, notes.status("…") as status:
        for name in asked.only or PARTS:
            part = Path(folder, name)
            part.mkdir()
            figures += PARTS[name](part, status.update)
    versions = {"ray": ray.__version__, "mlflow": mlflow.__version__}
    conclude(figures, asked, name="sweeps", title="Sweeps", versions=versions)


if __name__ == "__main__":
    main()
