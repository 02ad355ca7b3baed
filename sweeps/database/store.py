"""Every change of a sweep's rows, one transaction each.

The driver and the workers meet here and nowhere else. A worker holds an `Attempt`; only a
trial's newest attempt, while the trial runs, may charge or report, so a worker that was declared
dead and goes on is refused (it is *fenced*). What MLflow has to hear is put into the outbox by
the transaction that makes it true.
"""

import dataclasses
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from accounting import BudgetExceeded, BudgetTerms, Ledger, Mechanism
from accounting.ledger.records import Request
from accounting.ledger.transaction import LedgerTransaction
from sweeps.database.states import SweepState, TrialState
from sweeps.database.tables import (
    attempts,
    budgeting,
    open_ledger,
    outbox,
    reading,
    reports,
    sweeps,
    trials,
    try_delivery_lock,
    writing,
)
from sweeps.errors import FencedError, OverspentError, StoreError
from sweeps.home import Home
from trainer.config import TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTrial:
    """A trial as admission leaves it.

    Attributes:
        trial_id: Unique.
        number: Place in the sweep, from 0.
        mechanism: What the budget is asked to pay for; None where the trial is rejected without
            asking.
        reason: Why it is rejected without asking, else empty.
        config: The hyperparameters, to show.
        trial_config: What the trainer gets if it is admitted; None where there is nothing that
            could run.
        planned_iterations: Iterations that the decision covers.
        planned_epsilon: Epsilon of all of them; infinite where no bound is known.
    """

    trial_id: str
    number: int
    mechanism: Mechanism | None
    reason: str
    config: Mapping[str, Any]
    trial_config: TrialConfig | None
    planned_iterations: int
    planned_epsilon: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewSweep:
    """A sweep as submitted; fields as the columns of the table ``sweeps``, and who pays.

    Attributes:
        terms: Of the budget.
        budget: Its name; None makes one for this sweep alone, named after it.
        team: Whose share pays; "" where the budget is not divided.
    """

    sweep_id: str
    name: str
    spec: Mapping[str, Any]
    spec_hash: str
    dataset: str
    dataset_fingerprint: str
    terms: BudgetTerms
    budget: str | None = None
    team: str = ""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A worker's right to run a trial, until a newer attempt begins.

    Attributes:
        attempt_id: A token nobody can guess.
        trial_id: The trial.
        number: Counts a trial's attempts, from 1.
    """

    attempt_id: str
    trial_id: str
    number: int


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What a worker needs to know of its trial."""

    sweep_id: str
    config: TrialConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message:
    """A row of the outbox."""

    message_id: int
    sweep_id: str
    trial_id: str | None
    kind: str
    payload: Mapping[str, Any]
    created_at: float


