"""The command that goes on from a trial's checkpoint as another trial."""

from typing import Annotated

import typer

from sweeps.cli.driving import drive_here, existing_store
from sweeps.cli.options import (
    LOCAL,
    AddressOption,
    DetachOption,
    JsonOption,
    check_detach,
    complete_trial_id,
)
from sweeps.cli.output import ExitCode, print_json, print_line, print_note
from sweeps.errors import CommandError
from sweeps.home import Home


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(fork)


def fork(
    trial: Annotated[
        str,
        typer.Argument(
            metavar="TRIAL",
            help="The id of the trial to go on from.",
            autocompletion=complete_trial_id,
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another value for a field of the search space; may be repeated.",
        ),
    ] = None,
    from_step: Annotated[
        int | None,
        typer.Option(min=1, help="Of which checkpoint; without it, of the newest."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="The step to end at; without it, where the trial was to end."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and do nothing.")
    ] = False,
    as_json: JsonOption = False,
    address: AddressOption = LOCAL,
    detach: DetachOption = False,
) -> None:
    """Go on from a trial's checkpoint as another trial, with other hyperparameters.

    The fork is a trial of the same sweep. It pays for its own steps; what the checkpoint has cost
    is paid, and counts in the fork's ε. The trial that it goes on from stays as it is.

    Examples:
        dp-sweeps fork digits-20250131-120000-1a2b-0004 --set learning_rate=0.1 --dry-run

        dp-sweeps fork digits-20250131-120000-1a2b-0004 --set optimizer=adam --iterations 400
    """
    from sweeps.forks import new_fork, parse_changes
    from sweeps.report.going_on import fork_json, fork_lines
    from sweeps.spec.sweep_spec import SweepSpec

    check_detach(detach, address)
    if not changes and iterations is None:
        raise CommandError(
            "--set: allowed is at least one KEY=VALUE; `dp-sweeps resume --trial` goes on with a "
            "trial as it is"
        )
    home = Home.from_environment()
    store = existing_store(home)
    wanted = parse_changes(changes or [])
    new = new_fork(store, home, trial, wanted, from_step=from_step, iterations=iterations)
    decision = store.fork(new, dry_run=dry_run)
    sweep_id = decision.sweep_id
    is_over = dry_run or not decision.admitted
    is_driven = not is_over and store.is_driven(sweep_id)
    if not as_json:
        for line in fork_lines(decision, dry_run=dry_run):
            print_line(line)
    elif is_over or is_driven:
        print_json(fork_json(decision))
    if is_over:
        raise typer.Exit(ExitCode.OK if decision.admitted else ExitCode.NOTHING_ADMITTED)
    if is_driven:
        print_note(f"its driver takes it from here; `dp-sweeps watch {sweep_id}` shows it")
        return
    spec = SweepSpec.model_validate(store.sweep(sweep_id).spec)
    drive_here(lambda: sweep_id, spec, store, home, address, as_json=as_json, detach=detach)
