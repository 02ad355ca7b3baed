"""The command line.

Answers go to standard output; progress, notes and errors go to standard error, so ``--json``
leaves exactly one object on standard output. A terminal gets a live view, anything else plain
lines.

Exit codes: 0 all went well; 1 a trial failed, or Ray, the database or MLflow could not be used;
2 the specification or the command line is not allowed (nothing was started or written); 3 no
trial was admitted; 130 interrupted.
"""

import enum
import json
import signal
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from cluster import ClusterError
from sweeps.admission import Plan, Proposal, prepare_dataset
from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store, finite_or_none
from sweeps.database.tables import open_database
from sweeps.errors import StoreError, SweepError
from sweeps.home import Home
from sweeps.report.documents import plan_json, results_json
from sweeps.report.live import LiveView
from sweeps.report.results import SweepResults
from sweeps.report.table import CheckRow, check_table, results_table
from sweeps.service import (
    cluster_for,
    execute,
    finish,
    make_plan,
    record,
    report_files,
    results_of,
)
from sweeps.spec.sweep_spec import SweepSpec, json_schema
from sweeps.tracking.mlflow_writer import MlflowWriter, delivering
from sweeps.tracking.outbox import OutboxThread

_EXAMPLES = """

Examples:

    dp-sweeps check specs/digits.yaml
    dp-sweeps run specs/digits.yaml
    dp-sweeps show
"""


class ExitCode(enum.IntEnum):
    """How a command ends."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 2
    NOTHING_ADMITTED = 3
    INTERRUPTED = 130


app = typer.Typer(
    name="dp-sweeps",
    help="Hyperparameter sweeps for DP-SGD that keep to a privacy budget." + _EXAMPLES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="State lives under DP_SWEEPS_HOME (default ~/.dp-sweeps). Exit codes: 0 well, "
    "1 something failed, 2 bad input, 3 nothing admitted, 130 interrupted.",
)

_out = Console()
_err = Console(stderr=True)

SpecArgument = Annotated[
    Path, typer.Argument(metavar="SPEC", help="The sweep's specification, a YAML file.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object instead of a table.")
]


@app.command()
def check(spec: SpecArgument, as_json: JsonOption = False) -> None:
    """Say what every configuration would cost, and which are admitted. Trains nothing.

    Example: dp-sweeps check specs/digits.yaml --json
    """
    plan = _plan(spec, Home.from_environment())
    if as_json:
        _print_json(plan_json(plan))
    else:
        _print_decisions(plan)
    raise typer.Exit(ExitCode.OK if plan.admitted else ExitCode.NOTHING_ADMITTED)


@app.command()
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
    signal.signal(signal.SIGTERM, _interrupt)
    home = Home.from_environment()
    plan = _plan(spec, home)
    home.create()
    prepare_dataset(plan.spec, home.data_dir)
    store = Store(open_database(home))
    with _delivering(store, home) as outbox:
        sweep_id, state = _train(plan, store, home, address)
        report = finish(sweep_id, state, store, home)
    results = results_of(store, sweep_id)
    if as_json:
        _print_json(results_json(results, report=report))
    else:
        _out.print(results_table(results))
        _print_places(results, report, home)
    if outbox.remaining:
        _err.print(
            f"MLflow has yet to get {outbox.remaining} messages ({outbox.last_error}); they are "
            "kept, and `dp-sweeps sync` delivers them",
            markup=False,
        )
    raise typer.Exit(_exit_code(results))


@app.command("list")
def list_sweeps(as_json: JsonOption = False) -> None:
    """List the sweeps in the ledger, newest first."""
    rows = [
        {"sweep_id": row.sweep_id, "state": row.state, "mlflow_run_id": row.mlflow_run_id}
        for row in _store(Home.from_environment()).sweeps()
    ]
    if as_json:
        _print_json({"sweeps": rows})
        return
    for row in rows:
        _out.print(f"{row['sweep_id']}  {row['state']}", markup=False, highlight=False)


def _complete_sweep_id(incomplete: str) -> list[str]:
    try:
        rows = _store(Home.from_environment()).sweeps()
    except SweepError:
        return []
    return [row.sweep_id for row in rows if row.sweep_id.startswith(incomplete)]


@app.command()
def show(
    sweep_id: Annotated[
        str | None,
        typer.Argument(
            help="A sweep's id; the newest sweep without one.", autocompletion=_complete_sweep_id
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a sweep as the ledger has it.

    Example: dp-sweeps show digits-20250131-120000-1a2b
    """
    home = Home.from_environment()
    results = results_of(_store(home), sweep_id)
    report = report_files(home, results.sweep_id)
    if as_json:
        _print_json(results_json(results, report=report))
    else:
        _out.print(results_table(results))
        _print_places(results, report, home)


