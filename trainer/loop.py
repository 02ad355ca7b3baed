"""A trial from start to end.

    take steps -> charge them (durable) -> measure -> checkpoint -> report

The order is the guarantee: until `ChargeFn` returns, nothing that depends on the batches of
those steps has left this module. `trial_reports` yields after every ``report_every_steps``, so
whoever drives it can stop a trial by not asking for more; `run_trial` drives it to its end.

Whatever a function that was passed in raises ends the trial, also between reports, with that very
error: checkpoints are then as whole as they were, and nothing is left running. What it had not
charged was never seen, and may be taken again.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import cast

from accounting import Mechanism
from trainer.config import TrialConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.mechanism.branch import Branch
from trainer.mechanism.keys import forget_root
from trainer.pack import Pack
from trainer.reporting import TrialReport
from trainer.training.devices import topology
from trainer.training.runners import OnStep
from trainer.trial import Trial
from trainer.weights.checkpoint_writer import CheckpointWriter, OnCheckpoint, checkpoint_path

ChargeFn = Callable[[Branch, int], int]
"""Makes "this branch has brought the trial to ``step``" durable, and returns how many iterations
the whole trial has been charged by now, all its branches included, each from its ``start_step``
on: of a banded mechanism those of every branch but the newest in whole groups of ``bands``, as
each costs what its first step does. A step that a branch has reached before changes nothing: it
is being repeated bit for bit. The branch is worth keeping beside the charge: as one of
``known_branches`` it can be gone on with also where no checkpoint of it is left. Raises to stop
the trial."""

CountChargeFn = Callable[[Branch, int, int], int]
"""Makes "this branch has counted ``counts`` times with noise by ``step``" durable, for the
evaluation examples, and returns how many counts the whole trial has been charged by now."""

ReportFn = Callable[[TrialReport], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a trial ended.

    Attributes:
        report: The last report.
        checkpoint: Directory of the last checkpoint, or None if none was asked for.
    """

    report: TrialReport
    checkpoint: Path | None


def run_trial(
    config: TrialConfig,
    *,
    data_home: Path,
    checkpoint_dir: Path | None = None,
    resume_from: Path | None = None,
    fork_from: Path | None = None,
    spent_before: Sequence[Mechanism] = (),
    known_branches: Sequence[Branch] = (),
    secrets_dir: Path | None = None,
    charge: ChargeFn | None = None,
    charge_counts: CountChargeFn | None = None,
    on_report: ReportFn | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    on_step: OnStep | None = None,
    num_devices: int | None = 1,
) -> TrialResult:
    """Runs one trial to its end.

    Args:
        config: The trial. Where it goes on on a branch, an engine and a microbatch that it
            leaves open are the branch's; others than the branch's begin another branch.
        data_home: Where built-in data sets are kept (`trainer.data.datasets`).
        checkpoint_dir: Directory for checkpoints, ``step-<n>`` each, of which the newest two are
            kept. None writes none. No other trial may write there.
        resume_from: A checkpoint of this trial to go on from, say the first that can be read
            (`trainer.weights.checkpoints.first_readable`).
        fork_from: A checkpoint of another trial, on the same data and of the same architecture,
            to begin with (`trainer.beginning`); read where ``resume_from`` is not given. Steps
            are counted on from there, so ``iterations`` is the step to end at.
        spent_before: What the fork's prefix has cost, every time alike when the fork is resumed:
            reported epsilons are of this and the trial's own iterations together.
        known_branches: Branches that this trial has been charged for, in the order in which they
            began. One that began where this process begins, and whose root is kept, is gone on
            with: a trial that was killed before its first checkpoint pays nothing twice.
        secrets_dir: Where the roots of noise keys are kept (`trainer.mechanism.keys`). With the
            root of a branch a trial goes on as if it had never been interrupted, bit for bit;
            without, with new keys and charges for the steps that are taken again. None keeps
            none. A trial that has ended leaves none behind.
        charge: See `ChargeFn`. None counts in memory: the caller is the ledger.
        charge_counts: See `CountChargeFn`; likewise.
        on_report: Called with every report.
        on_checkpoint: See `OnCheckpoint`; called before any further step is charged, and before
            an older checkpoint is removed.
        on_step: Called with the number of steps taken, between reports too. Of one process it
            may raise, which stops the trial.
        num_devices: How many devices share the work; None for all there are. Of several
            processes (`jax.distributed`), all take part, call this alike and get the same
            reports; the first alone charges, writes and tells of checkpoints.

    Returns:
        The last report and where the last checkpoint is.

    Raises:
        ConfigError: If ``resume_from``, ``fork_from`` or ``known_branches`` comes without
            ``charge``: steps taken before would go unaccounted. Or a fork's configuration cannot
            begin with that checkpoint. Or there are not so many devices.
        DatasetError: If the data set cannot be read.
        CheckpointError: If a checkpoint is damaged or of another configuration, or cannot be
            written.
        OutOfMemory: If a step does not fit on the device, on a branch that cannot do with less.
        SecretError: If a root cannot be kept or read.
    """
    report = None
    for report in trial_reports(
        config,
        data_home=data_home,
        checkpoint_dir=checkpoint_dir,
        resume_from=resume_from,
        fork_from=fork_from,
        spent_before=spent_before,
        known_branches=known_branches,
        secrets_dir=secrets_dir,
        charge=charge,
        charge_counts=charge_counts,
        on_checkpoint=on_checkpoint,
        on_step=on_step,
        num_devices=num_devices,
    ):
        if on_report is not None:
            on_report(report)
    if report is None:
        raise CheckpointError(f"checkpoint {str(resume_from)!r}: nothing is left to run")
    checkpoint = None if checkpoint_dir is None else checkpoint_path(checkpoint_dir, report.step)
    return TrialResult(report=report, checkpoint=checkpoint)


