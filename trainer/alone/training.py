"""One run in its directory: from the lock to the last report.

The first of several processes keeps the directory, charges, writes and shows; the others take part
and keep quiet.
"""

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.alone.charges import FileCharges, charged_terms
from trainer.alone.hosts import Hosts
from trainer.alone.interrupts import Interrupts
from trainer.alone.progress import RunProgress, shown_report
from trainer.alone.run_directory import RunDirectory
from trainer.config import TrialConfig
from trainer.errors import RunError
from trainer.mechanism.branch import Branch
from trainer.weights.checkpoint_writer import checkpoints_in
from trainer.weights.checkpoints import first_readable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a trial is run, none of which changes what it is.

    Attributes:
        resume: Whether a run goes on; else one begins.
        how_to_resume: The command that goes on with it.
        data_home: Where built-in data sets are kept.
        num_devices: How many devices share the work; None for all.
        hosts: The processes.
        as_json: Whether reports go to standard output, one object a line.
    """

    resume: bool
    how_to_resume: str
    data_home: Path
    num_devices: int | None
    hosts: Hosts
    as_json: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended, for now.

    Attributes:
        report: The last report, as its owner may see it; None where nobody made one.
        iterations: Iterations that are charged.
        counts: Counts of the evaluation examples that are charged.
        interrupted: Whether somebody stopped it before its end.
    """

    report: dict[str, Any] | None
    iterations: int
    counts: int
    interrupted: bool = False


def train(
    config: TrialConfig, run: RunDirectory, options: Options, console: Console
) -> Ended | None:
    """Runs a trial to its end, or until somebody asks it to stop.

    Args:
        config: The trial.
        run: Its directory.
        options: How it is run.
        console: Standard error.

    Returns:
        How it ended; None in all processes but the first.

    Raises:
        RunError: The directory does not allow it.
        TrainerError: As `trainer.loop.run_trial`.
    """
    if not options.hosts.leads:
        options.hosts.connect()
        checkpoint, known = None, []
        if options.resume:  # as the first does, which waits for the others before it goes on
            checkpoint = first_readable(checkpoints_in(run.checkpoints)).path
            known = FileCharges(run.charges, charged_terms(config), create=False).branches
        for _ in _reports(config, run, options, checkpoint, known, None, lambda step: None):
            if options.hosts.any(False):
                break
        return None
    with run.taken(resume=options.resume, how_to_resume=options.how_to_resume):
        charges = FileCharges(run.charges, charged_terms(config), create=not options.resume)
        try:
            run.save_config(config)
            return _lead(config, run, options, charges, console)
        except BaseException:
            if not options.resume and not charges.iterations:
                run.discard()
            raise


def _lead(
    config: TrialConfig,
    run: RunDirectory,
    options: Options,
    charges: FileCharges,
    console: Console,
) -> Ended:
    start, last = 0, run.last_report()
    if last is not None and last.get("outcome") == "diverged":
        raise RunError(
            f"{run.path}: diverged at step {last.get('step')}, so there is nothing to go on with; "
            "allowed is to begin another, say with a smaller learning_rate"
        )
    checkpoint, manifest, passed_over = first_readable(checkpoints_in(run.checkpoints))
    if manifest is not None:
        start = manifest.step
        charges.check_covers(manifest.branch and manifest.branch.branch_id, start)
    for reason in passed_over:
        console.print(f"{reason}; going on from step {start}", markup=False, soft_wrap=True)
    if start >= config.iterations:
        console.print(f"nothing is left to run: {start} of {config.iterations} steps are taken")
        return Ended(report=last, iterations=charges.iterations, counts=charges.counts)
    options.hosts.connect()
    is_apart = not (options.as_json and sys.stdout.isatty())
    progress = RunProgress(config, start, console, moves=console.is_terminal and is_apart)
    every = config.report_every_steps

    def on_first() -> None:
        progress.note(
            "stopping at the next report, with a checkpoint "
            f"(a report is due every {every} steps); Ctrl-C again stops at once"
        )

    interrupted = False
    with (
        Interrupts(on_first, progress.stop) as interrupts,
        progress,
        _logged(progress),
        contextlib.closing(
            _reports(config, run, options, checkpoint, charges.branches, charges, progress.on_step)
        ) as reports,
    ):
        for report in reports:
            last = shown_report(config, report)
            line = json.dumps(last, allow_nan=False)
            run.add_report(line)
            if options.as_json:
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            progress.on_report(last)
            # All processes ask, whatever the outcome, so that they stop together.
            if options.hosts.any(interrupts.requested) and report.outcome == "running":
                interrupted = True
                break
    return Ended(
        report=last,
        iterations=charges.iterations,
        counts=charges.counts,
        interrupted=interrupted,
    )


def _reports(
    config: TrialConfig,
    run: RunDirectory,
    options: Options,
    checkpoint: Path | None,
    known_branches: Sequence[Branch],
    charges: FileCharges | None,
    on_step: Any,
) -> Any:
    from trainer.loop import trial_reports  # JAX, which must not be used before `Hosts.connect`

    def by_the_first(*_: Any) -> int:
        raise AssertionError("the first process alone charges")

    return trial_reports(
        config,
        data_home=options.data_home,
        checkpoint_dir=run.checkpoints,
        resume_from=checkpoint,
        known_branches=known_branches,
        secrets_dir=run.secrets,
        charge=charges.charge if charges else by_the_first,
        charge_counts=charges.charge_counts if charges else by_the_first,
        on_step=on_step,
        num_devices=options.num_devices,
    )


@contextlib.contextmanager
def _logged(progress: RunProgress) -> Generator[None]:
    """Shows what the trainer logs, such as what became of initial weights."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.note(record.getMessage())

    logger, handler = logging.getLogger("trainer"), Handler()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
