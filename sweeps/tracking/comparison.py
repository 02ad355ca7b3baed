"""Holds what MLflow has of a sweep to what it was told: every run, every value, once.

What was delivered must be there. What was not yet delivered may be: a process can die after MLflow
took a message and before that is noted.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sweeps.database.states import TrialState
from sweeps.tracking import disclosure
from sweeps.tracking.mlflow_client import Mlflow, Run

Value = str | int | float | None
_Points = collections.Counter[tuple[int, float, int]]
_MAX_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two records that do not agree.

    Attributes:
        trial_id: Of which trial; None: of the sweep as a whole.
        what: What was looked at.
        expected: What it should be by one record.
        found: What it is by the other.
    """

    trial_id: str | None
    what: str
    expected: Value
    found: Value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """A message of the outbox, as far as MLflow's side of it can be seen.

    Attributes:
        trial_id: Of which trial; None: of the sweep itself.
        kind: What it tells.
        payload: Of it.
        created_at: Seconds since the epoch.
        is_delivered: Whether it is noted that MLflow has it.
    """

    trial_id: str | None
    kind: str
    payload: Mapping[str, Any]
    created_at: float
    is_delivered: bool


def differences(
    mlflow: Mlflow,
    sweep_id: str,
    trials: Mapping[str, TrialState],
    told: Sequence[Told],
    on_trial: Callable[[], None],
) -> list[Difference]:
    """What MLflow has of a sweep that it should not have, and what it lacks.

    Nobody may deliver meanwhile.

    Args:
        mlflow: The connection.
        sweep_id: The sweep.
        trials: The state of each of its trials.
        told: All messages about the sweep, oldest first.
        on_trial: Called after every trial.

    Raises:
        TrackingError: If MLflow cannot be reached, or refused.
    """
    runs: dict[str | None, list[Run]] = collections.defaultdict(list)
    for run in mlflow.find_runs(mlflow.experiment_ids(), disclosure.SWEEP_ID, sweep_id):
        runs[run.tags.get(disclosure.TRIAL_ID)].append(run)
    messages: dict[str | None, list[Told]] = collections.defaultdict(list)
    for message in told:
        messages[message.trial_id].append(message)
    found: list[Difference] = []
    for key in (None, *trials):
        has_run = key is None or trials[key] is not TrialState.REJECTED
        found += _of_run(mlflow, key, has_run, runs.pop(key, []), messages[key])
        if key is not None:
            on_trial()
    for key, strangers in runs.items():
        found.append(Difference(key, "MLflow runs of a trial not in the sweep", 0, len(strangers)))
    return found


def _of_run(
    mlflow: Mlflow,
    trial_id: str | None,
    has_run: bool,
    runs: Sequence[Run],
    messages: Sequence[Told],
) -> list[Difference]:
    pending = [message for message in messages if not message.is_delivered]
    wanted = int(has_run)
    if len(runs) != wanted and not (not runs and len(pending) == len(messages)):
        return [Difference(trial_id, "MLflow runs", wanted, len(runs))]
    if not runs:
        return []
    (run,) = runs
    found: list[Difference] = []
    if not pending and run.status != (status := _status(messages)):
        found.append(Difference(trial_id, "MLflow run's status", status, run.status))
    if trial_id is not None:  # a sweep's own metrics sum up its trials
        found += _of_history(mlflow, trial_id, run, messages)
    return found


def _status(messages: Sequence[Told]) -> str:
    status = "RUNNING"
    for message in messages:
        if message.kind in ("trial_end", "sweep_end"):
            status = disclosure.status(message.payload["state"])
        elif message.kind in ("trial_resume", "sweep_resume"):
            status = "RUNNING"
    return status


def _of_history(
    mlflow: Mlflow, trial_id: str, run: Run, messages: Sequence[Told]
) -> list[Difference]:
    delivered: dict[str, _Points] = collections.defaultdict(collections.Counter)
    pending: dict[str, _Points] = collections.defaultdict(collections.Counter)
    for message in messages:
        if message.kind != "metrics":
            continue
        points = delivered if message.is_delivered else pending
        for name, value, millis, step in disclosure.metrics(message.payload, message.created_at):
            # One row of MLflow's: two branches may say the same in the same millisecond.
            points[name][step, value, millis] = 1
    found: list[Difference] = []
    for name in sorted({*delivered, *run.metric_names}):
        history: _Points = collections.Counter()
        if name in run.metric_names:
            history.update(mlflow.history(run.run_id, name))
        for what, points in (
            ("missing", delivered[name] - history),
            ("not told, or told once more", history - (delivered[name] | pending[name])),
        ):
            for step, value, millis in sorted(points)[:_MAX_SHOWN]:
                where = f"MLflow's {name} at step {step} ({millis} ms): {what}"
                missing = what == "missing"
                here, there = (value, None) if missing else (None, value)
                found.append(Difference(trial_id, where, here, there))
            if (left := len(points) - _MAX_SHOWN) > 0:
                found.append(Difference(trial_id, f"MLflow's {name}: {what}, further", 0, left))
    return found
