"""A private selection's rows: one trial, which is the winner-to-be.

It is reserved as a whole and charged as a whole before anything is trained, for what it costs does
not depend on how many trials are drawn. From then on its rows stay as they are until the winner is
released, in one transaction, or it ends without one: so they are the same however many trials
there are and whichever of them is under way. Nothing of a trial that lost is ever written: what
SQLite deletes may stay readable in its file.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from accounting import BudgetExceeded, Ledger, Selection
from accounting.ledger.lookup import find_reservation
from sweeps.database import rows
from sweeps.database.attempts import Attempt
from sweeps.database.states import AttemptEnd, TrialState, Wish
from sweeps.database.tables import (
    METRICS,
    attempts,
    branches,
    budgeting,
    checkpoints,
    finite_or_none,
    reading,
    reports,
    sweeps,
    trials,
)
from sweeps.errors import OverspentError, StoreError
from trainer.config import TrialConfig

WHOLE = 1
"""What is reserved for a selection, and charged: it runs or does not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionAssignment:
    """What a worker needs to know of its selection.

    Attributes:
        sweep_id: The sweep.
        spec: Its specification as plain data.
        dataset_fingerprint: Of its data.
        selection: What was reserved.
        epsilon: What the winner costs, the search for it included.
        has_begun: Whether it is charged.
    """

    sweep_id: str
    spec: Mapping[str, Any]
    dataset_fingerprint: str
    selection: Selection
    epsilon: float
    has_begun: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Winner:
    """What is released of the best trial.

    Attributes:
        setting: The fields of the search space.
        config: The hyperparameters, to show.
        trial_config: What was trained.
        branch_id: Of its noise.
        curve: Its reports, as `trainer.reporting.releasable` gives them.
        location: Of its last checkpoint.
    """

    setting: Mapping[str, Any]
    config: Mapping[str, Any]
    trial_config: TrialConfig
    branch_id: str
    curve: Sequence[Mapping[str, Any]]
    location: str

    @property
    def step(self) -> int:
        """The step at which it ended."""
        return int(self.curve[-1]["step"])


class Selections:
    """What a worker may do with a selection's rows, beside what `Attempts` does for any trial.

    Args:
        ledger: As `Attempts` takes it.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._engine = ledger.engine

    def assignment(self, trial_id: str) -> SelectionAssignment:
        """What a selection is to do.

        Raises:
            StoreError: If there is none of this id, or it was not admitted.
        """
        query = (
            sa.select(trials, sweeps.c.spec, sweeps.c.dataset_fingerprint)
            .join(sweeps, sweeps.c.sweep_id == trials.c.sweep_id)
            .where(trials.c.trial_id == trial_id)
        )
        with reading(self._engine) as connection:
            row = connection.execute(query).one_or_none()
            reservation = find_reservation(connection, trial_id)
        asked = None if reservation is None else reservation.request.mechanism
        if row is None or not isinstance(asked, Selection) or row.planned_epsilon is None:
            raise StoreError(f"trial {trial_id!r}: is no private selection that may run")
        return SelectionAssignment(
            sweep_id=row.sweep_id,
            spec=row.spec,
            dataset_fingerprint=row.dataset_fingerprint,
            selection=asked,
            epsilon=row.planned_epsilon,
            has_begun=row.charged_iterations > 0,
        )

    def begin(self, attempt: Attempt) -> None:
        """Charges a selection, all of it, for good. Idempotent.

        Raises:
            FencedError: As in `Attempts.charge`.
            OverspentError: If its budget is frozen.
        """
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = rows.fenced_trial(
                connection, attempt.trial_id, attempt.attempt_id, attempt.number
            )
            answer = transaction.charge(trial.trial_id, WHOLE)
            if not isinstance(answer, BudgetExceeded):
                rows.set_trial(connection, trial.trial_id, charged_iterations=WHOLE)
        if isinstance(answer, BudgetExceeded):
            raise OverspentError(f"trial {attempt.trial_id}: {answer}") from answer

    def wish(self, sweep_id: str) -> Wish:
        """What is asked of a selection's sweep."""
        with reading(self._engine) as connection:
            found = connection.scalar(
                sa.select(sweeps.c.wish).where(sweeps.c.sweep_id == sweep_id)
            )
        return Wish(found or "")

    def lost_since(self, attempt: Attempt, number: int) -> int:
        """How many workers died over a selection after its attempt ``number``."""
        query = sa.select(sa.func.count()).where(
            attempts.c.trial_id == attempt.trial_id,
            attempts.c.number > number,
            attempts.c.end == AttemptEnd.LOST,
        )
        with reading(self._engine) as connection:
            return connection.scalar(query) or 0

    def release(self, attempt: Attempt, winner: Winner | None) -> None:
        """Shows the winner and ends the selection; tells MLflow.

        The whole of what one trial releases is released, its reports included, each at what the
        selection costs: repeat-and-select covers whatever a trial puts out, and chooses by its
        last report.

        Args:
            attempt: The attempt.
            winner: The best trial; None where none was drawn at all.

        Raises:
            FencedError: As in `Attempts.charge`.
        """
        now = time.time()
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = rows.fenced_trial(
                connection, attempt.trial_id, attempt.attempt_id, attempt.number
            )
            end, reason = _end_of(winner)
            if winner is not None:
                _show(connection, trial, winner, attempt.number, now)
            rows.end_trial(transaction, trial, end, reason)


def _end_of(winner: Winner | None) -> tuple[TrialState, str]:
    if winner is None:
        return TrialState.COMPLETED, "the number of trials that was drawn is 0: there is no winner"
    if winner.curve[-1]["outcome"] == "completed":
        return TrialState.COMPLETED, ""
    reason = f"the parameters were no longer finite at step {winner.step}"
    return TrialState.DIVERGED, reason


def _show(
    connection: sa.Connection, trial: sa.Row[Any], winner: Winner, attempt: int, now: float
) -> None:
    """Writes what the winner was, as if it had been the only trial."""
    rows.set_trial(
        connection,
        trial.trial_id,
        setting=dict(winner.setting),
        config=dict(winner.config),
        trial_config=winner.trial_config.to_json(),
    )
    rows.tell(connection, trial.sweep_id, trial.trial_id, "winner", {})
    connection.execute(
        branches.insert().values(
            trial_id=trial.trial_id,
            number=1,
            branch_id=winner.branch_id,
            start_step=0,
            charged_step=winner.step,
            facts=None,  # nobody goes on with it
        )
    )
    for report in winner.curve:
        found = {name: report[name] for name in METRICS if name in report}
        metrics = {name: finite_or_none(value) for name, value in found.items()}
        metrics["epsilon"] = trial.planned_epsilon
        connection.execute(
            reports.insert().values(
                trial_id=trial.trial_id,
                step=report["step"],
                branch=1,
                reported_at=now,
                charged_iterations=WHOLE,
                **metrics,
            )
        )
        told = {"step": report["step"], "metrics": metrics}
        rows.tell(connection, trial.sweep_id, trial.trial_id, "metrics", told)
    connection.execute(
        checkpoints.insert().values(
            trial_id=trial.trial_id,
            step=winner.step,
            attempt=attempt,
            location=winner.location,
            written_at=now,
        )
    )
