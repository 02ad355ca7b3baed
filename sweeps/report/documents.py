"""The JSON that scripts read: documented in ``docs/json.md`` and held to it by a test."""

from collections.abc import Mapping
from typing import Any

from sweeps.admission import Plan
from sweeps.database.tables import finite_or_none
from sweeps.forecast.reckoning import Forecast
from sweeps.guarantee import privacy_unit, sampling
from sweeps.report.json_numbers import legal_json
from sweeps.report.results import Configuration, SweepResults, TrialSummary

_AVERAGES = ("ema_eval_accuracy", "ema_eval_loss", "polyak_eval_accuracy", "polyak_eval_loss")


def plan_json(plan: Plan, forecast: Forecast) -> dict[str, Any]:
    """What ``dp-sweeps check --json`` prints.

    Trials come in the order of the search space. An ``epsilon`` of null has no finite bound.
    """
    spec = plan.spec
    plain = spec.model_dump(mode="json")
    counts_examples = spec.privacy_unit == "example"
    is_public = spec.data.declared_num_examples is None
    document = {
        "name": spec.name,
        "spec_hash": spec.spec_hash(),
        "dataset": f"{plan.dataset.name}:{plan.dataset.version}",
        # Where one unit more makes a neighbour, their number itself is protected; where users
        # are the unit, how many examples they have always is.
        "num_train": plan.dataset.num_train if is_public and counts_examples else None,
        "num_users": plan.dataset.num_users if is_public else None,
        "num_eval": plan.dataset.num_eval,
        **plain["privacy"],
        "privacy_unit": spec.privacy_unit,
        "sampling": sampling(plain),
        "guarantee": plan.guarantee,
        "total_epsilon": plan.total_epsilon,
        "epsilon_before": plan.epsilon_before,
        "alternatives": [
            {"policy": other.policy, "epsilon": other.epsilon, "assumes": other.assumes}
            for other in plan.alternatives
        ],
        "admitted": len(plan.admitted),
        "rejected": len(plan.proposals) - len(plan.admitted),
        "proposed_later": plan.proposed_later,
        "forecast": forecast.to_json(),
        "trials": [
            {
                "config": proposal.shown,
                "repeat": proposal.repeat,
                "epsilon": finite_or_none(proposal.decision.epsilon),
                "delta": proposal.decision.delta,
                "decision": "admitted" if proposal.decision.admitted else "rejected",
                "reason": proposal.decision.reason,
            }
            for proposal in plan.proposals
        ],
    }
    return legal_json(document)


def _iterations(trial: TrialSummary) -> int | None:
    if trial.is_secret:
        return None
    return trial.end_step if trial.selects else trial.planned_iterations


def configuration_json(configuration: Configuration) -> dict[str, Any]:
    """A configuration over its repeats, if it has any; null as in `results_json`."""
    return {
        "trial_ids": [trial.trial_id for trial in configuration.trials],
        "config": configuration.config,
        "state": str(configuration.state),
        "num_measured": len(configuration.measured),
        "eval_accuracy_mean": configuration.eval_accuracy,
        "eval_accuracy_std": configuration.eval_accuracy_std,
        "epsilon": configuration.epsilon,
        "step": configuration.last.step if configuration.last else 0,
    }


def results_json(results: SweepResults, *, report: Mapping[str, str]) -> dict[str, Any]:
    """A sweep as ``dp-sweeps run --json`` prints it.

    Args:
        results: What to show.
        report: Paths of the files that show the same, by kind (``png``, ``html``, ...).

    Returns:
        Plain data whose numbers are all legal JSON: null stands for what is not finite, for an
        accuracy that was not measured, and for an epsilon without a known finite bound.
        Configurations are best first, and trials in the order of these. A trial's ``epsilon`` is
        what it spent (a rejected trial's, what it would have cost); ``step`` is that of its last
        report, 0 before the first.
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
        "privacy_unit": privacy_unit(results.spec),
        "sampling": sampling(results.spec),
        "guarantee": results.guarantee,
        "configurations": [configuration_json(each) for each in results.configurations],
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
                **{name: getattr(trial.last, name) if trial.last else None for name in _AVERAGES},
                "step": trial.last.step if trial.last else 0,
                "iterations": _iterations(trial),
                "repeat_of": trial.repeat_of,
                "parent_trial_id": trial.parent_trial_id,
                "parent_step": trial.parent_step,
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
    return legal_json(document)
