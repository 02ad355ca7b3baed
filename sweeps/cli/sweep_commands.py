"""The commands about sweeps: check, run, list, show, sync, schema.

A terminal gets a live view of a running sweep, anything else plain lines.
"""

import signal
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweeps.cli.options import JsonOption, SpecArgument, complete_sweep_id
from sweeps.cli.output import ExitCode, err, out, print_json, print_line, print_note, reckoning
from sweeps.database.states import SweepState, TrialState
from sweeps.home import Home

if TYPE_CHECKING:
    from sweeps.admission import Plan
    from sweeps.database.store import Store
    from sweeps.report.results import SweepResults
    from sweeps.spec.sweep_spec import SweepSpec
    from sweeps.tracking.outbox import OutboxThread

_MAX_ROWS = 200


def add_to(app: typer.Typer) -> None:
    """Adds the commands, in the order in which the help lists them."""
    for command in (check, run):
        app.command()(command)
    app.command("list")(list_sweeps)
    for command in (show, sync, schema):
        app.command()(command)


def check(
    spec: SpecArgument,
    as_json: JsonOption = False,
    every: Annotated[
        bool, typer.Option("--all", help=f"Show every row, not the first {_MAX_ROWS} alone.")
    ] = False,
) -> None:
    """Say what every configuration would cost, and which are admitted. Trains nothing.

    Example: dp-sweeps check specs/digits.yaml --json
    """
    from sweeps.report.documents import plan_json
    from sweeps.report.plan_view import plan_view

    plan = _plan(spec, Home.from_environment())
    if as_json:
        print_json(plan_json(plan))
    else:
        out.print(plan_view(plan, max_rows=None if every else _MAX_ROWS))
    raise typer.Exit(ExitCode.OK if plan.admitted else ExitCode.NOTHING_ADMITTED)


def run(
    spec: SpecArgument,
    as_json: JsonOption = False,
    address: Annotated[
        str,
        typer.Option(
            envvar="RAY_ADDRESS", help="Ray to run on; `local` starts one on this machine."
        ),
    ] = "local",
) -> None:
    """Run a sweep: admit, train, track, report.

    Example: dp-sweeps run specs/digits.yaml
    """
    from sweeps.admission import prepare_dataset
    from sweeps.database.store import open_store
    from sweeps.report.documents import results_json
    from sweeps.report.table import results_table
    from sweeps.service import finish, results_of, runnable

    signal.signal(signal.SIGTERM, _interrupt)
    home = Home.from_environment()
    plan = _plan(spec, home, runnable)
    home.create()
    prepare_dataset(plan.spec, home.data_dir)
    store = open_store(home)
    with _delivering(store, home) as outbox:
        sweep_id, state = _train(plan, store, home, address)
        report = finish(sweep_id, state, store, home)
    results = results_of(store, sweep_id)
    if as_json:
        print_json(results_json(results, report=report))
    else:
        out.print(results_table(results))
        _print_places(results, report, home)
    if outbox.remaining:
        print_note(
            f"MLflow has yet to get {outbox.remaining} messages ({outbox.last_error}); they are "
            "kept, and `dp-sweeps sync` delivers them"
        )
    raise typer.Exit(_exit_code(results))


def list_sweeps(as_json: JsonOption = False) -> None:
    """List the sweeps in the ledger, newest first.

    Example: dp-sweeps list --json
    """
    rows = [
        {"sweep_id": row.sweep_id, "state": row.state, "mlflow_run_id": row.mlflow_run_id}
        for row in _store(Home.from_environment()).sweeps()
    ]
    if as_json:
        print_json({"sweeps": rows})
        return
    for row in rows:
        print_line(f"{row['sweep_id']}  {row['state']}")


def show(
    sweep_id: Annotated[
        str | None,
        typer.Argument(
            help="A sweep's id; the newest sweep without one.", autocompletion=complete_sweep_id
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a sweep as the ledger has it.

    Example: dp-sweeps show digits-20250131-120000-1a2b
    """
    from sweeps.report.documents import results_json
    from sweeps.report.table import results_table
    from sweeps.service import report_files, results_of

    home = Home.from_environment()
    results = results_of(_store(home), sweep_id)
    report = report_files(home, results.sweep_id)
    if as_json:
        print_json(results_json(results, report=report))
    else:
        out.print(results_table(results))
        _print_places(results, report, home)


def sync() -> None:
    """Deliver to MLflow what it has yet to get, after an outage.

    Example: dp-sweeps sync
    """
    from sweeps.tracking.mlflow_writer import MlflowWriter

    home = Home.from_environment()
    count = MlflowWriter(_store(home), home).deliver()
    out.print(f"delivered {count} messages")


def schema() -> None:
    """Print the JSON Schema of a specification.

    Example: dp-sweeps schema > schema.json
    """
    from sweeps.spec.sweep_spec import json_schema

    print_json(json_schema())


def _plan(
    path: Path, home: Home, change: "Callable[[SweepSpec], SweepSpec] | None" = None
) -> "Plan":
    """Decides on a specification, with a progress bar on a terminal."""
    from sweeps.service import make_plan

    with reckoning() as on_spec:
        return make_plan(path, home, on_spec, change=change)


def _train(plan: "Plan", store: "Store", home: Home, address: str) -> tuple[str, SweepState]:
    """Records a plan and runs what it admits; a plan that admits nothing needs no cluster."""
    from sweeps.report.live import LiveView
    from sweeps.service import cluster_for, execute, record

    if not plan.admitted:
        return record(plan, store), SweepState.COMPLETED
    with ExitStack() as stack:
        # Ray prints of dead workers to standard output, which is for answers alone.
        stack.enter_context(redirect_stdout(sys.stderr))
        with err.status("starting Ray" if address == "local" else f"connecting to {address}"):
            stack.enter_context(cluster_for(plan, home, address))
        signal.signal(signal.SIGTERM, _interrupt)  # again: Ray has put its own in place
        sweep_id = record(plan, store)
        with LiveView(store, sweep_id, err):
            return sweep_id, execute(plan, sweep_id, store, home)


@contextmanager
def _delivering(store: "Store", home: Home) -> "Generator[OutboxThread]":
    """Delivers to MLflow beside the sweep; what is left at the end may take a while."""
    from sweeps.tracking.mlflow_writer import MlflowWriter, delivering

    with ExitStack() as stack:
        yield stack.enter_context(delivering(MlflowWriter(store, home)))
        with err.status("delivering to MLflow"):
            stack.close()


def _exit_code(results: "SweepResults") -> ExitCode:
    if results.state is SweepState.CANCELLED:
        return ExitCode.INTERRUPTED
    if results.count(TrialState.FAILED):
        return ExitCode.FAILED
    if results.count(TrialState.REJECTED) == len(results.trials):
        return ExitCode.NOTHING_ADMITTED
    return ExitCode.OK


def _print_places(results: "SweepResults", report: Mapping[str, str], home: Home) -> None:
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


def _store(home: Home) -> "Store":
    """The store of a home that has one: looking at nothing must not create anything.

    Raises:
        StoreError: If there is no ledger yet.
    """
    from sweeps.database.store import Store
    from sweeps.database.tables import existing_ledger

    return Store(existing_ledger(home))


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
