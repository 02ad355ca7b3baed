"""All commands together, and how they end.

Exit codes: 0 all went well; 1 something failed or was refused: a trial, Ray, the database, MLflow,
a budget in a state that does not allow it, a ledger that is not what was written; 2 the
specification or the command line is not allowed (nothing was started or written); 3 no trial was
admitted; 130 interrupted.
"""

import sys
from typing import NoReturn

import typer

from accounting import AccountingError, InvalidPrivacyParameter, LedgerTampered
from sweeps.cli import (
    budget_commands,
    data_commands,
    fork_command,
    ledger_commands,
    life_commands,
    sweep_commands,
    verify_command,
)
from sweeps.cli.output import ExitCode, print_note
from sweeps.errors import SweepError

_EXAMPLES = """

Examples:

    dp-sweeps check specs/digits.yaml
    dp-sweeps run specs/digits.yaml
    dp-sweeps show
    dp-sweeps budget create scans --from specs/digits.yaml --policy open
"""

app = typer.Typer(
    name="dp-sweeps",
    help="Hyperparameter sweeps for DP-SGD that keep to a privacy budget." + _EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="State lives under DP_SWEEPS_HOME (default ~/.dp-sweeps). Exit codes: 0 well, "
    "1 something failed or was refused, 2 bad input, 3 nothing admitted, 130 interrupted.",
)
sweep_commands.add_to(app)
life_commands.add_to(app)
fork_command.add_to(app)
verify_command.add_to(app)
app.add_typer(budget_commands.app, name="budget")
app.add_typer(data_commands.app, name="data")
app.add_typer(ledger_commands.app, name="ledger")


def main() -> NoReturn:
    """Runs the command line and exits."""
    try:
        app()
        code = ExitCode.OK
    except (SweepError, AccountingError) as error:
        code = _exit_code(error)
        hint = "; `dp-sweeps ledger verify` says more" * isinstance(error, LedgerTampered)
        print_note(f"{error}{hint}", style="red")
    except KeyboardInterrupt:
        print_note("interrupted")
        code = ExitCode.INTERRUPTED
    sys.exit(code)


def _exit_code(error: SweepError | AccountingError) -> int:
    if isinstance(error, SweepError):
        return error.exit_code
    return ExitCode.BAD_INPUT if isinstance(error, InvalidPrivacyParameter) else ExitCode.FAILED
