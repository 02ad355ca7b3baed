"""What a search finds with as many trials and as much privacy as another: real sweeps on digits.

    python benchmarks/searches.py                # ten seeds, about 10 minutes on two cores
    python benchmarks/searches.py --seeds 3
    python benchmarks/searches.py --save         # also writes benchmarks/results/

Each sweep is one of the product, without Ray: its trials are admitted, run, charged and recorded
one after another in this process. Noise is calibrated, so that each trial costs the same epsilon,
and every search gets the same number of trials.
"""

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# See the top of benchmarks/clipping.py.
_HERE = Path(__file__).resolve().parent
sys.path = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

import scipy.stats
from rich.console import Console
from rich.table import Table

from sweeps.admission import prepare_dataset
from sweeps.database.store import open_store
from sweeps.driver import proposals_of
from sweeps.home import Home
from sweeps.schedule import Schedule
from sweeps.service import make_plan, record
from sweeps.trial_queue import TrialQueue
from sweeps.worker import TrialRun

TRIALS = 30
SEARCHES = ("random", "quasi_random", "optuna")
SPEC: dict[str, Any] = {
    "version": 1,
    "name": "searched",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {"policy": "per_trial", "target_epsilon": 1.0, "target_delta": 1e-5},
    "search_space": {
        "optimizer": {"choice": ["sgd", "momentum", "adam"]},
        "learning_rate": {"loguniform": [0.001, 100.0]},
        "expected_batch_size": {"choice": [32, 64, 128, 256, 512]},
        "iterations": {"choice": [25, 50, 100]},
        "noise_multiplier": "calibrated",
        "l2_clip_norm": {"loguniform": [0.1, 10.0]},
    },
    "report_every_steps": 25,
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What one sweep came to.

    Attributes:
        search: Its search's name.
        seed: Its search's seed.
        best: The best trial's last accuracy after each trial.
    """

    search: str
    seed: int
    best: list[float]


def searched(search: str, seed: int, home: Home) -> Found:
    """Runs a sweep, one trial after another."""
    named = {"name": search, "num_samples": TRIALS, "seed": seed}
    path = home.path / "spec.yaml"
    path.write_text(json.dumps({**SPEC, "search": named}))
    plan = make_plan(path, home)
    prepare_dataset(plan.spec, home.data_dir)
    store = open_store(home)
    sweep_id = record(plan, store)
    queue = TrialQueue(
        plan.spec,
        sweep_id,
        store,
        waiting=store.runnable(sweep_id),
        schedule=Schedule(plan.spec, store, home),
        proposals=proposals_of(plan.spec, sweep_id, store, home),
        limit=10 * TRIALS,
    )
    best: list[float] = []
    while not queue.is_over():
        trial_id = queue.take()
        if trial_id is None:
            continue
        last = 0.0
        with TrialRun(store, home, trial_id) as run:
            while (report := run.next_report()) is not None:
                last = float(report.eval_accuracy or 0.0)
                if report.outcome != "running":
                    break
        best.append(max([last, *best[-1:]]))
    return Found(search, seed, best)


def main() -> None:
    """Measures what was asked for and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="sweeps of each search")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    given = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    err = Console(stderr=True)
    found: list[Found] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for search in SEARCHES:
                begin = time.monotonic()
                home = Home.from_environment({"DP_SWEEPS_HOME": f"{folder}/{search}-{seed}"})
                home.create()
                found.append(searched(search, seed, home))
                secs = time.monotonic() - begin
                err.print(f"{search}, seed {seed}: {found[-1].best[-1]:.4f} ({secs:.0f} s)")
    Console().print(_table(found))
    if given.save:
        path = _HERE / "results" / f"searches-{datetime.date.today()}.json"
        rows = [dataclasses.asdict(each) for each in found]
        path.write_text(json.dumps({"spec": SPEC, "found": rows}, indent=1) + "\n")


def _table(found: list[Found]) -> Table:
    counts = (10, 20, TRIALS)
    table = Table(title=f"best accuracy at epsilon 1, {TRIALS} trials: mean (std) over seeds")
    for name in ("search", *(f"after {count}" for count in counts), "better than random"):
        table.add_column(name)

    def bests(search: str, count: int) -> list[float]:
        return [each.best[count - 1] for each in found if each.search == search]

    random = bests("random", TRIALS)
    for search in SEARCHES:
        cells = []
        for count in counts:
            values = bests(search, count)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.4f} ({spread:.4f})")
        gains = [a - b for a, b in zip(bests(search, TRIALS), random, strict=True)]
        verdict = ""
        if search != "random" and len(gains) > 1 and any(gains):
            tested: Any = scipy.stats.wilcoxon(gains, alternative="greater")
            wins = sum(gain > 0 for gain in gains)
            verdict = (
                f"by {statistics.mean(gains):+.4f}, {wins} of {len(gains)} (p {tested.pvalue:.3f})"
            )
        table.add_row(search, *cells, verdict)
    return table


if __name__ == "__main__":
    main()
