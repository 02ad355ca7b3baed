"""``python -m trainer CONFIG.yaml``: reads, checks, trains, and says what it promises.

Answers go to standard output; progress, notes and errors go to standard error. Exit codes: 0 all
went well; 1 something failed, or the trial diverged; 2 the file or the command line is not allowed
(nothing was trained, nothing written); 130 interrupted.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

import accounting
from accounting.policies import shown_epsilon
from trainer.alone.hosts import hosts_of
from trainer.alone.interrupts import INTERRUPTED
from trainer.alone.progress import accuracies
from trainer.alone.resolution import Resolved, resolve
from trainer.alone.run_directory import RunDirectory
from trainer.alone.statement import NON_PRIVATE, statement
from trainer.alone.training import Ended, Options, train
from trainer.alone.trial_file import read_trial_file
from trainer.config import TrialConfig
from trainer.errors import (
    ConfigError,
    DatasetError,
    ModelError,
    RunError,
    TrainerError,
)
from trainer.training.plan import evaluation_mechanism, mechanism_of

OK, FAILED, BAD_INPUT = 0, 1, 2

_HELP = """Trains one model by DP-SGD, and says what that costs in privacy.

CONFIG is a YAML file such as specs/trials/digits.yaml; docs/trainer.md explains every field.

Examples:

    python -m trainer specs/trials/digits.yaml --check

    python -m trainer specs/trials/digits.yaml --out runs/first

    python -m trainer specs/trials/digits.yaml --out runs/first --resume
