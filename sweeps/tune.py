"""Ray Tune, as an executor and nothing more. The only module that imports it.

Tune is handed the ids of admitted trials. A worker looks up everything else in the database,
charges there before it reports, and records there how its trial ended; Tune's own files are a
cache that may be lost. What Tune decides by itself, that a scheduler prunes a trial or that a
worker died, reaches the database through `_Recorder`.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# Ray's annotations are partial.

import logging
import os
import socket
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import DONE
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from sweeps.database.states import TrialState
from sweeps.database.store import Attempt, Store, open_store
from sweeps.database.tables import METRICS
from sweeps.errors import FencedError
from sweeps.home import Home
from sweeps.spec.sweep_spec import AsyncHyperBandSpec, SweepSpec
from sweeps.user_models import check_model_allowed
from trainer.reporting import TrialReport, releasable

_TRIAL_ID = "trial_id"
_METRIC = "eval_accuracy"
_STEP = "step"
_MAX_REASON_CHARS = 500
# A result that ends the trial for Tune; before any rung, so that no scheduler compares it.
_NOTHING_MORE = {DONE: True, _STEP: 0, _METRIC: 0.0}


def run_trials(
    spec: SweepSpec,
    *,
    sweep_id: str,
    trial_ids: Sequence[str],
    max_iterations: int,
    store: Store,
    home: Home,
    resources: Mapping[str, float],
) -> None:
    """Runs admitted trials to their ends on the connected Ray.

    Args:
        spec: The sweep.
        sweep_id: Its id.
        trial_ids: The admitted trials, in the order in which they start.
        max_iterations: The most iterations that any of them has.
        store: The driver's own.
        home: State, the same for the workers.
        resources: Of one worker, in Ray's form.

    Raises:
        KeyboardInterrupt: If the person stops the sweep; running workers end with Ray.
    """
    _quieten()
    trainable = tune.with_resources(_Worker, dict(resources))
    tuner = tune.Tuner(
        trainable,
        param_space={_TRIAL_ID: tune.grid_search(list(trial_ids))},
        tune_config=tune.TuneConfig(
            metric=_METRIC,
            mode="max",
            scheduler=_scheduler(spec, max_iterations),
            max_concurrent_trials=spec.resources.max_concurrent_trials,
            reuse_actors=True,
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(home.sweep_dir(sweep_id)),
            callbacks=[_Recorder(store, spec)],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    tuner.fit()


class _Worker(tune.Trainable):
    """One process that runs trials one after another, with its compiled programs kept.

    Tune may set an actor up for a trial and then give that trial to another actor, so nothing is
    begun before the first step is asked for.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._home = Home.from_environment()
        self._store = open_store(self._home)
        self._assign(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._assign(new_config)
        return True

    def _assign(self, config: dict[str, Any]) -> None:
        self._trial_id: str = config[_TRIAL_ID]
        self._attempt: Attempt | None = None
        self._reports: Iterator[TrialReport] | None = None

    def step(self) -> dict[str, Any]:
        """Runs up to the next report; a failure ends the trial, and not the worker."""
        try:
            report = self._next_report()
        except FencedError:
            return dict(_NOTHING_MORE)  # another attempt has the trial, or it has ended
        except Exception as error:
            self._record_failure(error)
            return dict(_NOTHING_MORE)
        return {DONE: report.outcome != "running", **releasable(report)}

    def _next_report(self) -> TrialReport:
        if self._attempt is None or self._reports is None:
            self._attempt, self._reports = self._begin()
        report = next(self._reports)
        released = releasable(report)
        metrics = {name: released[name] for name in METRICS if name in released}
        self._store.add_report(self._attempt, report.step, metrics)
        if report.outcome == "completed":
            self._store.finish_attempt(self._attempt, TrialState.COMPLETED)
        elif report.outcome == "diverged":
            self._store.finish_attempt(
                self._attempt,
                TrialState.DIVERGED,
                f"the parameters were no longer finite at step {report.step}",
            )
        return report

    def _begin(self) -> tuple[Attempt, Iterator[TrialReport]]:
        from trainer.loop import trial_reports  # JAX: only here, in the worker's environment

        assignment = self._store.assignment(self._trial_id)
        check_model_allowed(assignment.config.model.name)
        worker = f"{socket.gethostname()}:{os.getpid()}"
        attempt = self._store.begin_attempt(self._trial_id, worker=worker)
        return attempt, trial_reports(
            assignment.config,
            data_home=self._home.data_dir,
            checkpoint_dir=self._home.checkpoint_dir(assignment.sweep_id, self._trial_id),
            charge=lambda _, step: self._store.charge(attempt, step),
            num_devices=None,  # Ray shows a worker what it was given, and no more
        )

    def _record_failure(self, error: Exception) -> None:
        summary = f"{type(error).__name__}: {error}".strip()[:_MAX_REASON_CHARS]
        log = Path(str(self.logdir)) / "error.txt"
        log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        self._store.end_trial(self._trial_id, TrialState.FAILED, f"{summary} (see {log})")


class _Recorder(tune.Callback):
    """Writes down what Tune alone knows. `Store.end_trial` leaves ended trials as they are."""

    def __init__(self, store: Store, spec: SweepSpec) -> None:
        self._store = store
        self._scheduler = spec.scheduler

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks in order to restore them, which we never do."""
        return {}

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        result: dict[str, Any] = trial.last_result or {}
        step, accuracy = result.get(_STEP), result.get(_METRIC)
        reason = f"eval_accuracy {accuracy:.4f} at step {step}" if accuracy is not None else ""
        if isinstance(self._scheduler, AsyncHyperBandSpec):
            reason += f" was not among the best 1/{self._scheduler.reduction_factor} of its rung"
        self._store.end_trial(str(trial.config[_TRIAL_ID]), TrialState.PRUNED, reason)

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._store.end_trial(
            str(trial.config[_TRIAL_ID]),
            TrialState.FAILED,
            "its worker died; what it was charged stays charged",
        )


def _trial_id(trial: Trial) -> str:
    return str(trial.config[_TRIAL_ID])


def _scheduler(spec: SweepSpec, max_iterations: int) -> TrialScheduler:
    """The scheduler a spec names, counting our steps: Tune's own count restarts with a trial."""
    scheduler = spec.scheduler
    if isinstance(scheduler, AsyncHyperBandSpec):
        return AsyncHyperBandScheduler(
            time_attr=_STEP,
            max_t=max_iterations,
            grace_period=scheduler.grace_period,
            reduction_factor=scheduler.reduction_factor,
        )
    return FIFOScheduler()


def _quieten() -> None:
    """Leaves the terminal to our own view, and interrupts to our own handling."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
