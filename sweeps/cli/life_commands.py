"""The commands about a sweep's life: resume, status, watch, logs, pause, stop, cancel."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sweeps.cli.driving import drive_here, existing_store
from sweeps.cli.options import (
    LOCAL,
    AddressOption,
    DetachOption,
    JsonOption,
    check_detach,
    complete_sweep_id,
    complete_trial_id,
)
from sweeps.cli.output import ExitCode, err, out, print_json, print_line, print_note
from sweeps.database.states import SweepState, Wish
from sweeps.errors import CommandError
from sweeps.home import Home

if TYPE_CHECKING:
    from sweeps.database.readmission import Readmission

_WATCH_SECS = 0.5

SweepArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="SWEEP",
        help="A sweep's id; the newest sweep without one.",
        autocompletion=complete_sweep_id,
    ),
]
TrialArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRIAL", help="A trial's id, as `show` lists it.", autocompletion=complete_trial_id
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds the commands, in the order in which the help lists them."""
    for command in (resume, status, watch, logs, pause, stop, cancel):
        app.command()(command)


def resume(
    sweep: SweepArgument = None,
    trial: Annotated[
        list[str] | None,
        typer.Option(
            "--trial",
            help="Go on with a trial that has ended or waits at a rung, by its id or its number; "
            "may be repeated.",
            autocompletion=complete_trial_id,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Go on with the best so many of the trials that were pruned."),
    ] = None,
    pruned: Annotated[
        bool, typer.Option("--pruned", help="Go on with every trial that was pruned.")
    ] = False,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Where they end; without it, where they were to end at first."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, and do nothing.")
    ] = False,
    as_json: JsonOption = False,
    address: AddressOption = LOCAL,
    detach: DetachOption = False,
) -> None:
    """Go on with a sweep that was interrupted, or with trials that were pruned.

    What has ended is left alone, and what was under way goes on from its last checkpoint. Trials
    that are named go through admission again, and pay for steps that they have not taken.

    Examples:
        dp-sweeps resume

        dp-sweeps resume digits-20250131-120000-1a2b --top 3 --dry-run

        dp-sweeps resume --trial 4 --iterations 400
    """
    from sweeps.choosing import chosen_trials, sweep_id_of
    from sweeps.driver import is_anything_left
    from sweeps.report.going_on import going_on_json, going_on_table
    from sweeps.spec.sweep_spec import SweepSpec

    check_detach(detach, address)
    home = Home.from_environment()
    store = existing_store(home)
    sweep_id = sweep_id_of(store, sweep)
    chosen = chosen_trials(store, sweep_id, trial or [], top, pruned)
    if chosen is None and (iterations or dry_run):
        given = "--iterations" if iterations else "--dry-run"
        raise CommandError(f"{given}: allowed with --trial, --top or --pruned")
    decisions: Sequence[Readmission] = []
    if chosen is not None:
        decisions = store.readmit(dict.fromkeys(chosen, iterations), dry_run=dry_run)
        if dry_run and as_json:
            print_json(going_on_json(decisions))
        elif not as_json:
            out.print(going_on_table(decisions))
        admitted = any(decision.admitted for decision in decisions)
        if dry_run or not admitted:
            raise typer.Exit(ExitCode.OK if admitted else ExitCode.NOTHING_ADMITTED)
    if store.is_driven(sweep_id):
        print_note(f"its driver takes it from here; `dp-sweeps watch {sweep_id}` shows it")
        return
    spec = SweepSpec.model_validate(store.sweep(sweep_id).spec)
    where = address if is_anything_left(spec, sweep_id, store, home) else None
    if where is None:
        print_note("nothing is left to run; `--pruned` goes on with trials that were pruned")
    drive_here(lambda: sweep_id, spec, store, home, where, as_json=as_json, detach=detach)


def status(sweep: SweepArgument = None, as_json: JsonOption = False) -> None:
    """Say where a sweep is: who drives it, how its trials stand, what MLflow has yet to get.

    Example: dp-sweeps status --json
    """
    from sweeps.choosing import sweep_id_of
    from sweeps.report.status import read_status, status_view

    store = existing_store(Home.from_environment())
    found = read_status(store, sweep_id_of(store, sweep))
    if as_json:
        print_json(found.to_json())
    else:
        out.print(status_view(found))


def watch(sweep: SweepArgument = None) -> None:
    """Watch a sweep that runs elsewhere, until it no longer runs. Ctrl-C only stops watching.

    Example: dp-sweeps watch
    """
    from sweeps.choosing import sweep_id_of
    from sweeps.report.live import LiveView

    store = existing_store(Home.from_environment())
    sweep_id = sweep_id_of(store, sweep)
    with LiveView(store, sweep_id, err):
        while store.sweep(sweep_id).state == SweepState.RUNNING:
            time.sleep(_WATCH_SECS)
    print_line(f"{sweep_id} is {store.sweep(sweep_id).state}")


def logs(trial: TrialArgument) -> None:
    """Print what a trial's workers said.

    Example: dp-sweeps logs digits-20250131-120000-1a2b-0004
    """
    from sweeps.choosing import trial_row

    home = Home.from_environment()
    row = trial_row(existing_store(home), trial)
    path = home.trial_log(row.sweep_id, row.trial_id)
    if not path.exists():
        print_note(f"trial {row.trial_id} has said nothing yet; it is {row.state}")
        return
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            print_line(line.rstrip("\n"))


def pause(sweep: SweepArgument = None) -> None:
    """Set a sweep aside: running trials go to their next report, and wait there.

    Example: dp-sweeps pause
    """
    sweep_id = _ask(sweep, Wish.PAUSE)
    print_line(f"{sweep_id} pauses; `dp-sweeps resume {sweep_id}` goes on")


def stop(sweep: SweepArgument = None) -> None:
    """End a sweep in order: running trials go to their ends, no other begins.

    Example: dp-sweeps stop
    """
    sweep_id = _ask(sweep, Wish.STOP)
    print_line(f"{sweep_id} stops; what has not begun is cancelled, and its budget is free again")


def cancel(
    target: Annotated[
        str, typer.Argument(metavar="SWEEP|TRIAL", help="The id of a sweep or of a trial.")
    ],
) -> None:
    """End a sweep, or one trial, now. What was spent stays spent; the rest is free again.

    Example: dp-sweeps cancel digits-20250131-120000-1a2b-0004
    """
    from sweeps import driver

    home = Home.from_environment()
    store = existing_store(home)
    if any(row.sweep_id == target for row in store.sweeps()):
        driver.cancel(target, store, home)
    else:
        driver.cancel_trial(target, store, home)
    print_line(f"{target} is cancelled")


def _ask(sweep: str | None, wish: Wish) -> str:
    from sweeps import driver
    from sweeps.choosing import sweep_id_of

    home = Home.from_environment()
    store = existing_store(home)
    sweep_id = sweep_id_of(store, sweep)
    driver.ask(sweep_id, wish, store, home)
    return sweep_id
