"""The commands about the ledger's journal: show, verify, export.

They work on a damaged ledger, too, and say what is wrong with it.
"""

import json
import os
import re
import secrets
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from sweeps.cli.options import BudgetOption, JsonOption
from sweeps.cli.output import ExitCode, err, out, print_json, print_line, print_note
from sweeps.errors import CommandError
from sweeps.home import Home

if TYPE_CHECKING:
    from accounting import Head, Ledger

app = typer.Typer(
    help="The journal of everything that was decided and spent.\n\n"
    "Example: dp-sweeps ledger verify",
    no_args_is_help=True,
)

_HEAD = re.compile(r"(\d{1,18}):([0-9a-f]{64})")
_MAX_SHOWN = 100_000
_MAX_PROBLEMS = 100


@app.command()
def show(
    budget: BudgetOption = None,
    last: Annotated[
        int, typer.Option(min=1, max=_MAX_SHOWN, help="How many of the newest entries.")
    ] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show the newest entries, one line each; refusals in red. Times are UTC.

    Example: dp-sweeps ledger show --budget scans --last 50
    """
    from sweeps.report.budget_documents import journal_json
    from sweeps.report.journal_view import journal_table, plain_line, row_style

    ledger = _ledger()
    rows = list(ledger.inspect(budget, newest=last))
    if budget is not None and not rows:
        _check_budget(ledger, budget)
    problems = [row.problem for row in rows if row.problem]
    if ledger.damage and ledger.damage not in problems:
        problems.append(ledger.damage)
    if as_json:
        print_json(journal_json(rows, problems))
    elif out.is_terminal:
        out.print(journal_table(rows, with_budget=budget is None))
    else:
        for row in rows:
            print_line(plain_line(row, with_budget=budget is None), style=row_style(row))
    _end(problems)


@app.command()
def verify(
    head: Annotated[
        str | None,
        typer.Option(metavar="SEQ:HASH", help="An end of the journal that was noted before."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Work out every row from the journal and say what differs: any edit, deletion or rollback.

    Example: dp-sweeps ledger verify --head "$(cat noted-head)"
    """
    from sweeps.report.budget_documents import verification_json

    expected = None if head is None else _parse_head(head)
    ledger = _ledger()
    with err.status("verifying the ledger"):
        found = ledger.verify(expected=expected)
    if as_json:
        print_json(verification_json(found))
        raise typer.Exit(ExitCode.OK if found.ok else ExitCode.FAILED)
    for problem in found.problems:
        print_line(problem, style="red")
    entries = f"{found.entries:,} {'entry' if found.entries == 1 else 'entries'}"
    if found.ok:
        print_line(f"{entries}; every one follows from the one before, and every row from them")
        print_line(f"head     {found.head}")
        print_line("         note this line elsewhere: `ledger verify --head` will hold to it")
    else:
        number = f"{len(found.problems)} problem{'' if len(found.problems) == 1 else 's'}"
        print_line(f"{number}; the first {entries} follow from each other", style="bold red")
        print_line(f"head     {found.head}, the last of those")
    witness = "none" if found.witness is None else str(found.witness)
    print_line(f"witness  {witness}{_agreement(found.witness, found.head) if found.ok else ''}")
    raise typer.Exit(ExitCode.OK if found.ok else ExitCode.FAILED)


def _agreement(witness: "Head | None", head: "Head") -> str:
    if witness is None:
        return ""
    return ", the same" if witness == head else ", which the journal holds"


@app.command()
def export(
    budget: BudgetOption = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to; else standard output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write the journal as JSON Lines, oldest entry first.

    Example: dp-sweeps ledger export --output journal.jsonl
    """
    from sweeps.report.budget_documents import entry_json

    ledger = _ledger()
    if budget is not None:
        _check_budget(ledger, budget)
    problems: list[str] = []
    with _target(output, force) as file:
        for row in ledger.inspect(budget):
            if row.problem:
                problems.append(row.problem)
            file.write(json.dumps(entry_json(row), separators=(",", ":"), allow_nan=False) + "\n")
    if ledger.damage and ledger.damage not in problems:
        problems.append(ledger.damage)
    _end(problems)


@contextmanager
def _target(output: Path | None, force: bool) -> Generator[IO[str]]:
    """Standard output, or a file that is there in full or not at all."""
    if output is None:
        yield sys.stdout
        return
    if output.exists() and not force:
        raise CommandError(f"--output {str(output)!r}: is there already; --force replaces it")
    partial = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        with open(partial, "x", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, output)
    except OSError as error:
        raise CommandError(f"--output {str(output)!r}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _parse_head(text: str) -> "Head":
    from accounting import Head

    matched = _HEAD.fullmatch(text.strip())
    if matched is None:
        raise CommandError(
            f"--head {text!r}: allowed is SEQ:HASH, a number and 64 hexadecimal digits, as "
            "`dp-sweeps ledger verify` prints it"
        )
    return Head(int(matched[1]), matched[2])


def _ledger() -> "Ledger":
    from sweeps.database.tables import existing_ledger

    return existing_ledger(Home.from_environment(), check=False)


def _check_budget(ledger: "Ledger", name: str) -> None:
    """Checks that there is a budget, or an entry that speaks of one.

    Raises:
        CommandError: There is neither.
    """
    if any(known.name == name for known in ledger.budgets()):
        return
    for _ in ledger.inspect(name, newest=1):
        return
    raise CommandError(f"budget {name!r}: not in the ledger; see `dp-sweeps budget list`")


def _end(problems: "list[str]") -> None:
    """Says what is wrong, and ends with exit code 1 if anything is."""
    for problem in problems[:_MAX_PROBLEMS]:
        print_note(problem, style="red")
    if problems:
        print_note("the ledger is not what was written; `dp-sweeps ledger verify` says more")
        raise typer.Exit(ExitCode.FAILED)
