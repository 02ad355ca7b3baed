"""What a worker may do with a trial's rows, one transaction each.

A worker holds an `Attempt`; only a trial's newest attempt, while the trial runs, may charge or
report, so a worker that was declared dead and goes on is refused (it is *fenced*). What a trial
has spent is kept by branch of noise: an attempt that goes on with a branch takes steps again that
are paid for, one that begins a branch pays for all of its own.
"""

import dataclasses
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

import accounting
from accounting import BudgetExceeded, Ledger, Mechanism, Reservation
from accounting.ledger.lookup import find_reservation
from accounting.ledger.transaction import LedgerTransaction
from accounting.mechanism import composed
from sweeps.database import checkpoint_rows, rows
from sweeps.database.states import AttemptEnd, TrialState, Wish
from sweeps.database.tables import (
    attempts,
    branches,
    budgeting,
    finite_or_none,
    reading,
    reports,
    sweeps,
    trials,
    writing,
)
from sweeps.errors import FencedError, HaltedError, OverspentError, StoreError
from trainer.config import TrialConfig
from trainer.mechanism.branch import Branch

MAX_LOST = 5
"""So many workers in a row may die over a trial that gets no further."""

# Built once: building a statement takes as long as running it.
_WISH = sa.select(sweeps.c.wish).where(sweeps.c.sweep_id == sa.bindparam("sweep"))
_TRIAL = sa.select(trials).where(trials.c.trial_id == sa.bindparam("id"))
_NEW_ATTEMPT = attempts.insert()
_HISTORY = (
    sa.select(attempts.c.number, attempts.c.end, attempts.c.charged_before)
    .where(attempts.c.trial_id == sa.bindparam("id"))
    .order_by(attempts.c.number.desc())
)
_BRANCHES = (
    sa.select(branches)
    .where(branches.c.trial_id == sa.bindparam("id"))
    .order_by(branches.c.number)
)
_NEW_BRANCH = branches.insert()
_CHARGED_BRANCH = (
    branches.update()
    .where(branches.c.trial_id == sa.bindparam("id"), branches.c.number == sa.bindparam("which"))
    .values(charged_step=sa.bindparam("to_step"))
)
_REPORT = sa.select(reports.c.step).where(
    reports.c.trial_id == sa.bindparam("trial_id"),
    reports.c.step == sa.bindparam("step"),
    reports.c.branch == sa.bindparam("branch"),
)
_LAST_REPORTED = sa.select(sa.func.max(reports.c.step)).where(
    reports.c.trial_id == sa.bindparam("id")
)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """What a worker needs to know of its trial.

    Attributes:
        sweep_id: The sweep.
        config: The trial, with the microbatch that it is to use.
        checkpoints: Locations of its own, newest first.
        branches: Its branches of noise, in the order in which they began.
        fork_from: Of a fork, where the checkpoint lies that it goes on from, perhaps several
            times; None of other trials.
        spent_before: Of a fork, what was spent on that checkpoint.
    """

    sweep_id: str
    config: TrialConfig
    checkpoints: Sequence[str] = ()
    branches: Sequence[Branch] = ()
    fork_from: Sequence[str] | None = None
    spent_before: Sequence[Mechanism] = ()


class Reported(NamedTuple):
    """What a worker hears when it has reported.

    Attributes:
        wish: What is asked of the trial's sweep.
        superseded: Locations of checkpoints that are no longer needed now that the trial has
            ended, for the worker to remove.
    """

    wish: Wish
    superseded: Sequence[str]