@app.command()
def sync() -> None:
    """Deliver to MLflow what it has yet to get, after an outage."""
    home = Home.from_environment()
    count = MlflowWriter(_store(home), home).deliver()
    _out.print(f"delivered {count} messages")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a specification."""
    _print_json(json_schema())


def main() -> NoReturn:
    """Runs the command line and exits."""
    try:
        app()
        code = ExitCode.OK
    except (SweepError, ClusterError) as error:
        _err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        code = error.exit_code if isinstance(error, SweepError) else ExitCode.FAILED
    except KeyboardInterrupt:
        _err.print("interrupted")
        code = ExitCode.INTERRUPTED
    sys.exit(code)


def _plan(path: Path, home: Home) -> Plan:
    """Decides on a specification, with a progress bar on a terminal."""
    columns = (TextColumn("reckoning privacy"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:

        def on_spec(spec: SweepSpec) -> Callable[[Proposal], None]:
            task = bar.add_task("", total=spec.num_trials)
            return lambda _: bar.advance(task)

        return make_plan(path, home, on_spec)


def _train(plan: Plan, store: Store, home: Home, address: str) -> tuple[str, SweepState]:
    """Records a plan and runs what it admits; a plan that admits nothing needs no cluster."""
    if not plan.admitted:
        return record(plan, store), SweepState.COMPLETED
    with ExitStack() as stack:
        # Ray prints of dead workers to standard output, which is for answers alone.
        stack.enter_context(redirect_stdout(sys.stderr))
        with _err.status("starting Ray" if address == "local" else f"connecting to {address}"):
            stack.enter_context(cluster_for(plan, home, address))
        signal.signal(signal.SIGTERM, _interrupt)  # again: Ray has put its own in place
        sweep_id = record(plan, store)
        with LiveView(store, sweep_id, _err):
            return sweep_id, execute(plan, sweep_id, store, home)


@contextmanager
def _delivering(store: Store, home: Home) -> Generator[OutboxThread]:
    """Delivers to MLflow beside the sweep; what is left at the end may take a while."""
    with ExitStack() as stack:
        yield stack.enter_context(delivering(MlflowWriter(store, home)))
        with _err.status("delivering to MLflow"):
            stack.close()


def _exit_code(results: SweepResults) -> ExitCode:
    if results.state is SweepState.CANCELLED:
        return ExitCode.INTERRUPTED
    if results.count(TrialState.FAILED):
        return ExitCode.FAILED
    if results.count(TrialState.REJECTED) == len(results.trials):
        return ExitCode.NOTHING_ADMITTED
    return ExitCode.OK


def _print_decisions(plan: Plan) -> None:
    rows = [
        CheckRow(
            config=proposal.shown,
            epsilon=finite_or_none(proposal.decision.epsilon),
            decision="admitted" if proposal.decision.admitted else "rejected",
            reason=proposal.decision.reason,
        )
        for proposal in plan.proposals
    ]
    _out.print(check_table(rows, title=plan.spec.name, guarantee=plan.guarantee))


def _print_places(results: SweepResults, report: Mapping[str, str], home: Home) -> None:
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
        _out.print(line, markup=False, highlight=False, soft_wrap=True)


def _store(home: Home) -> Store:
    """The store of a home that has one: looking at nothing must not create anything.

    Raises:
        StoreError: If there is no ledger yet.
    """
    if home.uses_sqlite and not Path(home.database_url.database or "").exists():
        raise StoreError(f"no ledger at {home.path} yet; start one with `dp-sweeps run SPEC`")
    return Store(open_database(home))


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt
