"""What MLflow is told of a sweep and its trials: a list, and nothing that is not on it.

Whatever else the rows hold, the fingerprint of the data or a field that a later version adds,
stays in the database. Metrics of the evaluation split are public by the sweep's own declaration,
epsilon is a number about the mechanism, and hyperparameters come from the spec.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from sweeps.database.outbox_rows import Message
from sweeps.database.states import TrialState
from sweeps.errors import RefusedError
from sweeps.guarantee import privacy_unit, sampling
from sweeps.report.results import SweepResults

TAG = "dp_sweeps."
SWEEP_ID = TAG + "sweep_id"
TRIAL_ID = TAG + "trial_id"
PARENT_TRIAL_ID = TAG + "parent_trial_id"
PARENT_STEP = TAG + "parent_step"
CONFIGURATION = TAG + "configuration"
STATE = TAG + "state"
REASON = TAG + "reason"
ITERATIONS = TAG + "iterations"
MISSING_ARTIFACTS = TAG + "missing_artifacts"
METRICS = (
    "epsilon",
    "eval_accuracy",
    "eval_loss",
    "ema_eval_accuracy",
    "ema_eval_loss",
    "polyak_eval_accuracy",
    "polyak_eval_loss",
)
HYPERPARAMETERS = (
    "optimizer",
    "learning_rate",
    "expected_batch_size",
    "iterations",
    "noise_multiplier",
    "l2_clip_norm",
    "weight_decay",
    "learning_rate_schedule",
    "warmup_steps",
    "sampling_prob",
    "proxy_expected_batch_size",
    "proxy_noise_multiplier",
    "real_epsilon",
)
PRIVACY = ("policy", "target_epsilon", "target_delta", "accountant", "neighboring_relation")

# Section and field of the specification, the parameter that tells it, and the value at which it
# does nothing and is left out.
TRAINING = (
    ("mechanism", "bands", "bands", 1),
    ("mechanism", "truncated_batch_size", "truncated_batch_size", None),
    ("mechanism", "examples_per_user", "examples_per_user", None),
    ("augmentation", "views", "augmentation_views", 1),
    ("augmentation", "flip", "augmentation_flip", False),
    ("augmentation", "crop_padding", "augmentation_crop_padding", 0),
    ("averaging", "ema_decay", "ema_decay", None),
    ("averaging", "polyak", "polyak", False),
)

_DESCRIPTION = "mlflow.note.content"  # shown on top of a run's page
_STATUS = {  # else FAILED
    "COMPLETED": "FINISHED",
    "PRUNED": "KILLED",
    "CANCELLED": "KILLED",
    "PAUSED": "SCHEDULED",
}


@dataclasses.dataclass
class Update:
    """What messages add to one run.

    Attributes:
        params: Parameters.
        tags: Tags.
        metrics: Name, value, time in milliseconds and step of each.
        artifacts: Files.
        end_state: The state in which the run ends, or None if it goes on.
        goes_on: Whether it goes on after it had ended.
        end_millis: When it ends.
    """

    params: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    tags: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    metrics: list[tuple[str, float, int, int]] = dataclasses.field(
        default_factory=list[tuple[str, float, int, int]]
    )
    artifacts: list[str] = dataclasses.field(default_factory=list[str])
    end_state: str | None = None
    goes_on: bool = False
    end_millis: int = 0


def sweep_tags(sweep: sa.Row[Any], guarantee: str) -> dict[str, str]:
    """Tags with which a sweep's run begins."""
    return {**_common_tags(sweep, guarantee), TAG + "role": "sweep", STATE: sweep.state}


def trial_tags(sweep: sa.Row[Any], trial: sa.Row[Any], guarantee: str) -> dict[str, str]:
    """Tags with which a trial's run begins; the sweep's too, so that it can be read alone."""
    planned = trial.planned_epsilon
    repeats = {}
    if sweep.spec.get("search", {}).get("repeats", 1) > 1:
        # By which MLflow groups runs: the first of the same configuration.
        repeats = {CONFIGURATION: trial.repeat_of or trial.trial_id}
    parent = {}
    if trial.parent_trial_id is not None:
        parent = {PARENT_TRIAL_ID: trial.parent_trial_id, PARENT_STEP: str(trial.parent_step)}
    return {
        **_common_tags(sweep, guarantee),
        TAG + "sampling": sampling(sweep.spec, trial.config.get("sampling_prob")),
        TAG + "role": "trial",
        TRIAL_ID: trial.trial_id,
        **repeats,
        **parent,
        TAG + "delta": str(sweep.spec["privacy"]["target_delta"]),
        # A tag, for MLflow makes 1.8e308 of an infinite metric.
        TAG + "planned_epsilon": "inf" if planned is None else str(planned),
        STATE: trial.state,
        REASON: trial.reason,
    }


