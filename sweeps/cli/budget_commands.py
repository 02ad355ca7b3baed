"""The commands about budgets: create, list, show, grant, freeze, thaw, retire."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accounting import NeighboringRelation, Policy, PrivacyUnit
from sweeps.cli.options import BudgetArgument, JsonOption, parse_share
from sweeps.cli.output import err, out, print_json, print_line, print_note, reckoning
from sweeps.errors import CommandError
from sweeps.home import Home, who

if TYPE_CHECKING:
    from accounting import Budget, Ledger
    from sweeps.report.room import Room

app = typer.Typer(
    help="Budgets that several sweeps and teams share.\n\nExample: dp-sweeps budget list",
    no_args_is_help=True,
)

ReasonOption = Annotated[str, typer.Option(help="Why, for the journal.")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is to be called.")],
    spec: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="SPEC",
            help="Take data set and terms from a sweep's specification; options override it.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME[:VERSION]", help="The protected data set.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="TFDS data directory in which it lies.")
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Split of the protected examples; else train.")
    ] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Split of the public examples; else test.")
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What identifies data that TFDS does not hold."),
    ] = None,
    policy: Annotated[Policy | None, typer.Option(help="What the promise covers.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Largest epsilon; > 0.")] = None,
    delta: Annotated[float | None, typer.Option(help="In [1e-10, 1).")] = None,
    neighboring_relation: Annotated[
        NeighboringRelation | None,
        typer.Option(help="Which data are neighbours; else zero_out."),
    ] = None,
    privacy_unit: Annotated[
        PrivacyUnit | None,
        typer.Option(help="Whose data one neighbour more or less is; else example."),
    ] = None,
    rdp_order: Annotated[
        float | None,
        typer.Option(help="Under open, the order of the Rényi filter; a good one without it."),
    ] = None,
    typical: Annotated[
        Path | None,
        typer.Option(
            metavar="SPEC", help="Under open, take the order that suits this specification best."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a budget for a data set, which sweeps draw on by naming it in privacy.budget.

    Example: dp-sweeps budget create scans --from specs/digits.yaml --policy open --epsilon 8
    """
    from sweeps.new_budget import BudgetOptions, create_budget

    options = BudgetOptions(
        name=name,
        spec=spec,
        dataset=dataset,
        data_dir=data_dir,
        train_split=train_split,
        eval_split=eval_split,
        fingerprint=fingerprint,
        policy=policy,
        epsilon=epsilon,
        delta=delta,
        neighboring_relation=neighboring_relation,
        privacy_unit=privacy_unit,
        rdp_order=rdp_order,
        typical=typical,
    )
    home = Home.from_environment()
    with reckoning() as on_spec:
        budget = create_budget(options, home, by=who(), tell=_tell, on_spec=on_spec)
    if as_json:
        from sweeps.report.budget_documents import budget_json

        print_json(budget_json(budget))
        return
    order = f", order {budget.terms.rdp_order:g}" if budget.terms.rdp_order else ""
    print_line(
        f"{budget.name}: {budget.terms.policy}{order}, epsilon {budget.terms.epsilon:g} at delta "
        f"{budget.terms.delta:g}, for {budget.dataset}"
    )
    out.print(budget.guarantee, markup=False, highlight=False)


