"""How soon a sweep goes on, and what it costs that it can: the driver, and MLflow's outbox.

    python benchmarks/resume.py                    # everything, about 20 minutes on two cores
    python benchmarks/resume.py --only share --only outage
    python benchmarks/resume.py --save             # also writes benchmarks/results/

Every figure of MLflow is a ratio of two things measured in the same run, or a count that must be
exact. Those of the driver are seconds, most of which workers spend on importing JAX and Ray.
"""

import dataclasses
import secrets
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# See the top of benchmarks/clipping.py.
_HERE = Path(__file__).resolve().parent
sys.path = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

import mlflow
from rich.console import Console

from accounting import BudgetTerms
from benchmarks.figures import Figure, arguments, conclude
from benchmarks.resume_driver import driver_killed, long_sweep
from sweeps.database.admitting import NewTrial
from sweeps.database.store import NewSweep, Store, open_store
from sweeps.database.tables import outbox, writing
from sweeps.errors import TrackingError
from sweeps.home import HOME_VARIABLE, MLFLOW_VARIABLE, Home
from sweeps.tracking.mlflow_writer import MlflowWriter
from sweeps.tracking.outbox import OutboxThread
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.mechanism.branch import Branch
from trainer.training.plan import mechanism_of

Tell = Callable[[str], None]
SWEEP = "benchmark"


CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="sgd",
    learning_rate=1.0,
    l2_clip_norm=1.0,
    noise_multiplier=4.0,
    sampling_prob=0.01,
    expected_batch_size=64.0,
    iterations=1_000_000,
    report_every_steps=10,
    target_delta=1e-5,
    accountant="rdp",
)
SPEC = {
    "name": SWEEP,
    "model": {"name": "logistic_regression"},
    "privacy": {
        "policy": "per_trial",
        "target_epsilon": 1e5,
        "target_delta": 1e-5,
        "accountant": "rdp",
        "neighboring_relation": "zero_out",
    },
}


@contextmanager
def a_sweep(folder: Path, num_trials: int, mlflow_uri: str = "") -> Iterator[tuple[Store, Home]]:
    """A recorded sweep of admitted trials in a home of its own."""
    home = Home.from_environment({HOME_VARIABLE: str(folder), MLFLOW_VARIABLE: mlflow_uri})
    store = open_store(home)
    trials = [
        NewTrial(
            trial_id=trial_id(number),
            number=number,
            mechanism=mechanism_of(CONFIG),
            reason="",
            config={"optimizer": "sgd", "learning_rate": 1.0, "iterations": CONFIG.iterations},
            trial_config=CONFIG,
            planned_iterations=CONFIG.iterations,
            planned_epsilon=1.0,
        )
        for number in range(num_trials)
    ]
    store.create_sweep(
        NewSweep(
            sweep_id=SWEEP,
            name=SWEEP,
            spec=SPEC,
            spec_hash="0",
            dataset="digits:1.0.0",
            dataset_fingerprint="0",
            terms=BudgetTerms(epsilon=1e5, delta=1e-5, policy="per_trial"),
        ),
        trials,
    )
    try:
        yield store, home
    finally:
        store.ledger.close()


def trial_id(number: int) -> str:
    """The id of a trial."""
    return f"{SWEEP}-{number:04d}"


class Reporter:
    """A worker's attempt at a trial, which reports without training."""

    def __init__(self, store: Store, number: int) -> None:
        self._attempts = store.attempts
        self._attempt = store.attempts.begin(trial_id(number))
        self._branch = Branch(secrets.token_hex(8), 0)
        self.steps = 0

    def report(self) -> float:
        """Charges and reports the next step; gives the seconds that it took."""
        self.steps += 1
        metrics = {"epsilon": self.steps / 16, "eval_accuracy": 0.5, "eval_loss": 1 / self.steps}
        begin = time.perf_counter()
        self._attempts.charge(self._attempt, self._branch, self.steps)
        self._attempts.report(self._attempt, self._branch.branch_id, self.steps, metrics)
        return time.perf_counter() - begin


def missing_points(store: Store, home: Home, metric: str, steps: dict[str, int]) -> int:
    """How many points of a metric MLflow lacks, or has too many, over all trials."""
    client = mlflow.MlflowClient(home.mlflow_uri)
    wrong = 0
    for row in store.trials(SWEEP):
        found = [point.step for point in client.get_metric_history(row.mlflow_run_id, metric)]
        expected = range(1, steps[row.trial_id] + 1)
        wrong += len(set(expected) ^ set(found)) + len(found) - len(set(found))
    return wrong


# --- What delivery takes -------------------------------------------------------------------


class _Watched(MlflowWriter):
    """Adds up what deliveries compute."""

    cpu_secs = 0.0

    def deliver(
        self,
        on_delivered: Callable[[int], None] | None = None,
        *,
        max_secs: float | None = None,
    ) -> int:
        begin = time.thread_time()
        try:
            return super().deliver(on_delivered, max_secs=max_secs)
        finally:
            self.cpu_secs += time.thread_time() - begin