class Store:
    """Reads and writes the rows of sweeps, trials, attempts, reports and the outbox.

    What concerns the budget, that trials are admitted, charged and settled, is written by the
    ledger in the same transaction: a trial's id is the id of its reservation.

    Safe to use from several threads and processes. Every method raises
    `sweeps.errors.DatabaseError` if the database fails.

    Args:
        ledger: In a database that has this room's tables; see `open_store`.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._engine = ledger.engine

    @property
    def ledger(self) -> Ledger:
        """The ledger, in the same database."""
        return self._ledger

    # -- the driver ---------------------------------------------------------------------------

    def create_sweep(self, sweep: NewSweep, new_trials: Sequence[NewTrial]) -> None:
        """Records a sweep, has the budget decide on its trials, and tells MLflow of both.

        One transaction: the sweep is there with every decision, or not at all. The outbox gets
        one ``sweep_start`` and one ``trial_start`` per admitted trial.

        Raises:
            accounting.AccountingError: The budget does not exist or does not suit the sweep.
        """
        columns = {column.name for column in sweeps.columns}
        row = {name: value for name, value in vars(sweep).items() if name in columns}
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            admitted, reasons = _ask_budget(transaction, sweep, new_trials)
            connection.execute(
                sweeps.insert().values(**row, state=SweepState.RUNNING, created_at=time.time())
            )
            rows = [
                {
                    "trial_id": trial.trial_id,
                    "sweep_id": sweep.sweep_id,
                    "number": trial.number,
                    "state": (
                        TrialState.ADMITTED if trial.trial_id in admitted else TrialState.REJECTED
                    ),
                    "reason": reasons.get(trial.trial_id, trial.reason),
                    "config": dict(trial.config),
                    "trial_config": (
                        trial.trial_config.to_json()
                        if trial.trial_config and trial.trial_id in admitted
                        else None
                    ),
                    "planned_iterations": trial.planned_iterations,
                    "planned_epsilon": finite_or_none(trial.planned_epsilon),
                    "charged_iterations": 0,
                }
                for trial in new_trials
            ]
            connection.execute(trials.insert(), rows)
            _tell(connection, sweep.sweep_id, None, "sweep_start", {})
            for trial in new_trials:
                if trial.trial_id in admitted:
                    _tell(connection, sweep.sweep_id, trial.trial_id, "trial_start", {})

    def end_trial(self, trial_id: str, state: TrialState, reason: str = "") -> bool:
        """Moves a trial to an ended state; False if it had ended already.

        Raises:
            StoreError: If there is no such trial or the state may not follow.
        """
        with budgeting(self._ledger) as transaction:
            row = _locked_trial(transaction.connection, trial_id)
            if TrialState(row.state).is_finished:
                return False
            _end(transaction, row, state, reason)
            return True

    def end_sweep(self, sweep_id: str, state: SweepState, artifacts: Sequence[str] = ()) -> None:
        """Ends a sweep; MLflow gets the files named in ``artifacts``."""
        now = time.time()
        with writing(self._engine) as connection:
            connection.execute(
                sweeps.update()
                .where(sweeps.c.sweep_id == sweep_id)
                .values(state=state, ended_at=now)
            )
            payload = {"state": state, "artifacts": list(artifacts)}
            _tell(connection, sweep_id, None, "sweep_end", payload)

    # -- a worker -----------------------------------------------------------------------------

    def assignment(self, trial_id: str) -> Assignment:
        """What a trial is to do.

        Raises:
            StoreError: If there is no such trial, or nothing of it may run.
        """
        query = sa.select(trials.c.sweep_id, trials.c.trial_config)
        with reading(self._engine) as connection:
            row = connection.execute(query.where(trials.c.trial_id == trial_id)).one_or_none()
        if row is None or row.trial_config is None:
            raise StoreError(f"trial {trial_id!r}: not in the ledger, or not one that may run")
        return Assignment(row.sweep_id, TrialConfig.from_json(row.trial_config))

    def begin_attempt(self, trial_id: str, start_step: int = 0, *, worker: str = "") -> Attempt:
        """Starts to run a trial; every earlier attempt at it is fenced from here on.

        An attempt draws new keys. Of correlated noise (``bands`` > 1) a trial is accounted by
        whole groups of ``bands`` steps, each of which a unit takes part in once: so what earlier
        attempts were charged is rounded up to whole groups, for what they left of one would
        otherwise hide the first steps of this.

        Args:
            trial_id: An admitted, paused or running trial.
            start_step: Steps that the attempt has behind it when it begins.
            worker: Who runs it, as ``host:pid``, for a person in search of it.

        Raises:
            StoreError: If there is no such trial, it may not run (it was rejected, say), or no
                attempt has charged ``start_step``: nobody has steps behind it unpaid.
            OverspentError: If the budget is frozen, and something has to be charged.
        """
        attempt_id = secrets.token_hex(16)
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            row = _locked_trial(connection, trial_id)
            state = TrialState(row.state)
            if state is not TrialState.RUNNING and not state.may_become(TrialState.RUNNING):
                raise StoreError(f"trial {trial_id}: is {state}; allowed to run is ADMITTED")
            previous, furthest = connection.execute(
                sa.select(
                    sa.func.coalesce(sa.func.max(attempts.c.number), 0),
                    sa.func.coalesce(sa.func.max(attempts.c.charged_step), 0),
                ).where(attempts.c.trial_id == trial_id)
            ).one()
            if not 0 <= start_step <= furthest:
                raise StoreError(
                    f"trial {trial_id}: an attempt cannot begin at step {start_step}; charged are "
                    f"{furthest}"
                )
            number = previous + 1
            total = row.charged_iterations if number == 1 else _whole_groups(row)
            answer = None
            if total > row.charged_iterations:
                answer = transaction.charge(trial_id, total)
            if not isinstance(answer, BudgetExceeded):
                connection.execute(
                    attempts.insert().values(
                        attempt_id=attempt_id,
                        trial_id=trial_id,
                        number=number,
                        start_step=start_step,
                        charged_step=start_step,
                        worker=worker,
                        started_at=time.time(),
                    )
                )
                connection.execute(
                    trials.update()
                    .where(trials.c.trial_id == trial_id)
                    .values(state=TrialState.RUNNING, charged_iterations=total)
                )
        if isinstance(answer, BudgetExceeded):
            raise OverspentError(f"trial {trial_id}: to begin anew: {answer}") from answer
        return Attempt(attempt_id, trial_id, number)

    def charge(self, attempt: Attempt, step: int) -> int:
        """Makes it durable that an attempt has taken ``step`` steps. Idempotent.

        Args:
            attempt: The attempt.
            step: The step it has reached; an earlier one changes nothing.

        Returns:
            Iterations that the trial has been charged by now, over all its attempts.

        Raises:
            FencedError: If the attempt is not the trial's newest, or the trial has ended.
            OverspentError: If the trial would exceed what it was admitted for, or its budget is
                frozen. Nothing is charged then, and nothing of the steps may be released.
        """
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial, current = _fenced(connection, attempt)
            gained = max(0, step - current.charged_step)
            total = trial.charged_iterations + gained
            answer = transaction.charge(attempt.trial_id, total)
            if gained and not isinstance(answer, BudgetExceeded):
                connection.execute(
                    attempts.update()
                    .where(attempts.c.attempt_id == attempt.attempt_id)
                    .values(charged_step=step)
                )
                connection.execute(
                    trials.update()
                    .where(trials.c.trial_id == attempt.trial_id)
                    .values(charged_iterations=total)
                )
        if isinstance(answer, BudgetExceeded):
            raise OverspentError(f"trial {attempt.trial_id}: at step {step}: {answer}") from answer
        return total

    def add_report(self, attempt: Attempt, step: int, metrics: Mapping[str, float]) -> None:
        """Records what a charged step may show, and tells MLflow. Idempotent.

        Args:
            attempt: The attempt.
            step: A step that has been charged.
            metrics: Of `sweeps.database.tables.METRICS`, those that were measured; non-finite
                ones are kept as NULL.

        Raises:
            FencedError: As in `charge`.
            StoreError: If the step has not been charged.
        """
        values = {name: finite_or_none(value) for name, value in metrics.items()}
        now = time.time()
        with writing(self._engine) as connection:
            trial, current = _fenced(connection, attempt)
            if step > current.charged_step:
                raise StoreError(
                    f"trial {attempt.trial_id}: report of step {step}, charged are "
                    f"{current.charged_step}: nothing leaves before it is charged"
                )
            key = {"trial_id": attempt.trial_id, "step": step, "attempt": attempt.number}
            if connection.execute(sa.select(reports).filter_by(**key)).one_or_none():
                return
            connection.execute(
                reports.insert().values(
                    **key, reported_at=now, charged_iterations=trial.charged_iterations, **values
                )
            )
            _tell(
                connection,
                trial.sweep_id,
                attempt.trial_id,
                "metrics",
                {"step": step, "metrics": values},
            )

    def finish_attempt(self, attempt: Attempt, state: TrialState, reason: str = "") -> None:
        """Ends a trial from its own worker.

        Raises:
            FencedError: As in `charge`.
        """
        with budgeting(self._ledger) as transaction:
            trial, _ = _fenced(transaction.connection, attempt)
            _end(transaction, trial, state, reason)

    # -- the outbox ---------------------------------------------------------------------------

    def delivery_lock(self) -> AbstractContextManager[bool]:
        """The right to deliver, as `sweeps.database.tables.try_delivery_lock` says."""
        return try_delivery_lock(self._engine)

    def undelivered(self, limit: int = 1000, *, after: int = 0) -> list[Message]:
        """The oldest messages that MLflow has not yet got, in order; ids above ``after`` only."""
        columns = [outbox.c[field.name] for field in dataclasses.fields(Message)]
        query = (
            sa.select(*columns)
            .where(outbox.c.delivered_at.is_(None), outbox.c.message_id > after)
            .order_by(outbox.c.message_id)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            return [Message(**row) for row in connection.execute(query).mappings()]

    def count_undelivered(self) -> int:
        """How many messages MLflow has not yet got."""
        query = sa.select(sa.func.count()).where(outbox.c.delivered_at.is_(None))
        with reading(self._engine) as connection:
            return connection.scalar(query) or 0

    def mark_delivered(self, message_ids: Sequence[int]) -> None:
        """Marks messages that MLflow has got."""
        with writing(self._engine) as connection:
            connection.execute(
                outbox.update()
                .where(outbox.c.message_id.in_(message_ids))
                .values(delivered_at=time.time())
            )

    def set_mlflow_run_id(self, sweep_id: str, trial_id: str | None, run_id: str) -> None:
        """Remembers which MLflow run is a trial's, or with None the sweep's own."""
        if trial_id is None:
            change = sweeps.update().where(sweeps.c.sweep_id == sweep_id)
        else:
            change = trials.update().where(trials.c.trial_id == trial_id)
        with writing(self._engine) as connection:
            connection.execute(change.values(mlflow_run_id=run_id))

    # -- reading ------------------------------------------------------------------------------

    def sweep(self, sweep_id: str) -> sa.Row[Any]:
        """A sweep's row.

        Raises:
            StoreError: If there is none of this id.
        """
        with reading(self._engine) as connection:
            row = connection.execute(
                sa.select(sweeps).where(sweeps.c.sweep_id == sweep_id)
            ).one_or_none()
        if row is None:
            raise StoreError(f"sweep {sweep_id!r}: not in the ledger; see `dp-sweeps list`")
        return row

    def sweeps(self) -> Sequence[sa.Row[Any]]:
        """Every sweep's row, newest first."""
        with reading(self._engine) as connection:
            return connection.execute(sa.select(sweeps).order_by(sweeps.c.created_at.desc())).all()

    def trials(self, sweep_id: str) -> Sequence[sa.Row[Any]]:
        """A sweep's trials, by number."""
        query = sa.select(trials).where(trials.c.sweep_id == sweep_id).order_by(trials.c.number)
        with reading(self._engine) as connection:
            return connection.execute(query).all()

    def reports(self, sweep_id: str) -> Sequence[sa.Row[Any]]:
        """All reports of a sweep's trials, by trial and time."""
        query = (
            sa.select(reports)
            .join(trials, trials.c.trial_id == reports.c.trial_id)
            .where(trials.c.sweep_id == sweep_id)
            .order_by(trials.c.number, reports.c.attempt, reports.c.step)
        )
        with reading(self._engine) as connection:
            return connection.execute(query).all()