@app.command("list")
def list_budgets(
    every: Annotated[
        bool, typer.Option("--all", help="Also those that were made for one sweep alone.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the budgets, newest first, and how much of each is taken.

    Example: dp-sweeps budget list --all
    """
    from sweeps.report.budget_documents import budgets_json
    from sweeps.report.budget_view import BudgetList, BudgetRow

    ledger = _ledger()
    found = ledger.budgets()
    shown = [budget for budget in found if every or not budget.one_off]
    with err.status("reckoning privacy"):
        rows = [
            BudgetRow(
                budget=budget,
                # Reckoned where it is shown: what trials cost together takes a moment.
                level=None
                if budget.terms.policy == "per_trial"
                else ledger.status(budget.name).level,
            )
            for budget in shown
        ]
    if as_json:
        print_json(budgets_json(rows))
    else:
        out.print(BudgetList(rows, hidden=len(found) - len(shown)))


@app.command()
def show(
    name: BudgetArgument,
    spec: Annotated[
        Path | None,
        typer.Option(
            "--for", metavar="SPEC", help="Say what of this specification would still fit."
        ),
    ] = None,
    team: Annotated[
        str | None, typer.Option(help="Whose share pays for what would still fit.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what of a budget is spent, reserved and free, and what would still fit.

    Example: dp-sweeps budget show scans --for specs/digits.yaml
    """
    from sweeps.report.budget_documents import status_json
    from sweeps.report.budget_view import BudgetView

    home, ledger = Home.from_environment(), _ledger()
    budget = _existing(ledger, name)
    room = _room(ledger, budget, spec, team, home)
    others = _same_data(ledger, budget.name, budget.dataset_fingerprint)
    with err.status("reckoning privacy"):
        status = ledger.status(name)
    if as_json:
        print_json(status_json(status, others, room))
    else:
        out.print(BudgetView(status=status, others=others, room=room))


def _tell(text: str) -> None:
    print_note(text, style="yellow" if text.startswith("warning:") else "")


def _room(
    ledger: "Ledger", budget: "Budget", spec: Path | None, team: str | None, home: Home
) -> "Room | None":
    from sweeps.budgets import room_for_paid_kinds, room_for_spec

    if team is not None and budget.shares and team not in budget.shares:
        teams = ", ".join(budget.shares)
        raise CommandError(f"--team {team!r}: has no share of {budget.name}; allowed: {teams}")
    if spec is None:
        with err.status("reckoning privacy"):
            return room_for_paid_kinds(ledger, budget.name, team=team)
    with reckoning() as on_spec:
        return room_for_spec(ledger, budget.name, spec, home, team=team, on_spec=on_spec)


@app.command()
def grant(
    name: BudgetArgument,
    team: Annotated[str, typer.Option(help="Whom to give it.")],
    share: Annotated[str, typer.Option(metavar="SHARE", help="As 0.4 or 40%.")],
    as_json: JsonOption = False,
) -> None:
    """Give a team a share of a budget, in the place of the one that it has.

    From the first grant on only teams with a share may draw on the budget.

    Example: dp-sweeps budget grant scans --team vision --share 40%
    """
    part = parse_share(share)
    ledger = _ledger()
    _existing(ledger, name)
    budget = ledger.grant(name, team, part, by=who())
    _print_change(budget, f"{team} has {budget.shares[team] * 100:.6g}% of {name}", as_json)


@app.command()
def freeze(name: BudgetArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Stop a budget: nothing is admitted and nothing charged until it is thawed.

    Trials that are running end at their next charge.

    Example: dp-sweeps budget freeze scans --reason "audit until Friday"
    """
    ledger = _ledger()
    _existing(ledger, name)
    budget = ledger.freeze(name, by=who(), reason=reason)
    _print_change(budget, f"{name} is frozen", as_json)


@app.command()
def thaw(name: BudgetArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Let a frozen budget go on.

    Example: dp-sweeps budget thaw scans
    """
    ledger = _ledger()
    _existing(ledger, name)
    budget = ledger.thaw(name, by=who(), reason=reason)
    _print_change(budget, f"{name} is active", as_json)


@app.command()
def retire(
    name: BudgetArgument,
    reason: ReasonOption = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """End a budget for good. What is reserved and never ran is given up.

    Example: dp-sweeps budget retire scans --reason "study ended" --yes
    """
    ledger = _ledger()
    budget = _existing(ledger, name)
    if not yes and budget.state != "retired":
        if not sys.stdin.isatty():
            raise CommandError(f"retiring {name} is for good; without a terminal it takes --yes")
        running = ledger.status(name).counts["open"]
        opened = f" {running} open reservations end with it." if running else ""
        typer.confirm(f"{name} ends for good.{opened} Go on?", abort=True, err=True)
    budget = ledger.retire(name, by=who(), reason=reason)
    _print_change(budget, f"{name} is retired", as_json)


def _print_change(budget: "Budget", words: str, as_json: bool) -> None:
    if as_json:
        from sweeps.report.budget_documents import budget_json

        print_json(budget_json(budget))
    else:
        print_line(words)


def _ledger() -> "Ledger":
    from sweeps.database.tables import existing_ledger

    return existing_ledger(Home.from_environment())


def _existing(ledger: "Ledger", name: str) -> "Budget":
    """A budget that is named on the command line.

    Raises:
        CommandError: There is none of that name.
    """
    from accounting import LedgerError

    try:
        return ledger.budget(name)
    except LedgerError as error:
        raise CommandError(str(error)) from error


def _same_data(ledger: "Ledger", name: str, fingerprint: str) -> "list[Budget]":
    """Other budgets on the same data that may still be drawn on."""
    return [
        other
        for other in ledger.budgets()
        if other.dataset_fingerprint == fingerprint
        and other.name != name
        and other.state != "retired"
    ]