def share(folder: Path, tell: Tell) -> Iterator[Figure]:
    """A driver's core, taken by the delivery beside it, at three rates of reports."""
    for num_trials, each_second, secs in ((8, 2, 90), (8, 20, 90), (100, 50, 190)):
        with a_sweep(folder / f"{num_trials}-{each_second}", num_trials) as (store, home):
            tell(f"{each_second} reports a second of {num_trials} trials, for {secs} s")
            writer = _Watched(store, home)
            writer.deliver()  # imports MLflow, makes its tables and the runs
            writer.cpu_secs = 0.0
            reporters = [Reporter(store, number) for number in range(num_trials)]
            begin = time.perf_counter()
            with OutboxThread(writer):
                count = 0
                while (now := time.perf_counter() - begin) < secs:
                    if count < now * each_second:
                        reporters[count % num_trials].report()
                        count += 1
                    else:
                        time.sleep(0.01)
                taken, waiting = writer.cpu_secs / now, writer.count_undelivered()
            note = f"{count} reports, {waiting} of them waiting at the end"
            yield Figure(
                f"delivery's part of a core, {num_trials} trials, {each_second} reports/s",
                taken,
                0.03,
                note,
            )


# --- Many points ---------------------------------------------------------------------------


def points(folder: Path, tell: Tell) -> Iterator[Figure]:
    """100,000 messages of a point each, from 8 writers, while they are delivered."""
    tell("100,000 points from 8 writers")
    writers, each, together = 8, 12_500, 50
    with a_sweep(folder / "points", writers) as (store, home):
        writer = MlflowWriter(store, home)
        writer.deliver()

        def write(number: int) -> None:
            for start in range(1, each + 1, together):
                rows = [
                    {
                        "sweep_id": SWEEP,
                        "trial_id": trial_id(number),
                        "kind": "metrics",
                        "payload": {"step": step, "metrics": {"epsilon": step / 16}},
                        "created_at": time.time(),
                    }
                    for step in range(start, start + together)
                ]
                with writing(store.ledger.engine) as connection:
                    connection.execute(outbox.insert(), rows)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
        begin = time.perf_counter()
        for thread in threads:
            thread.start()
        taken = 0
        while any(thread.is_alive() for thread in threads) or writer.count_undelivered():
            taken += writer.deliver()
        seconds = time.perf_counter() - begin
        wrong = missing_points(store, home, "epsilon", {trial_id(n): each for n in range(writers)})
        note = f"{taken} messages in {seconds:.0f} s, {taken / seconds:.0f} a second"
        yield Figure("points lost or doubled, of 100,000", wrong, 0, note)


# --- An outage -----------------------------------------------------------------------------


def outage(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Reports while MLflow is away, beside reports while it is there; then all is delivered."""
    tell("reports with MLflow there and away, in turns")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    rounds, each = 6, 300
    with a_sweep(folder / "outage", 1) as (store, home):
        there = MlflowWriter(store, home)
        away = MlflowWriter(store, dataclasses.replace(home, mlflow_uri=nobody))
        there.deliver()
        reporter = Reporter(store, 0)
        medians: dict[bool, list[float]] = {True: [], False: []}
        outages = 0
        for number in range(2 * rounds):
            is_there = number % 2 == 0
            with OutboxThread(
                there if is_there else away, first_after_secs=0.0, flush_secs=0.0
            ) as thread:
                medians[is_there].append(statistics.median(reporter.report() for _ in range(each)))
                outages += isinstance(thread.last_error, TrackingError)
            _wait_for_the_last_attempt(store)
        there.deliver()
        with_it, without = (statistics.median(medians[key]) for key in (True, False))
        # Round beside round: a machine that others use is slower for a while, and quicker.
        ratio = statistics.median(
            a / b for a, b in zip(medians[False], medians[True], strict=True)
        )
        wrong = missing_points(store, home, "epsilon", {trial_id(0): reporter.steps})
    note = f"{1e3 * without:.2f} against {1e3 * with_it:.2f} ms, {rounds} rounds of {each} each"
    yield Figure("a charge and a report, x with MLflow there", ratio, 1.01, note)
    note = f"{reporter.steps} reports, {outages} outages"
    yield Figure("points lost or doubled by outages", wrong, 0, note)


def _wait_for_the_last_attempt(store: Store) -> None:
    while True:
        with store.outbox.delivery_lock() as held:
            if held:
                return
        time.sleep(0.01)


# --- The table -----------------------------------------------------------------------------

PARTS = {
    "share": share,
    "points": points,
    "outage": outage,
    "driver": driver_killed,
    "long": long_sweep,
}


def main() -> None:
    """Measures, prints a table, and exits with 1 if a limit was missed."""
    asked = arguments("How soon a sweep goes on.", PARTS)
    notes = Console(stderr=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, notes.status("…") as status:
        for name in asked.only or PARTS:
            figures += PARTS[name](Path(folder), status.update)
    versions = {"mlflow": mlflow.__version__}
    conclude(figures, asked, name="resume", title="Going on", versions=versions)


if __name__ == "__main__":
    main()