def open_store(home: Home) -> Store:
    """The store of a home; see `sweeps.database.tables.open_ledger`."""
    return Store(open_ledger(home))


def _ask_budget(
    transaction: LedgerTransaction, sweep: NewSweep, new_trials: Sequence[NewTrial]
) -> tuple[set[str], dict[str, str]]:
    """Has the budget decide; returns the admitted trials, and the others' reasons."""
    budget = sweep.budget
    if budget is None:
        budget = sweep.sweep_id
        transaction.create_budget(
            budget,
            dataset=sweep.dataset,
            dataset_fingerprint=sweep.dataset_fingerprint,
            terms=sweep.terms,
            one_off=True,
        )
    answers = transaction.reserve(
        budget,
        [
            Request(request_id=trial.trial_id, mechanism=trial.mechanism)
            for trial in new_trials
            if trial.mechanism is not None
        ],
        team=sweep.team,
        dataset_fingerprint=sweep.dataset_fingerprint,
    )
    admitted = {answer.request_id for answer in answers if answer.state == "open"}
    refused = {
        answer.request_id: answer.verdict.reason
        for answer in answers
        if answer.request_id not in admitted
    }
    return admitted, {**dict.fromkeys(admitted, ""), **refused}


def finite_or_none(value: float) -> float | None:
    """The number, or None where it is infinite or NaN: databases and JSON have neither."""
    return value if math.isfinite(value) else None


