"""Driving a sweep from the command line: what is seen meanwhile, and what a person may interrupt.

Ctrl-C once sets the sweep aside: running trials go to their next report, where they have a
checkpoint. Ctrl-C twice ends at once; then trials go on from the checkpoint before. Either way
`dp-sweeps resume` goes on.
"""

import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sweeps.cli.output import ExitCode, err, out, print_json, print_line, print_note
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.home import Home

if TYPE_CHECKING:
    from sweeps.database.store import Store
    from sweeps.report.results import SweepResults
    from sweeps.spec.sweep_spec import SweepSpec
    from sweeps.tracking.outbox import OutboxThread


def drive_here(
    record: Callable[[], str],
    spec: "SweepSpec",
    store: "Store",
    home: Home,
    address: str | None,
    *,
    as_json: bool,
) -> None:
    """Runs a sweep with this process as its driver, and ends the command with what came of it.

    Args:
        record: Called once Ray is there; gives the sweep's id.
        spec: The sweep.
        store: The database.
        home: State.
        address: Of Ray; None where nothing may run, so that none is needed.
        as_json: Whether one JSON object is printed.
    """
    from sweeps.driver import drive
    from sweeps.report.documents import results_json
    from sweeps.report.files import report_files
    from sweeps.report.live import LiveView
    from sweeps.report.table import results_table
    from sweeps.service import cluster_for, results_of

    with _delivering(store, home) as outbox, ExitStack() as stack:
        # Ray prints of dead workers to standard output, which is for answers alone.
        stack.enter_context(redirect_stdout(sys.stderr))
        if address is not None:
            with err.status("starting Ray" if address == "local" else f"connecting to {address}"):
                stack.enter_context(cluster_for(spec, home, address))
        sweep_id = record()
        stack.enter_context(_interruptible(sweep_id, store))
        with LiveView(store, sweep_id, err):
            drive(sweep_id, store, home)
    results = results_of(store, sweep_id)
    report = report_files(home, sweep_id)
    if as_json:
        print_json(results_json(results, report=report))
    else:
        out.print(results_table(results))
        print_places(results, report, home)
    if outbox.remaining:
        print_note(
            f"MLflow has yet to get {outbox.remaining} messages ({outbox.last_error}); they are "
            "kept, and `dp-sweeps sync` delivers them"
        )
    if results.state is SweepState.PAUSED:
        print_note(f"paused; `dp-sweeps resume {sweep_id}` goes on")
    raise typer.Exit(exit_code(results))


@contextmanager
def _interruptible(sweep_id: str, store: "Store") -> Generator[None]:
    """The first interrupt asks the sweep to pause; the second is a KeyboardInterrupt."""
    asked = False

    def on_signal(_number: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # In a thread: the signal may have come in the middle of a transaction of this one.
        threading.Thread(target=_ask_to_pause, args=(sweep_id, store), daemon=True).start()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    except KeyboardInterrupt:
        print_note(f"interrupted; `dp-sweeps resume {sweep_id}` goes on")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_pause(sweep_id: str, store: "Store") -> None:
    with suppress(Exception):
        store.set_wish(sweep_id, Wish.PAUSE)
    print_note("finishing checkpoints; interrupt again to end now")


@contextmanager
def _delivering(store: "Store", home: Home) -> "Generator[OutboxThread]":
    """Delivers to MLflow beside the sweep; what is left at the end may take a while."""
    from sweeps.tracking.mlflow_writer import MlflowWriter, delivering

    with ExitStack() as stack:
        yield stack.enter_context(delivering(MlflowWriter(store, home)))
        with err.status("delivering to MLflow"):
            stack.close()


def exit_code(results: "SweepResults") -> ExitCode:
    """How a command about a sweep ends."""
    if results.state in (SweepState.CANCELLED, SweepState.PAUSED):
        return ExitCode.INTERRUPTED
    if results.count(TrialState.FAILED):
        return ExitCode.FAILED
    if results.count(TrialState.REJECTED) == len(results.trials):
        return ExitCode.NOTHING_ADMITTED
    return ExitCode.OK


def print_places(results: "SweepResults", report: Mapping[str, Any], home: Home) -> None:
    """Says where everything is and how to open it, one line each."""
    lines = [""]
    if results.mlflow_run_id:
        lines.append(
            f"MLflow   run {results.mlflow_run_id}; open: mlflow ui --backend-store-uri "
            f"{home.mlflow_uri}"
            if home.uses_local_mlflow
            else f"MLflow   run {results.mlflow_run_id}; open: {home.mlflow_uri}"
        )
    if "png" in report:
        html = Path(report["html"]).name
        lines.append(f"picture  {report['png']}; open in a browser: {html} beside it")
    where = home.database_url.render_as_string(hide_password=True)
    lines.append(f"ledger   {where}; open: dp-sweeps show {results.sweep_id}")
    for line in lines:
        print_line(line)


def existing_store(home: Home) -> "Store":
    """The store of a home that has one: looking at nothing must not create anything.

    Raises:
        StoreError: If there is no ledger yet.
    """
    from sweeps.database.store import Store
    from sweeps.database.tables import existing_ledger

    return Store(existing_ledger(home))
