"""The command that holds a sweep's records to each other: verify."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from sweeps.cli.life_commands import SweepArgument
from sweeps.cli.options import JsonOption
from sweeps.cli.output import ExitCode, out, print_json, print_line, print_note, progress
from sweeps.home import Home

if TYPE_CHECKING:
    from sweeps.verification import Verification

_MAX_SHOWN = 200


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(verify)


def verify(
    sweep: SweepArgument = None,
    no_mlflow: Annotated[bool, typer.Option("--no-mlflow", help="Leave MLflow out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Hold steps, charges, reports, checkpoints, ledger and MLflow to each other, trial by trial.

    Example: dp-sweeps verify
    """
    from sweeps.choosing import sweep_id_of
    from sweeps.database.store import Store
    from sweeps.database.tables import existing_ledger
    from sweeps.verification import verify as verify_sweep

    home = Home.from_environment()
    store = Store(existing_ledger(home, check=False))
    sweep_id = sweep_id_of(store, sweep)
    total = len(store.trials(sweep_id)) * (1 if no_mlflow else 2)
    with progress("verifying trials", total) as on_progress:
        found = verify_sweep(
            store,
            home,
            sweep_id,
            with_mlflow=not no_mlflow,
            on_trial=lambda: on_progress(1),
        )
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    raise typer.Exit(ExitCode.OK if found.ok else ExitCode.FAILED)


def _show(found: "Verification") -> None:
    if found.differences:
        out.print(_table(found))
    if len(found.differences) > _MAX_SHOWN:
        hidden = len(found.differences) - _MAX_SHOWN
        print_note(f"... and {hidden:,} more; `--json` lists all")
    print_line(
        f"{found.sweep_id}: {found.trials:,} trials, {found.reports:,} reports, "
        f"{found.checkpoints:,} checkpoints, {found.ledger_entries:,} entries of the ledger"
    )
    if found.elsewhere:
        print_note(f"checkpoints: {found.elsewhere:,} lie behind a URL and were not read")
    if found.mlflow_problem:
        print_line(f"MLflow: not checked: {found.mlflow_problem}", style="red")
    elif not found.mlflow_checked:
        print_line("MLflow: left out")
    if found.undelivered:
        print_note(
            f"MLflow has yet to get {found.undelivered:,} messages; `dp-sweeps sync` delivers them"
        )
    count = len(found.differences)
    if count:
        print_line(f"{count:,} difference{'' if count == 1 else 's'}", style="bold red")
    elif found.ok:
        print_line("all of it agrees")


def _table(found: "Verification") -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in ("trial", "what", "expected", "found"):
        table.add_column(heading, overflow="fold")
    for one in found.differences[:_MAX_SHOWN]:
        cells = (one.trial_id, one.what, one.expected, one.found)
        table.add_row(*(Text("-" if cell is None else str(cell)) for cell in cells))
    return table
