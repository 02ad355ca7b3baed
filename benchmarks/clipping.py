"""How fast and how large clipped gradients are, beside a plain gradient and beside Opacus.

    python benchmarks/clipping.py                      # every model, many minutes
    python benchmarks/clipping.py --model mlp --model wrn_16_4
    python benchmarks/clipping.py --save               # also writes benchmarks/results/

One table: for every model and engine the time of a call, of compilation, and the temporary
memory, each also as a multiple of the same model's plain, non-private gradient, measured in the
same process. PyTorch and Opacus take their turns in between where they are installed.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A script's own folder comes first on its path, and a file in it is called as a room is. The
# folder above takes its place, so that this folder's files are `benchmarks.…`.
_HERE = Path(__file__).resolve().parent
sys.path = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

# PyTorch must find room on a GPU, too, and on a busy CPU its threads must not spin while they
# wait for each other, or it would look several times slower than it is.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import clipping_engines as engines
from benchmarks import clipping_report as report
from benchmarks.clipping_models import CASES, Case, Problem, make_problem
from benchmarks.clipping_rows import Row, compare, take_turns

Tell = Callable[[str], None]
Calls = dict[str, Callable[[], Any]]

PEERS_MISSING = "Without PyTorch and Opacus: pip install -e '.[benchmarks]' adds them."
_FILE_WIDTH = 240
SLOWEST = 60.0  # times the plain gradient; slower engines are called once


def measure(case: Case, rounds: int, budget: float, peers: bool, tell: Tell) -> list[Row]:
    """Every engine on one model, the plain gradient first."""
    problem = make_problem(case)
    programs = _compiled(case, problem, tell)
    engines.first_calls(programs, problem, SLOWEST, tell)
    engines.compare_memory(programs)
    _compare_results([(p.row, p.result) for p in programs], "vmap", engines.leaves)
    calls: Calls = {
        f"jax {p.row.engine}": p.call(problem, case.batch_size) for p in programs if p.compiled
    }
    rows = [program.row for program in programs]
    if peers:
        peer_rows, peer_calls = _peers(case, problem, tell)
        rows += peer_rows
        calls |= peer_calls
    for name, seconds in take_turns(calls, rounds, budget, tell).items():
        _row_called(rows, name).seconds = seconds
    for row in rows:
        compare(row, _row_called(rows, f"{row.library} plain"))
    return rows


def _compiled(case: Case, problem: Problem, tell: Tell) -> list[engines.Program]:
    found: list[engines.Program] = []
    for engine, function in engines.functions(problem).items():
        tell(f"compiling {engine}")
        found.append(engines.compile_program(case, problem, engine, function))
    return found


def _peers(case: Case, problem: Problem, tell: Tell) -> tuple[list[Row], Calls]:
    """Opacus and PyTorch's plain gradient, warmed up."""
    from benchmarks import clipping_torch

    inputs, labels = (np.asarray(array) for array in problem.batch(case.batch_size))
    on_gpu = jax.default_backend() == "gpu"
    made = clipping_torch.make_calls(case.name, inputs, labels, on_gpu)
    rows: list[Row] = []
    results: list[tuple[Row, Any]] = []
    calls: Calls = {}
    for engine, call in made.items():
        tell(f"torch {engine}")
        row = Row(case.name, "torch", engine, case.batch_size)
        rows.append(row)
        try:
            results.append((row, call()))
        except RuntimeError as error:  # out of memory, or a layer that Opacus cannot take
            row.note = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            continue
        calls[f"torch {engine}"] = call
    _compare_results(results, "opacus_hooks", clipping_torch.as_arrays)
    return rows, calls


def _compare_results(
    results: Sequence[tuple[Row, Any]], reference: str, arrays: Callable[[Any], list[np.ndarray]]
) -> None:
    """Fills in how far each result is from one engine's; the plain gradient is another thing."""
    wanted = next((r for row, r in results if row.engine == reference and r is not None), None)
    if wanted is None:
        return
    expected = np.concatenate([array.ravel() for array in arrays(wanted)])
    for row, result in results:
        if result is not None and row.engine not in ("plain", reference):
            got = np.concatenate([array.ravel() for array in arrays(result)])
            row.distance = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _row_called(rows: Sequence[Row], name: str) -> Row:
    return next(row for row in rows if f"{row.library} {row.engine}" == name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument(
        "--model", choices=CASES, action="append", help="measure this model; repeatable"
    )
    parser.add_argument("--repeat", type=int, default=7, help="rounds (default 7)")
    parser.add_argument(
        "--budget",
        type=float,
        default=30.0,
        help="seconds for one engine's timed calls on one model (default 30)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--save", action="store_true", help="write benchmarks/results/clipping-<device>-<date>"
    )
    return parser.parse_args()


def main() -> int:
    """Measures, prints and, if asked to, saves."""
    arguments = _arguments()
    progress = Console(stderr=True)
    peers = all(importlib.util.find_spec(name) for name in ("torch", "opacus"))
    versions: dict[str, str] = {}
    if peers:
        from benchmarks.clipping_torch import VERSIONS

        versions = VERSIONS
    else:
        progress.print(PEERS_MISSING, markup=False)
    about = report.environment(versions)
    cases = [CASES[name] for name in arguments.model or CASES if arguments.model or _usual(name)]
    rows = _measure_all(cases, arguments, peers, progress)
    _print(rows, about, arguments.json)
    if arguments.save:
        for path in report.save(rows, about, _HERE / "results"):
            progress.print(f"written: {path}")
    return 0


def _measure_all(
    cases: Sequence[Case], arguments: argparse.Namespace, peers: bool, console: Console
) -> list[Row]:
    """One model after the other, telling how far it is; what there is when interrupted."""
    rows: list[Row] = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        for number, case in enumerate(cases, start=1):
            task = bar.add_task(case.name)

            def tell(what: str, task: Any = task, number: int = number, case: Case = case) -> None:
                bar.update(task, description=f"{number}/{len(cases)} {case.name}: {what}")

            try:
                rows += measure(case, arguments.repeat, arguments.budget, peers, tell)
            except KeyboardInterrupt:
                console.print(f"interrupted: {case.name} and what follows is missing")
                break
            bar.remove_task(task)
            jax.clear_caches()
    return rows


def _print(rows: Sequence[Row], about: dict[str, Any], json: bool) -> None:
    if json:
        sys.stdout.write(report.as_json(rows, about))
        return
    # A file or a pipe has room for the whole table.
    console = Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH)
    console.print(report.table(rows))
    for note in report.NOTES:
        console.print(note)


def _usual(name: str) -> bool:
    return not CASES[name].opt_in


if __name__ == "__main__":
    sys.exit(main())