"""

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True)


def main() -> NoReturn:
    """Runs the command line and exits."""
    try:
        app(prog_name="python -m trainer")
        code = OK
    except (TrainerError, accounting.AccountingError, OSError) as error:
        _say(_err, str(error), style="red")
        code = _exit_code(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


def _exit_code(error: Exception) -> int:
    bad_input = (
        ConfigError,
        DatasetError,
        ModelError,
        RunError,
        accounting.InvalidPrivacyParameter,
        accounting.CalibrationError,
    )
    return BAD_INPUT if isinstance(error, bad_input) else FAILED


@app.command(
    help=_HELP,
    epilog="Exit codes: 0 well, 1 something failed or diverged, 2 bad input, 130 interrupted.",
)
def _command(
    config: Annotated[Path, typer.Argument(help="The trial's file.", metavar="CONFIG.yaml")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the run.", show_default="runs/<name of CONFIG>"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Say what it would cost, and train nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per report on standard output.")
    ] = False,
    data_home: Annotated[
        Path | None,
        typer.Option(
            help="Where data sets are looked for first.",
            show_default="data below DP_SWEEPS_HOME or ~/.dp-sweeps",
        ),
    ] = None,
    devices: Annotated[
        str, typer.Option(help="How many devices share the work: a number, or all.")
    ] = "all",
    coordinator: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the first of several processes.", show_default=False),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="How many processes there are.", show_default=False)
    ] = None,
    process_id: Annotated[
        int | None, typer.Option(help="Which of them this is, from 0.", show_default=False)
    ] = None,
) -> None:
    hosts = hosts_of(coordinator, num_processes, process_id)
    num_devices = _num_devices(devices)
    if check and resume:
        raise ConfigError("--resume: allowed is --check without it, for nothing is run")
    run = RunDirectory(out or Path("runs") / config.stem)
    again = ["python", "-m", "trainer", str(config), "--out", str(run.path), "--resume"]
    # Steps are repeated bit for bit on as many devices.
    again += ["--devices", devices] if num_devices else []
    again += ["--data-home", str(data_home)] if data_home else []
    data_home = data_home or _data_home()
    resolved = resolve(read_trial_file(config), data_home)
    if check:
        _show_cost(resolved, as_json)
        return
    if resolved.missing is not None:
        raise resolved.missing
    options = Options(
        resume=resume,
        how_to_resume=shlex.join(again),
        data_home=data_home,
        num_devices=num_devices,
        hosts=hosts,
        as_json=as_json,
    )
    ended = train(resolved.config, run, options, _err)
    if ended is not None:
        raise typer.Exit(_show_end(resolved.config, run, options, ended))


def _num_devices(text: str) -> int | None:
    if text == "all":
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ConfigError(f"--devices={text!r}: allowed is a whole number >= 1, or all")
    return int(text)


def _data_home() -> Path:
    home = os.environ.get("DP_SWEEPS_HOME") or Path.home() / ".dp-sweeps"
    return Path(home).expanduser().absolute() / "data"


def _show_cost(resolved: Resolved, as_json: bool) -> None:
    """What the whole trial would cost, and what that would promise."""
    config = resolved.config
    promise = statement(
        config,
        iterations=config.iterations,
        epsilon=resolved.epsilon,
        eval_epsilon=resolved.eval_epsilon,
    )
    if resolved.missing is not None:
        _say(_err, f"{resolved.missing}. The cost does not depend on it", style="yellow")
    if as_json:
        cost = {
            "epsilon": resolved.epsilon,
            "delta": config.target_delta,
            "eval_epsilon": resolved.eval_epsilon,
            "guarantee": promise,
            "config": config.to_json(),
        }
        sys.stdout.write(json.dumps(cost, allow_nan=False) + "\n")
        return
    lines = {
        "data": _data_words(resolved),
        "model": f"{config.model.name}, {config.optimizer}, learning rate "
        f"{config.learning_rate:g}",
        "steps": f"{config.iterations}, a report every {config.report_every_steps}",
        "batches": f"{config.expected_batch_size:g} {config.privacy_unit}s expected, sampling "
        f"probability {config.sampling_prob:.6g}",
        "noise": f"noise multiplier {config.noise_multiplier:.6g}, clip norm "
        f"{config.l2_clip_norm:g}",
        "epsilon": f"{shown_epsilon(resolved.epsilon)} at delta {config.target_delta:g} "
        f"({config.accountant})",
    }
    for name, words in lines.items():
        _say(_out, f"{name:<8} {words}")
    _say_statement(_out, promise)


def _data_words(resolved: Resolved) -> str:
    """The data set, with no number that is protected."""
    config, info = resolved.config, resolved.dataset
    if info is None:
        return config.data.name
    words = f"{info.name} {info.version}"
    if config.neighboring_relation != "zero_out":
        return words
    if info.num_users is not None:
        return f"{words}, {info.num_users} users"
    return f"{words}, {info.num_train} training and {info.num_eval} evaluation examples"


def _show_end(config: TrialConfig, run: RunDirectory, options: Options, ended: Ended) -> int:
    """What became of a run, what it has spent, and what that promises."""
    console = _err if options.as_json else _out
    report: dict[str, Any] = ended.report or {}
    outcome = "interrupted" if ended.interrupted else report.get("outcome", "completed")
    facts = [f"{outcome} at step {report.get('step')} of {config.iterations}", accuracies(report)]
    _say(console, ", ".join(filter(None, facts)))
    _say(console, f"checkpoint {run.newest_checkpoint()}")
    if ended.iterations > report.get("step", ended.iterations):
        _say(
            console,
            f"{ended.iterations} iterations are charged, for some steps were taken again with "
            "other noise",
        )
    how: dict[str, Any] = {"delta": config.target_delta, "accountant": config.accountant}
    counting = evaluation_mechanism(config)
    promise = statement(
        config,
        iterations=ended.iterations,
        epsilon=accounting.epsilon(mechanism_of(config).after(ended.iterations), **how),
        eval_epsilon=accounting.epsilon(counting.after(ended.counts), **how) if counting else None,
    )
    _say_statement(console, promise)
    if ended.interrupted:
        _say(_err, f"to go on: {options.how_to_resume}")
        return INTERRUPTED
    return FAILED if outcome == "diverged" else OK


def _say_statement(console: Console, promise: list[str]) -> None:
    _say(console, "")
    for sentence in promise:
        _say(console, sentence, style="bold red" if sentence == NON_PRIVATE else "")


def _say(console: Console, text: str, *, style: str = "") -> None:
    """A line as it is: nothing in it is markup, and it is not broken."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
