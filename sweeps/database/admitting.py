"""New trials, as rows that the budget has decided on."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from accounting.ledger.records import Request
from accounting.ledger.transaction import LedgerTransaction
from accounting.terms import Spending
from sweeps.database import rows
from sweeps.database.states import TrialState
from sweeps.database.tables import finite_or_none, sweeps, trials
from trainer.config import TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTrial:
    """A trial as admission leaves it.

    Attributes:
        trial_id: Unique.
        number: Place in the sweep, from 0.
        mechanism: What the budget is asked to pay for; of a private selection the selection.
            None where the trial is rejected without asking.
        reason: Why it is rejected without asking, else empty.
        config: The hyperparameters, to show.
        trial_config: What the trainer gets once it is admitted; None where there is nothing that
            could run.
        planned_iterations: Iterations that the decision covers; 1 of a private selection.
        planned_epsilon: Epsilon of all of them; infinite where no bound is known.
        setting: The fields of the search space as they were proposed, for a search to learn from.
        repeat_of: The trial that was the first with its configuration, where it is another of the
            same; else None.
    """

    trial_id: str
    number: int
    mechanism: Spending | None
    reason: str
    config: Mapping[str, Any]
    trial_config: TrialConfig | None
    planned_iterations: int
    planned_epsilon: float
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    repeat_of: str | None = None


def admit(
    transaction: LedgerTransaction,
    sweep_id: str,
    new_trials: Sequence[NewTrial],
    *,
    budget: str | None,
    team: str,
    repeats: int = 1,
) -> set[str]:
    """Has the budget decide on new trials of a sweep, and records them all; tells MLflow.

    Args:
        transaction: The caller's.
        sweep_id: The sweep, which is there.
        new_trials: In order.
        budget: Its name; None for the one that is the sweep's own.
        team: Whose share pays; "" where the budget is not divided.
        repeats: How many of them in a row have the same configuration: they are admitted together
            or not at all.

    Returns:
        Ids of those that were admitted.

    Raises:
        accounting.AccountingError: The budget does not exist or does not suit the sweep.
    """
    connection = transaction.connection
    answers = transaction.reserve(
        budget or sweep_id,
        [
            Request(request_id=trial.trial_id, mechanism=trial.mechanism)
            for trial in new_trials
            if trial.mechanism is not None
        ],
        team=team,
        dataset_fingerprint=connection.scalar(
            sa.select(sweeps.c.dataset_fingerprint).where(sweeps.c.sweep_id == sweep_id)
        ),
        together=repeats,
    )
    admitted = {answer.request_id for answer in answers if answer.state == "open"}
    reasons = {
        answer.request_id: "" if answer.state == "open" else answer.verdict.reason
        for answer in answers
    }
    again = {
        answer.request_id: answer.verdict.requested
        for answer in answers
        if answer.may_be_asked_again
    }
    needed: dict[str, float] = collections.defaultdict(float)  # by the first of its repeats
    for trial in new_trials:
        if trial.trial_id in again:
            needed[trial.repeat_of or trial.trial_id] += again[trial.trial_id]
    may_run = admitted | again.keys()
    new_rows = [
        {
            "trial_id": trial.trial_id,
            "sweep_id": sweep_id,
            "number": trial.number,
            "state": TrialState.ADMITTED if trial.trial_id in admitted else TrialState.REJECTED,
            "reason": reasons.get(trial.trial_id, trial.reason),
            "setting": dict(trial.setting),
            "config": dict(trial.config),
            "trial_config": (
                trial.trial_config.to_json()
                if trial.trial_config and trial.trial_id in may_run
                else None
            ),
            "needed_rdp": (
                finite_or_none(needed[trial.trial_id]) if trial.trial_id in needed else None
            ),
            "planned_iterations": trial.planned_iterations,
            "planned_epsilon": finite_or_none(trial.planned_epsilon),
            "charged_iterations": 0,
            "repeat_of": trial.repeat_of,
        }
        for trial in new_trials
    ]
    if new_rows:
        connection.execute(trials.insert(), new_rows)
    for trial in new_trials:
        if trial.trial_id in admitted:
            rows.tell(connection, sweep_id, trial.trial_id, "trial_start", {})
    return admitted
