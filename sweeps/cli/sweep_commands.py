"""The commands about sweeps: check, run, list, show, sync, schema.

A terminal gets a live view of a running sweep, anything else plain lines.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sweeps.cli.driving import existing_store, print_places
from sweeps.cli.options import (
    LOCAL,
    AddressOption,
    DetachOption,
    JsonOption,
    SpecArgument,
    check_detach,
    complete_sweep_id,
)
from sweeps.cli.output import ExitCode, out, print_json, print_line, progress, reckoning
from sweeps.home import Home

if TYPE_CHECKING:
    from sweeps.admission import Plan

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
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Foresee time and disk from a few steps on random data, here and now, instead of "
            "from earlier trials. No example of the data set is read; no budget is charged.",
        ),
    ] = False,
) -> None:
    """Say what every configuration would cost, and which are admitted. Trains nothing.

    Also how long the sweep will take, and how much disk, as far as earlier trials of the same
    shapes tell; --calibrate measures it.

    Example: dp-sweeps check specs/digits.yaml --calibrate
    """
    from sweeps.forecast.calibration import chosen
    from sweeps.forecast.reckoning import forecast
    from sweeps.report.documents import plan_json
    from sweeps.report.plan_view import plan_view

    home = Home.from_environment()
    plan = _plan(spec, home)
    with progress("calibrating", len(chosen(plan))) as on_progress:
        foreseen = forecast(plan, home, calibrated=calibrate, on_trial=lambda: on_progress(1))
    if as_json:
        print_json(plan_json(plan, foreseen))
    else:
        out.print(plan_view(plan, foreseen, max_rows=None if every else _MAX_ROWS))
    raise typer.Exit(ExitCode.OK if plan.admitted else ExitCode.NOTHING_ADMITTED)


def run(
    spec: SpecArgument,
    as_json: JsonOption = False,
    address: AddressOption = LOCAL,
    detach: DetachOption = False,
) -> None:
    """Run a sweep: admit, train, track, report.

    Example: dp-sweeps run specs/digits.yaml
    """
    from sweeps.admission import prepare_dataset
    from sweeps.cli.driving import drive_here
    from sweeps.database.store import open_store
    from sweeps.service import record

    check_detach(detach, address)
    home = Home.from_environment()
    plan = _plan(spec, home)
    home.create()
    prepare_dataset(plan.spec, home.data_dir)
    store = open_store(home)
    where = address if plan.admitted or plan.proposed_later else None
    drive_here(
        lambda: record(plan, store), plan.spec, store, home, where, as_json=as_json, detach=detach
    )


def list_sweeps(as_json: JsonOption = False) -> None:
    """List the sweeps in the ledger, newest first.

    Example: dp-sweeps list --json
    """
    rows = [
        {"sweep_id": row.sweep_id, "state": row.state, "mlflow_run_id": row.mlflow_run_id}
        for row in existing_store(Home.from_environment()).sweeps()
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
    from sweeps.choosing import results_of
    from sweeps.report.documents import results_json
    from sweeps.report.files import report_files
    from sweeps.report.table import results_table

    home = Home.from_environment()
    results = results_of(existing_store(home), sweep_id)
    report = report_files(home, results.sweep_id)
    if as_json:
        print_json(results_json(results, report=report))
    else:
        out.print(results_table(results))
        print_places(results, report, home)


def sync() -> None:
    """Deliver to MLflow what it has yet to get, after an outage.

    Example: dp-sweeps sync
    """
    from sweeps.tracking.mlflow_writer import MlflowWriter

    home = Home.from_environment()
    store = existing_store(home)
    pending = store.outbox.count_undelivered()
    with progress("delivering to MLflow", pending) as on_delivered:
        count = MlflowWriter(store, home).deliver(on_delivered)
    out.print(f"delivered {count} messages")


def schema() -> None:
    """Print the JSON Schema of a specification.

    Example: dp-sweeps schema > schema.json
    """
    from sweeps.spec.sweep_spec import json_schema

    print_json(json_schema())


def _plan(path: Path, home: Home) -> "Plan":
    """Decides on a specification, with a progress bar on a terminal."""
    from sweeps.service import make_plan

    with reckoning() as on_spec:
        return make_plan(path, home, on_spec)