def _common_tags(sweep: sa.Row[Any], guarantee: str) -> dict[str, str]:
    return {
        SWEEP_ID: sweep.sweep_id,
        TAG + "name": sweep.name,
        TAG + "spec_hash": sweep.spec_hash,
        TAG + "budget": sweep.spec["privacy"].get("budget") or sweep.sweep_id,
        TAG + "sampling": sampling(sweep.spec),
        TAG + "privacy_unit": privacy_unit(sweep.spec),
        TAG + "eval_data": "public",
        TAG + "guarantee": guarantee,
        _DESCRIPTION: guarantee,
        **{TAG + field: str(sweep.spec["privacy"][field]) for field in PRIVACY},
    }


def update(
    messages: Sequence[Message],
    sweep: sa.Row[Any],
    trial: sa.Row[Any] | None,
    results: Callable[[], SweepResults],
) -> Update:
    """What messages of one run tell, in their order.

    Args:
        messages: All of the same trial, or all of the sweep itself.
        sweep: Its row.
        trial: The trial's row, or None for the sweep itself.
        results: Gives the sweep's results; asked only when the sweep has ended.

    Raises:
        RefusedError: If a message is of a kind that this version does not know.
    """
    told = Update(tags={STATE: sweep.state if trial is None else trial.state})
    for message in messages:
        millis = to_millis(message.created_at)
        payload = message.payload
        match message.kind:
            case "sweep_start":
                told.params |= _sweep_params(sweep)
            case "trial_start" if trial is not None:
                told.params |= _sweep_params(sweep) | _hyperparameters(trial.config)
            case "winner" if trial is not None:
                told.params |= _hyperparameters(trial.config)
            case "metrics":
                told.metrics += metrics(payload, message.created_at)
            case "trial_end":
                told.tags |= {STATE: payload["state"], REASON: payload["reason"]}
                told.end_state, told.end_millis = payload["state"], millis
            case "trial_resume" | "sweep_resume":
                told.end_state, told.goes_on = None, True
                told.tags |= _going_on_tags(sweep, trial)
            case "sweep_end":
                told.tags |= {STATE: payload["state"], **_best_tag(results())}
                told.end_state, told.end_millis = payload["state"], millis
                told.artifacts += payload["artifacts"]
                told.metrics += [(k, v, millis, 0) for k, v in _summary(results()).items()]
            case kind:
                raise RefusedError(f"outbox: message {message.message_id} has a {kind=}")
    return told


def to_millis(seconds: float) -> int:
    """A time as MLflow keeps it."""
    return int(seconds * 1000)


def metrics(payload: Mapping[str, Any], created_at: float) -> list[tuple[str, float, int, int]]:
    """What a report's message tells: name, value, time in milliseconds and step of each metric."""
    millis, step = to_millis(created_at), payload["step"]
    return [
        (name, value, millis, step)
        for name in METRICS
        # None was not finite, for which MLflow has no word
        if (value := payload["metrics"].get(name)) is not None
    ]


def status(end_state: str) -> str:
    """MLflow's word for the state in which a trial or a sweep ended."""
    return _STATUS.get(end_state, "FAILED")


def _going_on_tags(sweep: sa.Row[Any], trial: sa.Row[Any] | None) -> dict[str, str]:
    """What no longer holds of an end that was none; more iterations, where a trial got them."""
    if trial is None:
        return {STATE: sweep.state}
    more = {ITERATIONS: str(trial.config["iterations"])} if "iterations" in trial.config else {}
    return {STATE: trial.state, REASON: trial.reason, **more}


def _sweep_params(sweep: sa.Row[Any]) -> dict[str, str]:
    # Sweeps from before there was a choice were clipped flat.
    clipping = sweep.spec.get("clipping", {}).get("mode", "flat")
    params = {"dataset": sweep.dataset, "model": sweep.spec["model"]["name"], "clipping": clipping}
    for section, field, param, off in TRAINING:
        value = sweep.spec.get(section, {}).get(field, off)
        if value != off:
            params[param] = str(value)
    return params


def _hyperparameters(config: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(config[name]) for name in HYPERPARAMETERS if name in config}


def _best_tag(results: SweepResults) -> dict[str, str]:
    best = results.best
    return {TAG + "best_trial_id": best.trials[0].trial_id} if best else {}


def _summary(results: SweepResults) -> dict[str, float]:
    counts = {
        f"trials_{state.lower()}": float(results.count(state))
        for state in TrialState
        if state.is_finished
    }
    best = results.best
    if best is None:
        return counts
    utility = {
        "best_eval_accuracy": best.eval_accuracy,
        "best_eval_accuracy_std": best.eval_accuracy_std,
        "best_epsilon": best.epsilon,
    }
    return counts | {name: value for name, value in utility.items() if value is not None}
