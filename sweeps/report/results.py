"""What a sweep has to show, read from the database.

`read_results` gives the same answer while a sweep runs, after it, and years later; the table, the
picture and the JSON are three ways to look at it.
"""

import dataclasses
import math
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

    @property
    def best_first(self) -> tuple[TrialSummary, ...]:
        """Trials by falling utility, cheaper first among equals; the rest in their order."""
        order = {state: rank for rank, state in enumerate(_WITHOUT_UTILITY_ORDER)}

        def rank(trial: TrialSummary) -> tuple[float, float, int, int]:
            if trial.eval_accuracy is None:
                return (math.inf, 0.0, order.get(trial.state, -1), trial.number)
            epsilon = math.inf if trial.epsilon is None else trial.epsilon
            return (-trial.eval_accuracy, epsilon, 0, trial.number)

        return tuple(sorted(self.trials, key=rank))

    @property
    def best(self) -> TrialSummary | None:
        """The trial with the highest utility at its last report, or None."""
        measured = [trial for trial in self.best_first if trial.eval_accuracy is not None]
        return measured[0] if measured else None

    def count(self, state: TrialState) -> int:
        """How many trials are in a state."""
        return sum(trial.state is state for trial in self.trials)


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
            )
            for row in store.trials(sweep_id)
        ),
    )
