"""Driving a sweep from the command line: what is seen meanwhile, and what a person may interrupt.

On a Ray of its own the command is the driver. On a cluster the driver is an actor there, and the
command only watches, by the sweep's rows: it may go, and the sweep goes on.

Ctrl-C once sets the sweep aside: running trials go to their next report, where they have a
checkpoint. Ctrl-C twice ends at once; then trials go on from the checkpoint before. Either way
`dp-sweeps resume` goes on.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sweeps.cli.options import LOCAL
from sweeps.cli.output import ExitCode, err, out, print_json, print_line, print_note
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.home import Home

if TYPE_CHECKING:
    from sweeps.database.store import Store
    from sweeps.report.results import SweepResults
    from sweeps.spec.sweep_spec import SweepSpec
    from sweeps.tracking.outbox import OutboxThread

_LOOK_SECS = 0.5
_PATIENCE_SECS = 5.0
_DELIVERY_SECS = 60.0


def drive_here(
    record: Callable[[], str],
    spec: "SweepSpec",
    store: "Store",
    home: Home,
    address: str | None,
    *,
    as_json: bool,
    detach: bool = False,
) -> None:
    """Runs a sweep, and ends the command with what came of it.

    Args:
        record: Called once Ray is there; gives the sweep's id.
        spec: The sweep.
        store: The database.
        home: State.
        address: Of Ray; None where nothing may run, so that none is needed.
        as_json: Whether one JSON object is printed.
        detach: Whether to end as soon as the sweep has a driver on its cluster.
    """
    if address in (LOCAL, None):
        sweep_id, undelivered = _drive_locally(record, spec, store, home, address)
    else:
        sweep_id = _start_there(record, spec, store, home, address)
        if detach:
            _print_detached(sweep_id, as_json=as_json)
            return
        undelivered = _watch(sweep_id, store)
    _print_results(sweep_id, store, home, undelivered, as_json=as_json)


def _drive_locally(
    record: Callable[[], str], spec: "SweepSpec", store: "Store", home: Home, address: str | None
) -> tuple[str, str]:
    """Drives a sweep in this process; gives its id, and what MLflow has yet to get, in words."""
    from sweeps.driver import drive, driving
    from sweeps.report.live import LiveView
    from sweeps.service import cluster_for

    with _delivering(store, home) as outbox, ExitStack() as stack:
        # Ray prints of dead workers to standard output, which is for answers alone.
        stack.enter_context(redirect_stdout(sys.stderr))
        if address is not None:
            # Tune takes a while to import, and Ray, which is waited for, a while to start.
            threading.Thread(target=import_module, args=("sweeps.tune",), daemon=True).start()
            with err.status("starting Ray"):
                stack.enter_context(cluster_for(spec, home, address))
        sweep_id = record()
        store.reopen(sweep_id)
        stack.enter_context(_interruptible(sweep_id, store))
        stack.enter_context(driving(sweep_id, store, patience_secs=_PATIENCE_SECS))
        with LiveView(store, sweep_id, err):
            drive(sweep_id, store, home)
    left = outbox.remaining
    return sweep_id, f"{left} messages ({outbox.last_error})" if left else ""


@contextmanager
def _delivering(store: "Store", home: Home) -> "Generator[OutboxThread]":
    """Delivers to MLflow beside the sweep; what is left at the end may take a while."""
    from sweeps.tracking.mlflow_writer import MlflowWriter, delivering

    with ExitStack() as stack:
        yield stack.enter_context(delivering(MlflowWriter(store, home)))
        with err.status("delivering to MLflow"):
            stack.close()


def _start_there(
    record: Callable[[], str], spec: "SweepSpec", store: "Store", home: Home, address: str
) -> str:
    """Records a sweep and gives it a driver on a cluster; gives its id."""
    from sweeps.service import cluster_for
    from sweeps.standing_driver import stand

    with (
        redirect_stdout(sys.stderr),
        err.status(f"connecting to {address}"),
        cluster_for(spec, home, address),
    ):
        sweep_id = record()
        store.reopen(sweep_id)
        stand(sweep_id)
    return sweep_id


def _watch(sweep_id: str, store: "Store") -> str:
    """Watches a sweep that is driven elsewhere to its end; gives what MLflow has yet to get."""
    from sweeps.report.live import LiveView
    from sweeps.watching import wait_for_end

    with _interruptible(sweep_id, store, now=lambda: store.set_wish(sweep_id, Wish.INTERRUPT)):
        with LiveView(store, sweep_id, err):
            wait_for_end(sweep_id, store)
        with err.status("delivering to MLflow"):
            deadline = time.monotonic() + _DELIVERY_SECS
            while (left := store.outbox.count_undelivered()) and time.monotonic() < deadline:
                time.sleep(_LOOK_SECS)
    return f"{left} messages" if left else ""


def _print_detached(sweep_id: str, *, as_json: bool) -> None:
    if as_json:
        print_json({"sweep_id": sweep_id, "state": SweepState.RUNNING})
    else:
        print_line(f"{sweep_id} runs on its cluster; `dp-sweeps watch {sweep_id}` shows it")


def _print_results(
    sweep_id: str, store: "Store", home: Home, undelivered: str, *, as_json: bool
) -> None:
    from sweeps.choosing import results_of
    from sweeps.report.documents import results_json
    from sweeps.report.files import report_files
    from sweeps.report.table import results_table

    results = results_of(store, sweep_id)
    report = report_files(home, sweep_id)
    if as_json:
        print_json(results_json(results, report=report))
    else:
        out.print(results_table(results))
        print_places(results, report, home)
    if undelivered:
        print_note(
            f"MLflow has yet to get {undelivered}; they are kept, and `dp-sweeps sync` delivers "
            "them"
        )
    if reason := store.sweep(sweep_id).reason:
        print_note(f"{sweep_id}: {reason}")
    if results.state is SweepState.PAUSED:
        print_note(f"paused; `dp-sweeps resume {sweep_id}` goes on")
    raise typer.Exit(exit_code(results))


@contextmanager
def _interruptible(
    sweep_id: str, store: "Store", now: Callable[[], None] | None = None
) -> Generator[None]:
    """The first interrupt asks the sweep to pause; the second calls ``now``.

    Without it, the second is a KeyboardInterrupt.
    """
    asked = False

    def on_signal(_number: int, _frame: object) -> None:
        nonlocal asked
        if not asked:
            asked = True
            _in_thread(lambda: store.set_wish(sweep_id, Wish.PAUSE))
            print_note("finishing checkpoints; interrupt again to end now")
        elif now is not None:
            _in_thread(now)
        else:
            raise KeyboardInterrupt

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


def _in_thread(request: Callable[[], None]) -> None:
    """Asks the database aside: the signal may have come in the middle of a transaction."""

    def ask() -> None:
        with suppress(Exception):
            request()

    threading.Thread(target=ask, daemon=True).start()


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
