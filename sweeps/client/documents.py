"""What the client gives back: a decision on a specification, and a sweep's results, as tables."""
# pyright: reportMissingTypeStubs=false
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pandas and plotly have partial annotations.

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from sweeps.admission import Plan
from sweeps.database.tables import METRICS, finite_or_none
from sweeps.forecast.reckoning import Forecast
from sweeps.report.documents import configuration_json, plan_json, results_json
from sweeps.report.figure_html import plotly_figure
from sweeps.report.forecast_view import forecast_lines
from sweeps.report.picture import pareto_frontier
from sweeps.report.plan_view import totals
from sweeps.report.results import SweepResults
from sweeps.report.table import flat_config

_SHOWN_ROWS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What a specification would cost, before anything is started.

    Attributes:
        plan: Every decision.
        forecast: Hours, wall time and disk.
    """

    plan: Plan
    forecast: Forecast

    @property
    def guarantee(self) -> str:
        """What the specification's policy promises, in words."""
        return self.plan.guarantee

    @property
    def total_epsilon(self) -> float | None:
        """What the budget would have paid for in all; None where nothing adds up."""
        return self.plan.total_epsilon

    @property
    def trials(self) -> pd.DataFrame:
        """Every configuration in the order of the search space, with its epsilon and decision."""
        return _frame(
            [
                {
                    "number": one.number,
                    "repeat": one.repeat,
                    "decision": "admitted" if one.decision.admitted else "rejected",
                    "epsilon": finite_or_none(one.decision.epsilon),
                    "reason": one.decision.reason,
                    **flat_config(one.shown),
                }
                for one in self.plan.proposals
            ],
            ["number", "decision", "epsilon", "reason"],
            numbers=["epsilon"],
        )

    def to_json(self) -> dict[str, Any]:
        """As ``dp-sweeps check --json`` prints it."""
        return plan_json(self.plan, self.forecast)

    def __repr__(self) -> str:
        admitted = len(self.plan.admitted)
        return f"Check({self.plan.spec.name}: {admitted} of {len(self.plan.proposals)} admitted)"

    def _repr_html_(self) -> str:
        lines = [*totals(self.plan), *forecast_lines(self.forecast)]
        return _html(repr(self), self.trials, [self.guarantee, *(line.plain for line in lines)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """What a sweep has to show, as it was when it was read.

    Attributes:
        summary: The sweep and its trials, as the report has them.
        report: Paths of the report's files, by kind (``png``, ``html``, ``json``, ``spec``).
    """

    summary: SweepResults
    report: Mapping[str, str]

    @property
    def sweep_id(self) -> str:
        """The sweep."""
        return self.summary.sweep_id

    @property
    def state(self) -> str:
        """Where it is: RUNNING, PAUSED, COMPLETED, FAILED or CANCELLED."""
        return str(self.summary.state)

    @property
    def guarantee(self) -> str:
        """What the sweep's policy promises, in words."""
        return self.summary.guarantee

    @property
    def trials(self) -> pd.DataFrame:
        """Trials, best first: state, epsilon spent, metrics of the last report, configuration."""
        return _frame(
            [
                {
                    "trial_id": trial.trial_id,
                    "number": trial.number,
                    "state": str(trial.state),
                    "epsilon": trial.epsilon,
                    "eval_accuracy": trial.eval_accuracy,
                    "eval_loss": trial.last.eval_loss if trial.last else None,
                    "step": trial.last.step if trial.last else 0,
                    "planned_epsilon": trial.planned_epsilon,
                    "reason": trial.reason,
                    "repeat_of": trial.repeat_of,
                    "parent_trial_id": trial.parent_trial_id,
                    **flat_config(trial.config),
                }
                for trial in self.summary.best_first
            ],
            ["trial_id", "number", "state", "epsilon", "eval_accuracy"],
            numbers=["epsilon", "eval_accuracy", "eval_loss", "planned_epsilon"],
        )

    @property
    def configurations(self) -> pd.DataFrame:
        """Configurations, best first: mean and standard deviation over the repeats of each."""
        rows = [configuration_json(each) for each in self.summary.configurations]
        configs = [flat_config(row.pop("config")) for row in rows]
        return _frame(
            [{**row, **config} for row, config in zip(rows, configs, strict=True)],
            ["trial_ids", "state", "epsilon", "eval_accuracy_mean", "eval_accuracy_std"],
            numbers=["epsilon", "eval_accuracy_mean", "eval_accuracy_std"],
        )

    @property
    def reports(self) -> pd.DataFrame:
        """Every report of every trial: privacy spent and utility reached, step by step."""
        return _frame(
            [
                {
                    "trial_id": trial.trial_id,
                    "number": trial.number,
                    "step": point.step,
                    **{name: getattr(point, name) for name in METRICS},
                }
                for trial in self.summary.trials
                for point in trial.curve
            ],
            ["trial_id", "number", "step", *METRICS],
            numbers=METRICS,
        )

    @property
    def frontier(self) -> pd.DataFrame:
        """The best accuracy that any report reached at or below each epsilon."""
        trials = {trial.number: trial for trial in self.summary.trials}
        return _frame(
            [
                {
                    "epsilon": point.epsilon,
                    "eval_accuracy": point.eval_accuracy,
                    "trial_id": trials[point.trial].trial_id,
                    "step": point.step,
                    **flat_config(trials[point.trial].config),
                }
                for point in pareto_frontier(self.summary)
            ],
            ["epsilon", "eval_accuracy", "trial_id", "step"],
            numbers=["epsilon", "eval_accuracy"],
        )

    def figure(self) -> Any:
        """The picture of utility against privacy, as a plotly figure."""
        from plotly.graph_objects import Figure  # takes a while to import

        return Figure(plotly_figure(self.summary))

    def to_json(self) -> dict[str, Any]:
        """As ``dp-sweeps show --json`` prints it."""
        return results_json(self.summary, report=self.report)

    def __repr__(self) -> str:
        count = len(self.summary.trials)
        return f"Results({self.sweep_id}: {self.state}, {count} trial{'s' * (count != 1)})"

    def _repr_html_(self) -> str:
        return _html(repr(self), self.trials, [self.guarantee])


def _frame(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, numbers: Sequence[str]
) -> pd.DataFrame:
    """A table of rows, with its columns also where there are none; None is NaN among numbers."""
    frame = pd.DataFrame(list(rows)) if rows else pd.DataFrame(columns=list(columns))
    return frame.astype({name: float for name in numbers if name in frame})


def _html(title: str, table: pd.DataFrame, lines: Sequence[str]) -> str:
    shown = table.head(_SHOWN_ROWS).to_html(index=False, border=0, notebook=True)
    hidden = len(table) - _SHOWN_ROWS
    words = [f"... and {hidden} more"] * (hidden > 0) + list(lines)
    paragraphs = "".join(f"<p>{html.escape(line)}</p>" for line in words)
    return f"<div><b>{html.escape(title)}</b>{shown}{paragraphs}</div>"