def trial_reports(
    config: TrialConfig,
    *,
    data_home: Path,
    checkpoint_dir: Path | None = None,
    resume_from: Path | None = None,
    fork_from: Path | None = None,
    spent_before: Sequence[Mechanism] = (),
    known_branches: Sequence[Branch] = (),
    secrets_dir: Path | None = None,
    charge: ChargeFn | None = None,
    charge_counts: CountChargeFn | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    on_step: OnStep | None = None,
    num_devices: int | None = 1,
) -> Generator[TrialReport]:
    """Runs a trial lazily, one report at a time; arguments and errors as in `run_trial`.

    Checkpoints are written in the background, each before the next report at the latest; when
    the generator ends or is closed, the last one is whole, and told of.

    Yields:
        A report after every ``report_every_steps`` steps and one at the end. Asking for the
        next one takes the next steps; the last has an outcome other than ``running``, and who
        asks for another says that it is safe: then the roots of its noise are removed.
    """
    reports = packed_reports(
        Pack(0),
        config,
        data_home=data_home,
        checkpoint_dir=checkpoint_dir,
        resume_from=resume_from,
        fork_from=fork_from,
        spent_before=spent_before,
        known_branches=known_branches,
        secrets_dir=secrets_dir,
        charge=charge,
        charge_counts=charge_counts,
        on_checkpoint=on_checkpoint,
        on_step=on_step,
        num_devices=num_devices,
    )
    return cast(Generator[TrialReport], reports)  # nobody waits in a pack of none


def packed_reports(
    pack: Pack,
    config: TrialConfig,
    *,
    data_home: Path,
    checkpoint_dir: Path | None = None,
    resume_from: Path | None = None,
    fork_from: Path | None = None,
    spent_before: Sequence[Mechanism] = (),
    known_branches: Sequence[Branch] = (),
    secrets_dir: Path | None = None,
    charge: ChargeFn | None = None,
    charge_counts: CountChargeFn | None = None,
    on_checkpoint: OnCheckpoint | None = None,
    on_step: OnStep | None = None,
    num_devices: int | None = 1,
) -> Generator[TrialReport | None]:
    """As `trial_reports`, for one of several trials in a ``pack`` that take their steps together.

    Yields:
        Reports, and None where the trial waits for `Pack.run`.

    Raises:
        PackTooLarge: The trials do not fit on the device together. What was not charged may be
            taken again, alone.
    """
    counts = config.evaluation.noise_multiplier is not None
    for name, before in (
        ("resume_from", resume_from),
        ("fork_from", fork_from),
        ("known_branches", known_branches),
    ):
        if not before:
            continue
        if charge is None:
            raise ConfigError(
                f"{name} without charge: the steps of earlier branches must be accounted "
                "for; pass the ledger's charge function"
            )
        if counts and charge_counts is None:
            raise ConfigError(
                f"{name} without charge_counts: earlier counts must be accounted for; pass the "
                "ledger's charge function"
            )
    charge = charge or (lambda branch, step: step)
    charge_counts = charge_counts or (lambda branch, step, counts: counts)
    with contextlib.ExitStack() as stack:
        trial = Trial(
            config,
            data_home,
            topology(num_devices),
            spent_before=spent_before,
            lanes=pack.free,
        )
        stack.callback(trial.close)
        agreed, leads = trial.topology.agreed, trial.topology.leads
        writer = stack.enter_context(
            CheckpointWriter(checkpoint_dir if leads else None, on_checkpoint=on_checkpoint)
        )

        def between_steps(step: int) -> None:
            if trial.topology.is_one_process:  # others would wait for one that stops here
                writer.poll()
            if on_step is not None:
                on_step(step)

        def charge_steps(branch: Branch, step: int) -> int:
            writer.finish()
            return charge(branch, step)

        at = trial.start(
            resume_from, secrets_dir, fork_from=fork_from, known_branches=known_branches
        )
        stack.enter_context(pack.holding(trial))
        for step in _report_steps(at.step, config.iterations, config.report_every_steps):
            at = yield from pack.advance(trial, at, step, between_steps)
            branch = at.branch
            charged = agreed(lambda branch=branch, step=step: charge_steps(branch, step))
            counted = 0
            if counts:
                so_far = _num_reports(branch.start_step, step, config) * config.counts_per_report
                counted = agreed(
                    lambda branch=branch, step=step, n=so_far: charge_counts(branch, step, n)
                )
            utilities = yield from pack.utilities(trial, at)
            report = trial.report(at, charged, counted, utilities)
            writer.save(lambda at=at: trial.checkpoint(at))
            if report.outcome == "running":
                yield report
                continue
            writer.finish()
            yield report
            # Only now: if the report was lost on its way, the steps can be taken again.
            if secrets_dir is not None and leads:
                for ended in (branch, *known_branches):
                    forget_root(secrets_dir, ended.branch_id)
            return


def _report_steps(start: int, iterations: int, every: int) -> Iterator[int]:
    """The steps after ``start`` at which a trial reports: multiples of ``every``, and the end."""
    yield from range(start - start % every + every, iterations, every)
    if start < iterations:
        yield iterations


def _num_reports(start: int, step: int, config: TrialConfig) -> int:
    """How many reports a branch has made by one of its report steps."""
    every = config.report_every_steps
    return step // every - start // every + (step % every > 0)
