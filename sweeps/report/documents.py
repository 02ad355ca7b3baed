"""The JSON that scripts read: documented in ``docs/json.md`` and held to it by a test."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sweeps.admission import Plan
from sweeps.database.store import finite_or_none
from sweeps.report.results import SweepResults


def plan_json(plan: Plan) -> dict[str, Any]:
    """What ``dp-sweeps check --json`` prints.

    Trials come in the order of the search space. An ``epsilon`` of null has no finite bound.
    """
    spec = plan.spec
    return {
        "name": spec.name,
        "spec_hash": spec.spec_hash(),
        "dataset": f"{plan.dataset.name}:{plan.dataset.version}",
        # Where adding an example makes a neighbour, the size itself is protected.
        "num_train": plan.dataset.num_train if spec.data.declared_num_examples is None else None,
        "num_eval": plan.dataset.num_eval,
        **spec.privacy.model_dump(mode="json"),
        "guarantee": plan.guarantee,
        "admitted": len(plan.admitted),
        "rejected": len(plan.proposals) - len(plan.admitted),
        "trials": [
            {
                "config": proposal.shown,
                "epsilon": finite_or_none(proposal.decision.epsilon),
                "delta": proposal.decision.delta,
                "decision": "admitted" if proposal.decision.admitted else "rejected",
                "reason": proposal.decision.reason,
            }
            for proposal in plan.proposals
        ],
    }


def results_json(results: SweepResults, *, report: Mapping[str, str]) -> dict[str, Any]:
    """A sweep as ``dp-sweeps run --json`` prints it.

    Args:
        results: What to show.
        report: Paths of the files that show the same, by kind (``png``, ``html``, ...).

    Returns:
        Plain data whose numbers are all legal JSON: null stands for what is not finite, for an
        accuracy that was not measured, and for an epsilon without a known finite bound. Trials
        are best first. A trial's ``epsilon`` is what it spent (a rejected trial's, what it would
        have cost); ``step`` is that of its last report, 0 before the first.
    """
    privacy = results.privacy
    document = {
        "sweep_id": results.sweep_id,
        "name": results.name,
        "state": str(results.state),
        "mlflow_run_id": results.mlflow_run_id,
        "report": dict(report),
        "policy": privacy["policy"],
        "target_epsilon": privacy["target_epsilon"],
        "target_delta": privacy["target_delta"],
        "accountant": privacy["accountant"],
        "neighboring_relation": privacy["neighboring_relation"],
        "guarantee": results.guarantee,
        "trials": [
            {
                "trial_id": trial.trial_id,
                "state": str(trial.state),
                "config": trial.config,
                "epsilon": trial.epsilon,
                "planned_epsilon": trial.planned_epsilon,
                "delta": privacy["target_delta"],
                "eval_accuracy": trial.eval_accuracy,
                "eval_loss": trial.last.eval_loss if trial.last else None,
                "step": trial.last.step if trial.last else 0,
                "iterations": trial.planned_iterations,
                "reason": trial.reason,
                "mlflow_run_id": trial.mlflow_run_id,
                "curve": [
                    {
                        "step": point.step,
                        "epsilon": point.epsilon,
                        "eval_accuracy": point.eval_accuracy,
                    }
                    for point in trial.curve
                ],
            }
            for trial in results.best_first
        ],
    }
    return cast("dict[str, Any]", _legal(document))


def _legal(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(key): _legal(item) for key, item in items}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in cast("Sequence[object]", value)]
    return value