def _locked_trial(connection: sa.Connection, trial_id: str) -> sa.Row[Any]:
    row = connection.execute(
        sa.select(trials).where(trials.c.trial_id == trial_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise StoreError(f"trial {trial_id!r}: not in the ledger")
    return row


def _whole_groups(trial: sa.Row[Any]) -> int:
    """A trial's charge, rounded up to whole groups of steps with correlated noise.

    Not beyond what it was admitted for: after that no attempt can run a step.
    """
    config = trial.trial_config
    bands = 1 if config is None else TrialConfig.from_json(config).mechanism.bands
    whole = -(-trial.charged_iterations // bands) * bands
    return min(whole, trial.planned_iterations)


def _fenced(connection: sa.Connection, attempt: Attempt) -> tuple[sa.Row[Any], sa.Row[Any]]:
    """The rows of a trial and its newest attempt, if that is the one given."""
    trial = _locked_trial(connection, attempt.trial_id)
    newest = connection.execute(
        sa.select(attempts)
        .where(attempts.c.trial_id == attempt.trial_id)
        .order_by(attempts.c.number.desc())
        .limit(1)
    ).one_or_none()
    held = newest is not None and secrets.compare_digest(newest.attempt_id, attempt.attempt_id)
    if newest is None or not held or trial.state != TrialState.RUNNING:
        raise FencedError(
            f"trial {attempt.trial_id}: attempt {attempt.number} may no longer write; the trial "
            f"is {trial.state}"
        )
    return trial, newest


def _end(
    transaction: LedgerTransaction, trial: sa.Row[Any], state: TrialState, reason: str
) -> None:
    connection = transaction.connection
    if not state.is_finished or not TrialState(trial.state).may_become(state):
        raise StoreError(f"trial {trial.trial_id}: cannot become {state} from {trial.state}")
    connection.execute(
        trials.update()
        .where(trials.c.trial_id == trial.trial_id)
        .values(state=state, reason=reason)
    )
    connection.execute(
        attempts.update()
        .where(attempts.c.trial_id == trial.trial_id, attempts.c.ended_at.is_(None))
        .values(ended_at=time.time())
    )
    transaction.settle(trial.trial_id)
    payload = {"state": state, "reason": reason}
    _tell(connection, trial.sweep_id, trial.trial_id, "trial_end", payload)


def _tell(
    connection: sa.Connection,
    sweep_id: str,
    trial_id: str | None,
    kind: str,
    payload: Mapping[str, Any],
) -> None:
    connection.execute(
        outbox.insert().values(
            sweep_id=sweep_id,
            trial_id=trial_id,
            kind=kind,
            payload=dict(payload),
            created_at=time.time(),
        )
    )
