"""What a sweep has to show, read from the database.

`read_results` gives the same answer while a sweep runs, after it, and years later; the table, the
picture and the JSON are three ways to look at it.

What is compared are configurations, not trials: one that was repeated is as good as the mean of
its repeats, for the best of them would only be the luckiest.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store
from sweeps.database.tables import METRICS
from sweeps.guarantee import guarantee


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """One report: privacy spent and utility reached after ``step`` steps.

    ``charged_iterations`` is what the trial had been charged by then, which is more than
    ``step`` once it has branched. A None stands for a number that was not finite, or for an
    average of the parameters that is not kept.
    """

    step: int
    charged_iterations: int
    epsilon: float | None
    eval_accuracy: float | None
    eval_loss: float | None
    ema_eval_accuracy: float | None = None
    ema_eval_loss: float | None = None
    polyak_eval_accuracy: float | None = None
    polyak_eval_loss: float | None = None


@dataclasses.dataclass(frozen=True)
class MeanPoint(CurvePoint):
    """The mean of several repeats' reports after the same number of steps.

    ``eval_accuracy_std`` is the sample standard deviation of their accuracies (over n - 1).
    ``charged_iterations`` and ``epsilon`` are the largest of them, None if one is None; averages
    of the parameters are left out.
    """

    eval_accuracy_std: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialSummary:
    """A trial as the report shows it.

    Attributes:
        trial_id: Unique.
        number: Place in the sweep, from 0.
        state: Where it is.
        reason: Why it was rejected, pruned or failed, else empty.
        config: The hyperparameters.
        planned_iterations: Iterations that it was decided on.
        planned_epsilon: Epsilon of all of them; None where no finite bound is known.
        charged_iterations: Iterations spent.
        curve: Its reports in order.
        mlflow_run_id: Its MLflow run, or None.
        parent_trial_id: Of a fork, the trial that it goes on from; else None.
        parent_step: The step from which it does.
        repeat_of: The first trial with its configuration, where it repeats that; else None.
        selects: Whether it stands for a private selection, whose winner it is once it has ended.
            Its iterations are then counted as the ledger does: 1 for all of it.
    """

    trial_id: str
    number: int
    state: TrialState
    reason: str
    config: dict[str, Any]
    planned_iterations: int
    planned_epsilon: float | None
    charged_iterations: int
    curve: tuple[CurvePoint, ...]
    mlflow_run_id: str | None
    parent_trial_id: str | None = None
    parent_step: int | None = None
    repeat_of: str | None = None
    selects: bool = False

    @property
    def is_secret(self) -> bool:
        """Whether how far it is may not be told: a private selection before its winner is out."""
        return self.selects and self.last is None

    @property
    def end_step(self) -> int:
        """The step at which it ends: counted on from its parent's, and each once."""
        return int(self.config.get("iterations", self.planned_iterations))

    @property
    def last(self) -> CurvePoint | None:
        """The last report, or None before the first."""
        return self.curve[-1] if self.curve else None

    @property
    def eval_accuracy(self) -> float | None:
        """Utility of what the trial ended with, in [0, 1]."""
        return self.last.eval_accuracy if self.last else None

    @property
    def epsilon(self) -> float | None:
        """Privacy spent so far; of a rejected trial, what it would have cost.

        A crash between charge and report leaves charged steps unreported; then the plan's
        epsilon, an upper bound, stands in.
        """
        if self.state is TrialState.REJECTED:
            return self.planned_epsilon
        if self.charged_iterations == 0:
            return 0.0
        if self.last is not None and self.last.charged_iterations == self.charged_iterations:
            return self.last.epsilon
        return self.planned_epsilon


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A configuration as the report shows it: its repeats, or the one trial that it has.

    Attributes:
        trials: At least one.
    """

    trials: tuple[TrialSummary, ...]

    @property
    def number(self) -> int:
        """The first of its trials' numbers."""
        return self.numbers[0]

    @property
    def numbers(self) -> list[int]:
        """Its trials' numbers, in order."""
        return sorted(trial.number for trial in self.trials)

    @property
    def config(self) -> dict[str, Any]:
        """The hyperparameters."""
        return self.trials[0].config

    @property
    def state(self) -> TrialState:
        """Its trials' state; where they differ, that of who has yet to end, or came least far."""
        states = {trial.state for trial in self.trials}
        return min(states, key=_LEAST_FAR_FIRST.index)

    @property
    def reason(self) -> str:
        """Why trials of it were rejected, pruned or failed, each reason once."""
        return "; ".join(dict.fromkeys(t.reason for t in self.trials if t.reason))

    @property
    def planned_epsilon(self) -> float | None:
        """What each of its trials would cost by itself; None where no finite bound is known."""
        return self.trials[0].planned_epsilon

    @property
    def end_step(self) -> int:
        """The step at which its trials end; at which the last does, if one was given more."""
        return max(trial.end_step for trial in self.trials)

    @functools.cached_property
    def curve(self) -> tuple[CurvePoint, ...]:
        """Of one trial, its reports; of several, their means, as far as all of them have come.

        A repeat that has reported no accuracy at all does not count: see `measured`.
        """
        if len(self.trials) == 1:
            return self.trials[0].curve
        curves = [
            {report.step: report for report in trial.curve if report.eval_accuracy is not None}
            for trial in self.measured
        ]
        common = set[int]().union(*curves).intersection(*curves)
        return tuple(_mean([curve[step] for curve in curves]) for step in sorted(common))

    @property
    def measured(self) -> tuple[TrialSummary, ...]:
        """The trials that have reported an accuracy: those of which `curve` is the mean."""
        return tuple(
            trial
            for trial in self.trials
            if any(report.eval_accuracy is not None for report in trial.curve)
        )

    @property
    def last(self) -> CurvePoint | None:
        """The end of its curve, or None before the first report."""
        return self.curve[-1] if self.curve else None

    @property
    def eval_accuracy(self) -> float | None:
        """Utility in [0, 1]: the mean where its curve ends."""
        return self.last.eval_accuracy if self.last else None

    @property
    def eval_accuracy_std(self) -> float | None:
        """The standard deviation of that; None of a single trial."""
        return self.last.eval_accuracy_std if isinstance(self.last, MeanPoint) else None

    @property
    def epsilon(self) -> float | None:
        """The most that one of its trials has spent, or would have if it was rejected."""
        return _largest([trial.epsilon for trial in self.trials])


