"""A trial from start to end.

    run a segment -> charge its steps (durable) -> evaluate -> checkpoint -> report

The order is the guarantee: until `ChargeFn` returns, nothing that depends on the segment's
batches has left this module. `trial_reports` yields after every segment, so whoever drives it
can stop a trial by not asking for more; `run_trial` drives it to its end.
"""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import accounting
from trainer.checkpoints import (
    Manifest,
    architecture,
    check_initial_params,
    config_digest,
    load_opt_state,
    load_params,
    read_manifest,
    save_checkpoint,
)
from trainer.config import DataConfig, TrialConfig
from trainer.datasets import Dataset, Examples, load
from trainer.device_memory import is_out_of_memory
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation import all_finite, evaluate
from trainer.keys import BranchKeys
from trainer.models import init_params, make_model
from trainer.optimizers import make_optimizer
from trainer.plan import make_plan
from trainer.reporting import Outcome, TrialReport
from trainer.segment import QuantileTraced, Rows, Traced, TrainState, draw_rows, make_segment

LOGGER = logging.getLogger("trainer")

ChargeFn = Callable[[int], int]
"""Makes "this branch has taken ``step`` steps" durable, and returns how many iterations the
whole trial has been charged by now, earlier branches included. Raises to stop the trial."""

ReportFn = Callable[[TrialReport], None]

# Longer segments save dispatches and cost memory for their rows; past this there is no gain.
_MAX_SEGMENT_STEPS = 100


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
    charge: ChargeFn | None = None,
    on_report: ReportFn | None = None,
) -> TrialResult:
    """Runs one trial to its end.

    Args:
        config: The trial.
        data_home: Where built-in data sets are kept (`trainer.datasets`).
        checkpoint_dir: Directory for checkpoints, ``step-<n>`` each, of which the newest is
            kept. None writes none.
        resume_from: A checkpoint of the same configuration to go on from, with new keys.
        charge: See `ChargeFn`. None counts in memory: the caller is the ledger.
        on_report: Called with every report.

    Returns:
        The last report and where the last checkpoint is.

    Raises:
        ConfigError: If ``resume_from`` comes without ``charge``: the steps that its earlier
            branches took would go unaccounted.
        DatasetError: If the data set cannot be read.
        CheckpointError: If a checkpoint is damaged or of another configuration.
    """
    report = None
    for report in trial_reports(
        config,
        data_home=data_home,
        checkpoint_dir=checkpoint_dir,
        resume_from=resume_from,
        charge=charge,
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
    charge: ChargeFn | None = None,
) -> Generator[TrialReport]:
    """Runs a trial lazily, one report at a time; arguments and errors as in `run_trial`.

    Yields:
        A report after every ``report_every_steps`` steps and one at the end. Asking for the
        next one runs the next segment; the last has an outcome other than ``running``.
    """
    if charge is None:
        if resume_from is not None:
            raise ConfigError(
                "resume_from without charge: the steps of earlier branches must be accounted "
                "for; pass the ledger's charge function"
            )
        charge = lambda step: step
    trial = _Trial(config, _on_device(config.data, data_home))
    state, start = trial.start(resume_from)
    keys = BranchKeys()
    for step in _report_steps(start, config.iterations, config.report_every_steps):
        state = trial.advance(state, keys, start, step)
        charged = charge(step)
        report = trial.report(state, step, charged)
        if checkpoint_dir is not None:
            trial.save(checkpoint_dir, state, step)
        yield report
        if report.outcome == "diverged":
            return
        start = step


