"""One line that says how far a sweep is, written over itself."""

import sys
from collections.abc import Callable
from typing import TextIO

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.report.results import SweepResults, read_results
from sweeps.report.table import show_accuracy, show_epsilon


def progress_line(results: SweepResults) -> str:
    """How far a sweep is."""
    counted = [trial for trial in results.trials if trial.state is not TrialState.REJECTED]
    ended = sum(trial.state.is_finished for trial in counted)
    words = f"{results.sweep_id}: {ended} of {len(counted)} trials ended"
    if running := results.count(TrialState.RUNNING):
        words += f", {running} running"
    if (best := results.best) is not None:
        accuracy, epsilon = show_accuracy(best.eval_accuracy), show_epsilon(best.epsilon)
        words += f"; best {accuracy} at ε {epsilon}"
    return words


def text_progress(sweep_id: str, store: Store, stream: TextIO | None = None) -> Callable[[], None]:
    """What writes the line on standard error whenever it is called and it has changed."""
    out = sys.stderr if stream is None else stream
    last = ""

    def show() -> None:
        nonlocal last
        results = read_results(store, sweep_id)
        line = progress_line(results)
        if line != last:
            out.write(f"\r{line.ljust(len(last))}")
            last = line
        if results.state != "RUNNING":
            out.write("\n")
        out.flush()

    return show