def _mean(reports: Sequence[CurvePoint]) -> CurvePoint:
    accuracies = [r.eval_accuracy for r in reports if r.eval_accuracy is not None]
    losses = [r.eval_loss for r in reports if r.eval_loss is not None]
    return MeanPoint(
        step=reports[0].step,
        charged_iterations=max(report.charged_iterations for report in reports),
        epsilon=_largest([report.epsilon for report in reports]),
        eval_accuracy=statistics.fmean(accuracies),
        eval_loss=statistics.fmean(losses) if len(losses) == len(reports) else None,
        eval_accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
    )


def _largest(numbers: Sequence[float | None]) -> float | None:
    """The largest, or None if one is None, which stands for infinity."""
    known = [number for number in numbers if number is not None]
    return max(known) if len(known) == len(numbers) else None


def _rank(one: TrialSummary | Configuration) -> tuple[float, float, int, int]:
    """Sorts by falling utility, cheaper first among equals; the rest in their order."""
    if one.eval_accuracy is None:
        order = _WITHOUT_UTILITY_ORDER
        place = order.index(one.state) if one.state in order else -1
        return (math.inf, 0.0, place, one.number)
    return (-one.eval_accuracy, math.inf if one.epsilon is None else one.epsilon, 0, one.number)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResults:
    """A sweep and its trials, by number.

    Attributes:
        sweep_id: Unique.
        name: From the spec.
        state: Where it is.
        spec: The specification as plain JSON.
        spec_hash: SHA-256 of it.
        dataset: TFDS name and version.
        created_at: Seconds since the epoch.
        ended_at: Likewise, or None.
        mlflow_run_id: The parent run, or None while MLflow does not have it.
        trials: By number.
    """

    sweep_id: str
    name: str
    state: SweepState
    spec: dict[str, Any]
    spec_hash: str
    dataset: str
    created_at: float
    ended_at: float | None
    mlflow_run_id: str | None
    trials: tuple[TrialSummary, ...]

    @property
    def privacy(self) -> dict[str, Any]:
        """The spec's privacy section: policy, target_epsilon, target_delta and the rest."""
        return self.spec["privacy"]

    @property
    def guarantee(self) -> str:
        """What the sweep's policy promises, in words."""
        return guarantee(self.spec)

    @functools.cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """The trials, repeats of one configuration together; best first."""
        repeats: dict[str, list[TrialSummary]] = {}
        for trial in self.trials:
            repeats.setdefault(trial.repeat_of or trial.trial_id, []).append(trial)
        found = [Configuration(tuple(sorted(each, key=_rank))) for each in repeats.values()]
        return tuple(sorted(found, key=_rank))

    @property
    def best_first(self) -> tuple[TrialSummary, ...]:
        """Trials by their configuration, and of one by falling utility, as `_rank` has it."""
        return tuple(trial for each in self.configurations for trial in each.trials)

    @property
    def best(self) -> Configuration | None:
        """The configuration with the highest utility, or None."""
        measured = [each for each in self.configurations if each.eval_accuracy is not None]
        return measured[0] if measured else None

    def count(self, state: TrialState) -> int:
        """How many trials are in a state."""
        return sum(trial.state is state for trial in self.trials)