def checkpoint_path(checkpoint_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoint_dir / f"step-{step:08d}"


class _Trial:
    """What stays the same from a trial's first step to its last."""

    def __init__(self, config: TrialConfig, data: Dataset) -> None:
        self.config = config
        self.data = data
        info = data.info
        self.plan = make_plan(config, info.num_train)
        self.model = make_model(config.model, info.num_classes)
        clipping = config.clipping
        self.microbatch_size = clipping.microbatch_size
        self.has_fitted = False
        self.architecture = architecture(config.model, info.image_shape, info.num_classes)
        self.traced = Traced(
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            noise_multiplier=self.plan.grad_noise_multiplier,
            expected_batch_size=self.plan.expected_batch_size,
            quantile=None
            if self.plan.count_noise_stddev is None
            else QuantileTraced(
                target_quantile=clipping.target_quantile,
                learning_rate=clipping.learning_rate,
                count_noise_stddev=self.plan.count_noise_stddev,
            ),
        )
        self.steps_per_call = min(config.report_every_steps, _MAX_SEGMENT_STEPS)

    def start(self, resume_from: Path | None) -> tuple[TrainState, int]:
        """The state to begin with and how many steps it has behind it."""
        config, info = self.config, self.data.info
        params = init_params(self.model, info.image_shape, config.seed)
        opt_state = make_optimizer(config.optimizer, config.learning_rate).init(params)
        clip_norm = self.plan.l2_clip_norm
        if resume_from is not None:
            manifest = read_manifest(resume_from)
            self._check_same_trial(resume_from, manifest)
            params = load_params(resume_from, params)
            opt_state = load_opt_state(resume_from, opt_state)
            # A checkpoint that knows none is of a trial whose clip norm never changed.
            clip_norm = clip_norm if manifest.l2_clip_norm is None else manifest.l2_clip_norm
            state = TrainState(params, opt_state, jnp.float32(clip_norm))
            return jax.device_put(state), manifest.step
        if config.model.init_from is not None:
            path = Path(config.model.init_from)
            check_initial_params(path, self.architecture, info.fingerprint)
            params = jax.device_put(load_params(path, params))
        return TrainState(params, opt_state, jnp.float32(clip_norm)), 0

    def _check_same_trial(self, path: Path, manifest: Manifest) -> None:
        ours = (config_digest(self.config), self.data.info.fingerprint, self.architecture)
        if ours != (manifest.config_digest, manifest.dataset_fingerprint, manifest.architecture):
            raise CheckpointError(
                f"checkpoint {str(path)!r}: belongs to another configuration or data set; "
                "allowed is one of this trial (iterations, report_every_steps, clipping.engine "
                "and clipping.microbatch_size may differ)"
            )

    def advance(self, state: TrainState, keys: BranchKeys, start: int, stop: int) -> TrainState:
        """Takes steps ``start + 1 .. stop``."""
        for begin in range(start, stop, self.steps_per_call):
            end = min(begin + self.steps_per_call, stop)
            rows = draw_rows(self.plan, keys, begin, end, multiple=self.steps_per_call)
            for part in rows.split(self.steps_per_call):
                state = self._run(state, part)
        return state

    def _run(self, state: TrainState, rows: Rows) -> TrainState:
        """Takes the steps in some rows, with smaller microbatches if the memory is too short.

        That changes neither the batch nor its noise. Only the first call can fail so: all
        others want as much memory as that did.
        """
        train = self.data.train
        if self.has_fitted:
            return self._segment()(state, train.images, train.labels, rows, self.traced)
        # The state is donated, so it may be gone when the program fails.
        spare = jax.device_get(state)
        while True:
            try:
                taken = self._segment()(state, train.images, train.labels, rows, self.traced)
                self.has_fitted = True
                return jax.block_until_ready(taken)
            except jax.errors.JaxRuntimeError as error:
                size = self.microbatch_size or self.plan.sampler.capacity
                if not is_out_of_memory(error) or size == 1:
                    raise
                self.microbatch_size = size // 2
            LOGGER.warning(
                "out of memory with %d examples at a time; going on with %d",
                size,
                self.microbatch_size,
            )
            state = jax.device_put(spare)

    def _segment(self) -> Any:
        config = self.config
        return make_segment(
            self.model,
            config.optimizer,
            config.clipping.mode,
            config.clipping.engine,
            self.microbatch_size,
        )

    def report(self, state: TrainState, step: int, charged: int) -> TrialReport:
        """Measures the parameters after ``step`` steps, ``charged`` iterations being spent."""
        held_out = self.data.eval
        accuracy, loss = evaluate(self.model, state.params, held_out.images, held_out.labels)
        outcome: Outcome = "running" if step < self.config.iterations else "completed"
        if not all_finite(state.params):
            outcome = "diverged"
        return TrialReport(
            step=step,
            epsilon=accounting.epsilon(
                self.plan.mechanism.after(charged),
                delta=self.config.target_delta,
                accountant=self.config.accountant,
            ),
            delta=self.config.target_delta,
            eval_accuracy=accuracy,
            eval_loss=loss,
            l2_clip_norm=float(state.l2_clip_norm),
            outcome=outcome,
        )

    def save(self, checkpoint_dir: Path, state: TrainState, step: int) -> None:
        """Writes the checkpoint of a step, then drops those before it."""
        newest = checkpoint_path(checkpoint_dir, step)
        save_checkpoint(
            newest,
            params=state.params,
            opt_state=state.opt_state,
            l2_clip_norm=float(state.l2_clip_norm),
            step=step,
            architecture=self.architecture,
            dataset_fingerprint=self.data.info.fingerprint,
            config_digest=config_digest(self.config),
        )
        for older in checkpoint_dir.glob("step-*"):
            if older < newest:
                shutil.rmtree(older, ignore_errors=True)


@functools.lru_cache(maxsize=2)
def _on_device(config: DataConfig, data_home: Path) -> Dataset:
    """A data set with its arrays on the device, kept for the trials that follow."""
    data = load(config, data_home)
    parts = {
        name: Examples(images=jax.device_put(part.images), labels=jax.device_put(part.labels))
        for name, part in (("train", data.train), ("eval", data.eval))
    }
    return dataclasses.replace(data, **parts)


def _report_steps(start: int, iterations: int, every: int) -> Iterator[int]:
    """The steps after ``start`` at which a trial reports: multiples of ``every``, and the end."""
    yield from range(start - start % every + every, iterations, every)
    if start < iterations:
        yield iterations