class Attempts:
    """A worker's side of the database.

    Safe to use from several threads and processes. Every method raises
    `sweeps.errors.DatabaseError` if the database fails, and has changed nothing then.

    Args:
        ledger: In a database that has this room's tables.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._engine = ledger.engine

    def assignment(self, trial_id: str) -> Assignment:
        """What a trial is to do, and from where.

        Raises:
            StoreError: If there is no such trial, or nothing of it may run.
        """
        with reading(self._engine) as connection:
            trial = connection.execute(_TRIAL, {"id": trial_id}).one_or_none()
            if trial is None or trial.trial_config is None:
                raise StoreError(f"trial {trial_id!r}: not in the ledger, or not one that may run")
            facts = [row.facts for row in connection.execute(_BRANCHES, {"id": trial_id})]
            reported = connection.scalar(_LAST_REPORTED, {"id": trial_id}) or 0
            # One further on would leave the report between unsaid.
            found = checkpoint_rows.newest_first(connection, trial_id)
            own = tuple(row.location for row in found if row.step <= reported)
            parent: Sequence[str] | None = None
            if trial.parent_trial_id is not None:
                found = checkpoint_rows.newest_first(connection, trial.parent_trial_id)
                parent = tuple(row.location for row in found if row.step == trial.parent_step)
        config = TrialConfig.from_json(trial.trial_config)
        if trial.microbatch_size is not None:
            clipping = dataclasses.replace(config.clipping, microbatch_size=trial.microbatch_size)
            config = dataclasses.replace(config, clipping=clipping)
        return Assignment(
            sweep_id=trial.sweep_id,
            config=config,
            checkpoints=own,
            branches=[Branch.from_json(each) for each in facts if each is not None],
            fork_from=parent,
            spent_before=self._spent_before(trial),
        )

    def _spent_before(self, trial: sa.Row[Any]) -> Sequence[Mechanism]:
        if trial.parent_trial_id is None:
            return ()
        return self._ledger.reservation(trial.trial_id).request.prefix

    def begin(self, trial_id: str, *, worker: str = "") -> Attempt:
        """Starts to run a trial; every earlier attempt at it is fenced from here on.

        Args:
            trial_id: An admitted, paused or running trial.
            worker: Who runs it, as ``host:pid``, for a person in search of it.

        Raises:
            StoreError: If there is no such trial, it may not run (it was rejected, say), or too
                many workers died over it: it has failed then.
            HaltedError: If the sweep is paused, or is stopped and the trial has not begun, or the
                trial is to wait at a rung.
        """
        attempt_id = secrets.token_hex(16)
        rung = None
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = rows.locked_trial(connection, trial_id)
            state = TrialState(trial.state)
            if not state.may_run:
                raise StoreError(f"trial {trial_id}: is {state}; allowed to run is ADMITTED")
            wish = _wish(connection, trial.sweep_id)
            under_way = wish is Wish.STOP and state is TrialState.RUNNING
            if wish and not under_way:
                raise HaltedError(f"trial {trial_id}: its sweep is asked to {wish}")
            number, lost = _history(connection, trial)
            if rows.selects(connection, trial.sweep_id):
                lost = 0  # how far it is, its charge may not tell; its worker counts
            if (rung := rows.waiting_rung(connection, trial)) is not None:
                rows.set_aside(connection, trial_id, rung)  # who was to do so died
            elif lost < MAX_LOST:
                rows.end_attempt(connection, trial_id, AttemptEnd.LOST)
                new = {
                    "attempt_id": attempt_id,
                    "trial_id": trial_id,
                    "number": number + 1,
                    "worker": worker,
                    "started_at": time.time(),
                    "charged_before": trial.charged_iterations,
                }
                connection.execute(_NEW_ATTEMPT, new)
                rows.set_trial(connection, trial_id, state=TrialState.RUNNING)
            else:
                reason = f"{lost} workers died over it without getting any further"
                rows.end_trial(transaction, trial, TrialState.FAILED, reason)
        if rung is not None:
            raise HaltedError(f"trial {trial_id}: waits at step {rung}")
        if lost >= MAX_LOST:
            raise StoreError(f"trial {trial_id}: {lost} workers died over it")
        return Attempt(attempt_id, trial_id, number + 1)

    def charge(self, attempt: Attempt, branch: Branch, step: int) -> int:
        """Makes it durable that a branch has brought the trial to ``step``. Idempotent.

        A new branch may take steps again, with new noise, which have to be paid again. Where the
        reservation does not cover them the budget is asked for more at once; if it refuses, or if
        the trial would exceed what its specification allows one, it goes as far as what it has.

        Of correlated noise (``bands`` > 1) a trial is accounted by whole groups of ``bands``
        steps, each of which a unit takes part in once: so what other branches were charged is
        rounded up to whole groups, for what they left of one would otherwise hide the first
        steps of this.

        Args:
            attempt: The attempt.
            branch: Whose noise the steps had.
            step: The step it has reached; an earlier one changes nothing.

        Returns:
            Iterations that the trial has been charged by now, over all its branches.

        Raises:
            FencedError: If the attempt is not the trial's newest, or the trial has ended.
            OverspentError: If the trial would exceed what is reserved for it, or its budget is
                frozen. Nothing is charged then, and nothing of the steps may be released.
            StoreError: If the branch begins where nobody has been: nobody has steps behind it
                unpaid.
        """
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = _fenced(connection, attempt)
            known = _branches(connection, attempt.trial_id)
            mine = known.pop(branch.branch_id, None)
            config = None
            if (known or mine is None) and trial.trial_config is not None:
                config = TrialConfig.from_json(trial.trial_config)
            bands = config.mechanism.bands if config else 1
            reached = branch.start_step if mine is None else mine.charged_step
            others = sum(
                _whole(row.charged_step - row.start_step, bands) for row in known.values()
            )
            if mine is None:
                furthest = max(
                    [row.charged_step for row in known.values()], default=trial.parent_step or 0
                )
                if not 0 <= branch.start_step <= max(furthest, trial.parent_step or 0):
                    raise StoreError(
                        f"trial {attempt.trial_id}: a branch cannot begin at step "
                        f"{branch.start_step}; charged are {furthest}"
                    )
                if config is not None:
                    wanted = others + config.iterations - branch.start_step
                    self._cover(transaction, trial, config, wanted)
            elif mine.start_step != branch.start_step:
                raise StoreError(
                    f"trial {attempt.trial_id}: branch {branch.branch_id} began at step "
                    f"{mine.start_step}, not {branch.start_step}"
                )
            furthest = max(step, reached)
            total = max(trial.charged_iterations, others + furthest - branch.start_step)
            answer = transaction.charge(attempt.trial_id, total)
            if not isinstance(answer, BudgetExceeded):
                _set_branch(connection, attempt.trial_id, branch, len(known) + 1, mine, furthest)
                rows.set_trial(connection, attempt.trial_id, charged_iterations=total)
        if isinstance(answer, BudgetExceeded):
            raise OverspentError(f"trial {attempt.trial_id}: at step {step}: {answer}") from answer
        return total

    def _cover(
        self,
        transaction: LedgerTransaction,
        trial: sa.Row[Any],
        config: TrialConfig,
        wanted: int,
    ) -> None:
        """Asks the budget for what a new branch needs beyond what is reserved.

        Not for more than the specification allows one trial.
        """
        if wanted <= trial.planned_iterations:
            return
        connection = transaction.connection
        reservation = find_reservation(connection, trial.trial_id)
        assert reservation is not None  # it is written with the trial
        if rows.beyond_limit(connection, trial, reservation, wanted):
            return
        answer = transaction.extend(trial.trial_id, wanted)
        if isinstance(answer, BudgetExceeded):
            return
        rows.set_trial(
            connection,
            trial.trial_id,
            planned_iterations=wanted,
            planned_epsilon=planned_epsilon(answer, config),
        )

    def report(
        self,
        attempt: Attempt,
        branch_id: str,
        step: int,
        metrics: Mapping[str, float],
        *,
        end: TrialState | None = None,
        reason: str = "",
        checkpoint: str | None = None,
    ) -> Reported:
        """Records what a charged step may show, and tells MLflow. Idempotent.

        The last report, its checkpoint and the trial's end are one transaction: a trial that has
        ended has said how, and what it has learnt is kept.

        Args:
            attempt: The attempt.
            branch_id: The branch that took the step.
            step: A step that has been charged.
            metrics: Of `sweeps.database.tables.METRICS`, those that were measured; non-finite
                ones are kept as NULL.
            end: The state in which the trial ends with this report; None if it goes on.
            reason: Why it ends.
            checkpoint: Where a whole checkpoint of this step lies that is not recorded yet; it
                could not be resumed from before the report was there.

        Raises:
            FencedError: As in `charge`.
            StoreError: If the step has not been charged.
        """
        values = {name: finite_or_none(value) for name, value in metrics.items()}
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            trial = _fenced(connection, attempt)
            wish = _wish(connection, trial.sweep_id)
            branch = _branches(connection, attempt.trial_id).get(branch_id)
            if branch is None or step > branch.charged_step:
                charged = None if branch is None else branch.charged_step
                raise StoreError(
                    f"trial {attempt.trial_id}: report of step {step}, charged are "
                    f"{charged}: nothing leaves before it is charged"
                )
            key = {"trial_id": attempt.trial_id, "step": step, "branch": branch.number}
            if connection.execute(_REPORT, key).one_or_none() is None:
                new = reports.insert().values(  # of any other name than a column's it complains
                    **key,
                    reported_at=time.time(),
                    charged_iterations=trial.charged_iterations,
                    **values,
                )
                connection.execute(new)
                told = {"step": step, "metrics": values}
                rows.tell(connection, trial.sweep_id, attempt.trial_id, "metrics", told)
            if checkpoint is not None:
                checkpoint_rows.add(connection, attempt.trial_id, step, attempt.number, checkpoint)
            superseded: Sequence[str] = ()
            if end is not None:
                rows.end_trial(transaction, trial, end, reason)
                superseded = checkpoint_rows.forget_old(connection, attempt.trial_id, end)
        return Reported(wish, superseded)

    def checkpoint(self, attempt: Attempt, step: int, location: str) -> list[str]:
        """Records a checkpoint that is whole; also just after its trial has ended.

        Returns:
            Locations of older ones that are no longer needed, for the caller to remove.

        Raises:
            FencedError: If the attempt is not the trial's newest.
        """
        with writing(self._engine) as connection:
            trial = _fenced(connection, attempt, ended=True)
            checkpoint_rows.add(connection, attempt.trial_id, step, attempt.number, location)
            return checkpoint_rows.forget_old(connection, attempt.trial_id, trial.state)

    def forget_old_checkpoints(self, attempt: Attempt) -> list[str]:
        """Forgets the checkpoints that a trial no longer needs once somebody else has ended it.

        Returns:
            Their locations, for the caller to remove.

        Raises:
            FencedError: If the attempt is not the trial's newest.
        """
        with writing(self._engine) as connection:
            trial = _fenced(connection, attempt, ended=True)
            return checkpoint_rows.forget_old(connection, attempt.trial_id, trial.state)

    def fail(self, attempt: Attempt, reason: str) -> None:
        """Ends a trial as FAILED from its own worker.

        Raises:
            FencedError: As in `charge`.
        """
        with budgeting(self._ledger) as transaction:
            trial = _fenced(transaction.connection, attempt)
            rows.end_trial(transaction, trial, TrialState.FAILED, reason)

    def pause(self, attempt: Attempt, reason: str = "") -> None:
        """Sets a trial aside at its last checkpoint; what is reserved for it stays reserved.

        Args:
            attempt: The attempt.
            reason: Why, if nobody asked for it: its whole sweep is to pause then.

        Raises:
            FencedError: As in `charge`.
        """
        with writing(self._engine) as connection:
            trial = _fenced(connection, attempt)
            rows.end_attempt(connection, attempt.trial_id, AttemptEnd.PAUSED)
            rows.set_trial(connection, attempt.trial_id, state=TrialState.PAUSED, reason=reason)
            if reason:
                connection.execute(
                    sweeps.update()
                    .where(sweeps.c.sweep_id == trial.sweep_id)
                    .values(wish=Wish.PAUSE)
                )

    def is_to_wait(self, attempt: Attempt) -> bool:
        """Whether the scheduler has decided that the trial waits at a rung."""
        with reading(self._engine) as connection:
            trial = connection.execute(_TRIAL, {"id": attempt.trial_id}).one()
            return rows.waiting_rung(connection, trial) is not None

    def wait(self, attempt: Attempt) -> None:
        """Sets a trial aside that `is_to_wait`, once its checkpoint is recorded.

        Raises:
            FencedError: As in `charge`.
        """
        with writing(self._engine) as connection:
            rung = rows.waiting_rung(connection, _fenced(connection, attempt))
            if rung is not None:
                rows.set_aside(connection, attempt.trial_id, rung)

    def out_of_memory(self, attempt: Attempt, microbatch_size: int | None = None) -> None:
        """Ends an attempt that ran out of memory; the next one is to do with less.

        Args:
            attempt: The attempt.
            microbatch_size: Gradients at a time for the next, >= 1; None for as many as before.

        Raises:
            FencedError: As in `charge`.
        """
        with writing(self._engine) as connection:
            _fenced(connection, attempt)
            rows.end_attempt(connection, attempt.trial_id, AttemptEnd.OUT_OF_MEMORY)
            if microbatch_size is not None:
                rows.set_trial(connection, attempt.trial_id, microbatch_size=microbatch_size)

    def check_holds(self, attempt: Attempt) -> None:
        """Whether an attempt may go on, without waiting for its next charge.

        Raises:
            FencedError: As in `charge`.
        """
        with reading(self._engine) as connection:
            newest = rows.newest_attempt(connection, attempt.trial_id)
        if newest is None or newest.number != attempt.number or newest.ended_at is not None:
            raise FencedError(f"trial {attempt.trial_id}: attempt {attempt.number} has ended")


def planned_epsilon(reservation: Reservation, config: TrialConfig) -> float | None:
    """Epsilon of all that is reserved for a trial; None where no finite bound is known."""
    return finite_or_none(_epsilon(reservation, reservation.reserved, config))


def spent_epsilon(reservation: Reservation, config: TrialConfig) -> float:
    """Epsilon of what a trial has been charged."""
    return _epsilon(reservation, reservation.charged, config)


def _epsilon(reservation: Reservation, iterations: int, config: TrialConfig) -> float:
    assert isinstance(reservation.mechanism, Mechanism)
    own = [reservation.mechanism.after(iterations)] if iterations else []
    parts = composed([*reservation.request.prefix, *own])
    if not parts:
        return 0.0
    return accounting.epsilon_of_list(
        parts, delta=config.target_delta, accountant=config.accountant
    )


def furthest_step(connection: sa.Connection, trial: sa.Row[Any]) -> int:
    """The furthest step that any branch of a trial was charged for."""
    furthest = connection.scalar(
        sa.select(sa.func.max(branches.c.charged_step)).where(
            branches.c.trial_id == trial.trial_id
        )
    )
    return furthest or trial.parent_step or 0


def _fenced(connection: sa.Connection, attempt: Attempt, *, ended: bool = False) -> sa.Row[Any]:
    return rows.fenced_trial(
        connection, attempt.trial_id, attempt.attempt_id, attempt.number, ended=ended
    )


def _wish(connection: sa.Connection, sweep_id: str) -> Wish:
    return Wish(connection.scalar(_WISH, {"sweep": sweep_id}) or "")


def _branches(connection: sa.Connection, trial_id: str) -> dict[str, sa.Row[Any]]:
    found = connection.execute(_BRANCHES, {"id": trial_id})
    return {row.branch_id: row for row in found}


def _set_branch(
    connection: sa.Connection,
    trial_id: str,
    branch: Branch,
    number: int,
    mine: sa.Row[Any] | None,
    charged_step: int,
) -> None:
    if mine is None:
        new = {
            "trial_id": trial_id,
            "number": number,
            "branch_id": branch.branch_id,
            "start_step": branch.start_step,
            "charged_step": charged_step,
            "facts": branch.to_json(),
        }
        connection.execute(_NEW_BRANCH, new)
    elif charged_step > mine.charged_step:
        which = {"id": trial_id, "which": mine.number}
        connection.execute(_CHARGED_BRANCH, {**which, "to_step": charged_step})


def _whole(steps: int, bands: int) -> int:
    """Steps, rounded up to whole groups of steps with correlated noise."""
    return -(-steps // bands) * bands


def _history(connection: sa.Connection, trial: sa.Row[Any]) -> tuple[int, int]:
    """How many attempts there were, and how many of the latest were lost for nothing.

    One that has not ended is lost, too, where another begins. What was before the trial ended and
    somebody readmitted it does not count.
    """
    found = connection.execute(_HISTORY, {"id": trial.trial_id}).all()
    lost = 0
    for row in found:
        if row.end == AttemptEnd.ENDED or row.charged_before != trial.charged_iterations:
            break
        lost += row.end in (None, AttemptEnd.LOST)
    return (found[0].number if found else 0), lost