_LEAST_FAR_FIRST = (
    TrialState.RUNNING,
    TrialState.PAUSED,
    TrialState.ADMITTED,
    TrialState.QUEUED,
    TrialState.DIVERGED,
    TrialState.FAILED,
    TrialState.CANCELLED,
    TrialState.PRUNED,
    TrialState.COMPLETED,
    TrialState.REJECTED,
)
_WITHOUT_UTILITY_ORDER = (
    TrialState.RUNNING,
    TrialState.ADMITTED,
    TrialState.QUEUED,
    TrialState.FAILED,
    TrialState.CANCELLED,
    TrialState.REJECTED,
)


def read_results(store: Store, sweep_id: str) -> SweepResults:
    """Reads a sweep.

    Raises:
        StoreError: If there is none of this id.
    """
    sweep = store.sweep(sweep_id)
    curves: dict[str, list[CurvePoint]] = {}
    for row in store.reports(sweep_id):
        metrics = {name: getattr(row, name) for name in METRICS}
        point = CurvePoint(step=row.step, charged_iterations=row.charged_iterations, **metrics)
        curves.setdefault(row.trial_id, []).append(point)
    return SweepResults(
        sweep_id=sweep.sweep_id,
        name=sweep.name,
        state=SweepState(sweep.state),
        spec=sweep.spec,
        spec_hash=sweep.spec_hash,
        dataset=sweep.dataset,
        created_at=sweep.created_at,
        ended_at=sweep.ended_at,
        mlflow_run_id=sweep.mlflow_run_id,
        trials=tuple(
            TrialSummary(
                trial_id=row.trial_id,
                number=row.number,
                state=TrialState(row.state),
                reason=row.reason,
                config=row.config,
                planned_iterations=row.planned_iterations,
                planned_epsilon=row.planned_epsilon,
                charged_iterations=row.charged_iterations,
                curve=tuple(curves.get(row.trial_id, ())),
                mlflow_run_id=row.mlflow_run_id,
                parent_trial_id=row.parent_trial_id,
                parent_step=row.parent_step,
                repeat_of=row.repeat_of,
                selects=sweep.spec["privacy"]["policy"] == "private_selection",
            )
            for row in store.trials(sweep_id)
        ),
    )
