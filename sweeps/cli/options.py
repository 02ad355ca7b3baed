"""What commands share on the way in: options, tab completion, and who asks."""

from pathlib import Path
from typing import Annotated

import typer

from sweeps.errors import CommandError
from sweeps.home import Home

LOCAL = "local"
_COMPLETED_SWEEPS = 10

SpecArgument = Annotated[
    Path, typer.Argument(metavar="SPEC", help="The sweep's specification, a YAML file.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of a table.")
]

AddressOption = Annotated[
    str,
    typer.Option(envvar="RAY_ADDRESS", help="Ray to run on; `local` starts one on this machine."),
]
DetachOption = Annotated[
    bool,
    typer.Option(
        "--detach", help="With --address: end once the sweep runs there; it goes on by itself."
    ),
]


def check_detach(detach: bool, address: str) -> None:
    """Refuses to leave a sweep to a Ray that ends with its command.

    Raises:
        CommandError: If that is asked.
    """
    if detach and address == LOCAL:
        raise CommandError("--detach: allowed with the --address of a cluster that stays")


def complete_sweep_id(incomplete: str) -> list[str]:
    """Ids of sweeps that begin so; none where there is no ledger."""
    from sweeps.database.store import Store
    from sweeps.database.tables import existing_ledger

    try:
        rows = Store(existing_ledger(Home.from_environment())).sweeps()
    except Exception:  # A completion that fails must not disturb the line that is being typed.
        return []
    return [row.sweep_id for row in rows if row.sweep_id.startswith(incomplete)]


def complete_trial_id(incomplete: str) -> list[str]:
    """Ids of trials of the newest sweeps that begin so; none where there is no ledger."""
    from sweeps.database.store import Store
    from sweeps.database.tables import existing_ledger

    try:
        store = Store(existing_ledger(Home.from_environment()))
        newest = store.sweeps()[:_COMPLETED_SWEEPS]
        ids = [row.trial_id for sweep in newest for row in store.trials(sweep.sweep_id)]
    except Exception:  # As above.
        return []
    return [trial_id for trial_id in ids if trial_id.startswith(incomplete)]


def complete_budget(incomplete: str) -> list[str]:
    """Names of budgets that begin so; none where there is no ledger."""
    from sweeps.database.tables import existing_ledger

    try:
        budgets = existing_ledger(Home.from_environment(), check=False).budgets()
    except Exception:  # As above.
        return []
    return [budget.name for budget in budgets if budget.name.startswith(incomplete)]


BudgetArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The budget's name.", autocompletion=complete_budget),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="NAME",
        help="Of one budget alone.",
        autocompletion=complete_budget,
    ),
]


def parse_share(text: str) -> float:
    """A share as a person writes it: ``0.4`` or ``40%``.

    Raises:
        CommandError: It is neither, or not from 0 to 1.
    """
    percent = text.strip().endswith("%")
    try:
        number = float(text.strip().removesuffix("%"))
    except ValueError:
        number = float("nan")
    share = number / 100 if percent else number
    if not 0 <= share <= 1:
        raise CommandError(f"--share {text!r}: allowed is a number from 0 to 1, or 0% to 100%")
    return share
