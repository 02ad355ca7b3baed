"""Ray Tune, as an executor and nothing more. The only module that imports it.

Tune is handed the ids of trials. A worker looks up everything else in the database, charges there
before it reports, and records there how its trial ended; what a scheduler decides is recorded
there, too, before Tune hears of it. Tune's own files are a cache that is thrown away.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# Ray's annotations are partial.

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import DONE
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from sweeps.database.store import open_store
from sweeps.errors import DatabaseError, StoreError, SweepError
from sweeps.home import Home
from sweeps.pack_run import PackRun
from sweeps.schedule import Schedule
from sweeps.selection_run import SelectionRun
from sweeps.spec.resources_spec import ResourcesSpec
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.trial_queue import TrialQueue
from trainer.reporting import releasable

_LOG = logging.getLogger(__name__)
_TRIAL_IDS, _WIDTH = "trial_ids", "width"
_REPORTED = "reported"
_METRIC = "eval_accuracy"
_STEP = "step"
_LOOK_EVERY_SECS = 0.5
# A result that ends the trial for Tune.
_NOTHING_MORE = {DONE: True, _STEP: 0, _METRIC: 0.0, _REPORTED: ()}


def run_trials(
    spec: SweepSpec,
    *,
    queue: TrialQueue,
    schedule: Schedule,
    folder: Path,
    resources: Mapping[str, float],
    is_over: Callable[[], bool],
) -> None:
    """Runs trials until each has ended, was put aside, or was left where it was.

    Args:
        spec: The sweep.
        queue: Hands out the trials.
        schedule: Decides on them at their reports.
        folder: For Tune's files; removed at the end.
        resources: Of one worker, in Ray's form.
        is_over: Asked now and then; when it says so, whatever still runs is killed.

    Raises:
        SweepError: If the queue could not go on; what ran has been left to run to its end.
        KeyboardInterrupt: If the person stops the sweep; running workers end with Ray.
    """
    _quieten()
    worker = _Selector if spec.privacy.policy == "private_selection" else _Worker
    trainable = tune.with_resources(worker, dict(resources))
    given = _Given(queue, spec.resources)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=given,
            num_samples=-1,  # until there is none
            metric=_METRIC,
            mode="max",
            scheduler=_Decided(schedule),
            max_concurrent_trials=spec.resources.max_concurrent_trials,
            reuse_actors=True,
            trial_name_creator=lambda trial: _trial_ids(trial)[0],
            trial_dirname_creator=lambda trial: trial.trial_id,  # ours may come twice
        ),
        run_config=tune.RunConfig(
            name=folder.name,
            storage_path=str(folder.parent),
            stop=_Over(is_over),
            # Workers that die: `Attempts.begin` says when there were too many.
            failure_config=tune.FailureConfig(max_failures=-1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if given.error is not None:
        raise given.error


class _Worker(tune.Trainable):
    """One process that runs trials one after another, with its compiled programs kept.

    What Tune takes for one trial may be several of ours, which share a program.

    Tune may set an actor up for a trial and then give that trial to another actor, so nothing is
    begun before the first step is asked for.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._home = Home.from_environment()
        self._store = open_store(self._home)
        self._run = self._given(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._run.close()
        self._run = self._given(new_config)
        return True

    def _given(self, config: Mapping[str, Any]) -> PackRun:
        return PackRun(self._store, self._home, config[_TRIAL_IDS], config[_WIDTH])

    def step(self) -> dict[str, Any]:
        reports = self._run.next_reports()
        if not reports:
            return dict(_NOTHING_MORE)
        going = [each for each, report in reports.items() if report.outcome == "running"]
        *_, last = reports.values()
        return {DONE: self._run.is_over, _REPORTED: going, **releasable(last)}

    def cleanup(self) -> None:
        self._run.close()


class _Selector(_Worker):
    """One process that runs a private selection, of which Tune hears once: of the winner."""

    def _given(self, config: Mapping[str, Any]) -> PackRun:
        return PackRun(self._store, self._home, config[_TRIAL_IDS], 1, kind=SelectionRun)


class _Given(Searcher):
    """Hands out trials one by one, as there is room: Tune's own grid copies all of it for each.

    Args:
        queue: Hands out the trials.
        resources: How many workers there are, and how many trials each takes.

    Attributes:
        error: What ended it before there was none left; else None.
    """

    def __init__(self, queue: TrialQueue, resources: ResourcesSpec) -> None:
        super().__init__(metric=_METRIC, mode="max")
        self._queue, self._resources = queue, resources
        self._taken: dict[str, int] = {}
        self.error: SweepError | None = None

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        resources = self._resources
        try:
            width, workers = resources.trials_per_worker, resources.max_concurrent_trials
            if found := self._queue.take_pack(width, workers):
                self._taken[trial_id] = len(found)
                return {_TRIAL_IDS: found, _WIDTH: width}
            return Searcher.FINISHED if self._queue.is_over() else None
        except DatabaseError:  # away for a while: Tune asks again
            _LOG.exception("no trial could be taken up")
            return None
        except StoreError:  # somebody ended the sweep in this moment
            return Searcher.FINISHED
        except Exception as error:  # Tune would end whatever runs
            _LOG.exception("nothing more can be proposed")
            self.error = SweepError(f"nothing more can be proposed: {error}")
            return Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Whatever became of it is in the database."""
        self._queue.put_down(self._taken.pop(trial_id, 0))

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as below."""

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as below."""
        return {}


class _Over(tune.Stopper):
    """Ends everything once somebody says so, and no single trial."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._looked_at = time.monotonic()

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if time.monotonic() - self._looked_at < _LOOK_EVERY_SECS:
            return False
        self._looked_at = time.monotonic()
        with contextlib.suppress(Exception):  # the database may be away for a while
            return self._is_over()
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles it in order to restore it, which we never do."""
        return {}


class _Decided(FIFOScheduler):
    """Ends a trial where our own scheduler does not let it go on.

    Args:
        schedule: Decides, in the database.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self._schedule = schedule

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        goes_on = [self._decide(trial_id) for trial_id in result[_REPORTED]]
        # Of a pack the worker itself leaves out those that do not go on.
        stops = len(_trial_ids(trial)) == 1 and not all(goes_on)
        return TrialScheduler.STOP if stops else TrialScheduler.CONTINUE

    def _decide(self, trial_id: str) -> bool:
        try:
            return self._schedule.decide(trial_id)
        except Exception:  # decided at the next report, from this one
            _LOG.exception("trial %s: nothing was decided", trial_id)
            return True

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as above."""
        return {}


def _trial_ids(trial: Trial) -> list[str]:
    return trial.config[_TRIAL_IDS]


def _quieten() -> None:
    """Leaves the terminal to our own view, and interrupts to our own handling."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # It complains of its own state, which nobody reads; what counts is in the database.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
