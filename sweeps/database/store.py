"""A sweep's rows: how they begin, are read, change at a person's word, and end.

One transaction each. The driver and the workers meet in the database and nowhere else: what a
worker may write is in `attempts`, what a scheduler decides in `rung_rows`, what MLflow has to
hear in `outbox_rows`; it is put there by the transaction that makes it true.
"""

import dataclasses
import itertools
import time
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import sqlalchemy as sa

from accounting import BudgetTerms, Ledger
from sweeps.database import rows
from sweeps.database.admitting import NewTrial, admit
from sweeps.database.attempts import Attempts
from sweeps.database.forking import Fork, NewFork, fork
from sweeps.database.gatherings import Gatherings
from sweeps.database.outbox_rows import OutboxRows
from sweeps.database.readmission import Readmission, readmit
from sweeps.database.refused_rows import RefusedRows
from sweeps.database.rung_rows import RungRows
from sweeps.database.selecting import Selections
from sweeps.database.states import AttemptEnd, SweepState, TrialState, Wish
from sweeps.database.tables import (
    attempts,
    budgeting,
    open_ledger,
    reading,
    reports,
    sweeps,
    trials,
    try_driving_lock,
    writing,
)
from sweeps.errors import StoreError
from sweeps.home import Home
from trainer.config import TrialConfig
from trainer.training.plan import shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewSweep:
    """A sweep as submitted; fields as the columns of the table ``sweeps``, and who pays.

    Attributes:
        terms: Of the budget.
        budget: Its name; None makes one for this sweep alone, named after it.
        team: Whose share pays; "" where the budget is not divided.
        repeats: How many of its trials in a row have the same configuration.
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
    repeats: int = 1


class Store:
    """Reads and writes the rows of sweeps and trials.

    What concerns the budget, that trials are admitted, charged and settled, is written by the
    ledger in the same transaction: a trial's id is the id of its reservation.

    Safe to use from several threads and processes. Every method raises
    `sweeps.errors.DatabaseError` if the database fails.

    Args:
        ledger: In a database that has this room's tables; see `open_store`.

    Attributes:
        attempts: A worker's side.
        selections: A worker's side of a private selection.
        rungs: A scheduler's side.
        gatherings: The same, where trials wait for each other.
        refused: What a budget refused and may yet admit.
        outbox: What MLflow has yet to hear.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._engine = ledger.engine
        self.attempts = Attempts(ledger)
        self.selections = Selections(ledger)
        self.rungs = RungRows(ledger)
        self.gatherings = Gatherings(ledger)
        self.refused = RefusedRows(ledger)
        self.outbox = OutboxRows(ledger.engine)

    @property
    def ledger(self) -> Ledger:
        """The ledger, in the same database."""
        return self._ledger

    # -- beginning and ending -----------------------------------------------------------------

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
            if sweep.budget is None:
                transaction.create_budget(
                    sweep.sweep_id,
                    dataset=sweep.dataset,
                    dataset_fingerprint=sweep.dataset_fingerprint,
                    terms=sweep.terms,
                    one_off=True,
                )
            connection.execute(
                sweeps.insert().values(**row, state=SweepState.RUNNING, created_at=time.time())
            )
            rows.tell(connection, sweep.sweep_id, None, "sweep_start", {})
            admit(
                transaction,
                sweep.sweep_id,
                new_trials,
                budget=sweep.budget,
                team=sweep.team,
                repeats=sweep.repeats,
            )

    def add_trials(
        self, sweep_id: str, repeats: Sequence[NewTrial], *, budget: str | None, team: str
    ) -> list[str]:
        """Has the budget decide on one more configuration of a running sweep; records all of it.

        Args:
            sweep_id: The sweep.
            repeats: The trials of the configuration, of which all are admitted or none; their ids
                and numbers are chosen anew, for forks may have taken them.
            budget: As `NewSweep`'s.
            team: Likewise.

        Returns:
            The ids of those that were admitted.

        Raises:
            StoreError: If there is no such sweep, or it does not run.
        """
        new: list[NewTrial] = []
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            rows.check_runs(connection, sweep_id)
            for trial in repeats:
                after = new[-1].number if new else -1
                number, trial_id = rows.next_name(connection, sweep_id, after)
                first = new[0].trial_id if new else None
                new.append(
                    dataclasses.replace(trial, number=number, trial_id=trial_id, repeat_of=first)
                )
            count = len(new)
            admitted = admit(transaction, sweep_id, new, budget=budget, team=team, repeats=count)
        return [trial.trial_id for trial in new if trial.trial_id in admitted]

    def end_trial(self, trial_id: str, state: TrialState, reason: str = "") -> bool:
        """Moves a trial to an ended state; False if it had ended already.

        Raises:
            StoreError: If there is no such trial or the state may not follow.
        """
        with budgeting(self._ledger) as transaction:
            row = rows.locked_trial(transaction.connection, trial_id)
            if TrialState(row.state).is_finished:
                return False
            rows.end_trial(transaction, row, state, reason)
            return True

    def end_sweep(
        self,
        sweep_id: str,
        state: SweepState,
        artifacts: Sequence[str] = (),
        *,
        reason: str = "",
    ) -> bool:
        """Ends a sweep, or its work for now; MLflow gets the files named in ``artifacts``.

        Args:
            sweep_id: The sweep.
            state: Where it is then.
            artifacts: Absolute paths.
            reason: What a person has to know of its end.

        Returns:
            Whether it has ended. Not so if it was to end for good, and meanwhile somebody let a
            trial go on.
        """
        with writing(self._engine) as connection:
            # First, so that who lets a trial go on in this moment comes before or after.
            _set_sweep(connection, sweep_id, wish=rows.sweep_row(connection, sweep_id).wish)
            states = sa.select(trials.c.state).where(trials.c.sweep_id == sweep_id).distinct()
            left = any(TrialState(found).may_run for found in connection.scalars(states))
            if left and state in (SweepState.COMPLETED, SweepState.FAILED):
                return False
            _set_sweep(
                connection,
                sweep_id,
                state=state,
                ended_at=time.time(),
                wish=Wish.NONE,
                reason=reason,
            )
            payload = {"state": state, "artifacts": list(artifacts)}
            rows.tell(connection, sweep_id, None, "sweep_end", payload)
        return True

    # -- driving ------------------------------------------------------------------------------

    def driving_lock(self, sweep_id: str) -> AbstractContextManager[bool]:
        """The right to drive a sweep; given to one at a time, and freed by a process's death."""
        return try_driving_lock(self._engine, sweep_id)

    def is_driven(self, sweep_id: str) -> bool:
        """Whether a process drives a sweep, and will take up what may run of it."""
        with self.driving_lock(sweep_id) as free:
            return not free and self.sweep(sweep_id).state == SweepState.RUNNING

    def is_to_be_driven(self, sweep_id: str) -> bool:
        """Whether a sweep runs, and nobody has said that its driver is to leave it."""
        row = self.sweep(sweep_id)
        running = row.state == SweepState.RUNNING
        return running and not row.reason and row.wish != Wish.INTERRUPT

    def reopen(self, sweep_id: str) -> None:
        """Makes a sweep one that runs, whatever it was and whatever had been asked of it.

        Raises:
            StoreError: If there is no such sweep.
        """
        with writing(self._engine) as connection:
            before = rows.sweep_row(connection, sweep_id)
            _set_sweep(
                connection,
                sweep_id,
                state=SweepState.RUNNING,
                ended_at=None,
                wish=Wish.NONE,
                reason="",
            )
            if before.state != SweepState.RUNNING:
                rows.tell(connection, sweep_id, None, "sweep_resume", {})

    def take_over(self, sweep_id: str, driver: str) -> None:
        """Begins to drive a running sweep: whoever worked for an earlier driver is gone.

        Args:
            sweep_id: The sweep. The caller has its `driving_lock`.
            driver: Who drives, as ``host:pid``.

        Raises:
            StoreError: If there is no such sweep, or it does not run.
        """
        with writing(self._engine) as connection:
            rows.check_runs(connection, sweep_id)
            _set_sweep(connection, sweep_id, driver=driver)
            ours = sa.select(trials.c.trial_id).where(trials.c.sweep_id == sweep_id)
            connection.execute(
                attempts.update()
                .where(attempts.c.trial_id.in_(ours), attempts.c.ended_at.is_(None))
                .values(ended_at=time.time(), end=AttemptEnd.INTERRUPTED)
            )

    def give_up(self, sweep_id: str, reason: str) -> None:
        """Notes why a sweep's driver went no further; the sweep is left where it is."""
        with writing(self._engine) as connection:
            _set_sweep(connection, sweep_id, reason=reason)

    def runnable(self, sweep_id: str) -> list[sa.Row[Any]]:
        """Trials that a worker may take up, in the order in which they start.

        Those under way first; then by number, but trials that share compiled programs one after
        the other, so that a worker has the program of its next trial. Not those that wait at a
        rung; see `RungRows.waiting`.
        """
        waiting = {row.trial_id for row in self.rungs.waiting(sweep_id)}
        found = [
            row
            for row in self.trials(sweep_id)
            if TrialState(row.state).may_run and row.trial_id not in waiting
        ]
        under_way = [row for row in found if row.state != TrialState.ADMITTED]
        by_shape: dict[Hashable, list[sa.Row[Any]]] = {}
        for row in found:
            if row.state == TrialState.ADMITTED:
                config = row.trial_config and TrialConfig.from_json(row.trial_config)
                by_shape.setdefault(config and shape_of(config), []).append(row)
        return [*under_way, *itertools.chain.from_iterable(by_shape.values())]

    def set_wish(self, sweep_id: str, wish: Wish) -> None:
        """Asks a running sweep to pause or stop.

        Raises:
            StoreError: If there is no such sweep, or it does not run.
        """
        with writing(self._engine) as connection:
            rows.check_runs(connection, sweep_id)
            _set_sweep(connection, sweep_id, wish=wish)

    def cancel_sweep(self, sweep_id: str) -> None:
        """Ends every trial of a sweep that has not ended, and fences who works on it.

        Raises:
            StoreError: If there is no such sweep, or it has ended.
        """
        with budgeting(self._ledger) as transaction:
            connection = transaction.connection
            sweep = rows.sweep_row(connection, sweep_id)
            if sweep.state not in (SweepState.RUNNING, SweepState.PAUSED):
                raise StoreError(f"sweep {sweep_id}: is {sweep.state}; allowed is one under way")
            _set_sweep(connection, sweep_id, state=SweepState.CANCELLED)
            left = connection.execute(
                sa.select(trials).where(trials.c.sweep_id == sweep_id).with_for_update()
            ).all()
            for row in left:
                if not TrialState(row.state).is_finished:
                    reason = "the sweep was cancelled"
                    rows.end_trial(transaction, row, TrialState.CANCELLED, reason)

    def wish(self, sweep_id: str) -> Wish:
        """What was asked of a sweep."""
        return Wish(self.sweep(sweep_id).wish)

    # -- going on -----------------------------------------------------------------------------

    def readmit(
        self, iterations: Mapping[str, int | None], *, dry_run: bool = False
    ) -> list[Readmission]:
        """Has the budget decide on trials that have ended or wait; those it admits may go on.

        Of each, what it had not run is reserved again, and what is added to it too. It may not
        exceed what its specification allows one trial, either. No scheduler prunes it from then
        on, and a wish that the sweep end or wait is taken back. All in one transaction, one trial
        after the other.

        Args:
            iterations: By trial, the step at which it is to end; None keeps the one it has. Trials
                that were pruned, set aside, cancelled or failed, or completed if they get more
                iterations.
            dry_run: Whether to decide in the same way and change nothing.

        Returns:
            The decisions, in order.

        Raises:
            StoreError: If one is not such a trial, or has nothing left to do; nothing has changed
                then.
        """
        decisions: list[Readmission] = []
        with suppress(_DryRun), budgeting(self._ledger) as transaction:
            for trial_id, end in iterations.items():
                decisions.append(readmit(transaction, trial_id, end))
            for sweep_id in {decision.sweep_id for decision in decisions if decision.admitted}:
                _set_sweep(transaction.connection, sweep_id, wish=Wish.NONE)
            if dry_run:
                raise _DryRun
        return decisions

    def fork(self, new: NewFork, *, dry_run: bool = False) -> Fork:
        """Has the budget decide on a trial that goes on from another's checkpoint.

        If it is admitted it is a trial of the same sweep, ready to run. If it is not, nothing is
        there but what the ledger's journal says.

        Args:
            new: What is wanted.
            dry_run: Whether to decide in the same way and change nothing.

        Raises:
            StoreError: If there is no such trial or checkpoint, or nothing can go on from it.
            accounting.AccountingError: If the data is not that of the sweep.
        """
        decision = None
        with suppress(_DryRun), budgeting(self._ledger) as transaction:
            decision = fork(transaction, new)
            if decision.admitted:
                _set_sweep(transaction.connection, decision.sweep_id, wish=Wish.NONE)
            if dry_run:
                raise _DryRun
        assert decision is not None
        return decision

    # -- reading ------------------------------------------------------------------------------

    def sweep(self, sweep_id: str) -> sa.Row[Any]:
        """A sweep's row.

        Raises:
            StoreError: If there is none of this id.
        """
        with reading(self._engine) as connection:
            return rows.sweep_row(connection, sweep_id)

    def sweeps(self) -> Sequence[sa.Row[Any]]:
        """Every sweep's row, newest first."""
        with reading(self._engine) as connection:
            return connection.execute(sa.select(sweeps).order_by(sweeps.c.created_at.desc())).all()

    def trial(self, trial_id: str) -> sa.Row[Any] | None:
        """A trial's row, or None if there is none of this id."""
        with reading(self._engine) as connection:
            return connection.execute(
                sa.select(trials).where(trials.c.trial_id == trial_id)
            ).one_or_none()

    def trials(self, sweep_id: str) -> Sequence[sa.Row[Any]]:
        """A sweep's trials, by number."""
        query = sa.select(trials).where(trials.c.sweep_id == sweep_id).order_by(trials.c.number)
        with reading(self._engine) as connection:
            return connection.execute(query).all()

    def last_reports(self, sweep_id: str) -> Mapping[str, sa.Row[Any]]:
        """The last report of each of a sweep's trials that has one."""
        last = (
            sa.select(reports.c.trial_id, sa.func.max(reports.c.step).label("step"))
            .join(trials, trials.c.trial_id == reports.c.trial_id)
            .where(trials.c.sweep_id == sweep_id)
            .group_by(reports.c.trial_id)
            .subquery()
        )
        query = (
            sa.select(reports)
            .join(last, (reports.c.trial_id == last.c.trial_id) & (reports.c.step == last.c.step))
            .order_by(reports.c.branch)
        )
        with reading(self._engine) as connection:
            return {row.trial_id: row for row in connection.execute(query)}

    def best_utility(self, sweep_id: str) -> float | None:
        """The best ``eval_accuracy`` that a trial of a sweep has reported; None before any."""
        query = (
            sa.select(sa.func.max(reports.c.eval_accuracy))
            .join(trials, trials.c.trial_id == reports.c.trial_id)
            .where(trials.c.sweep_id == sweep_id)
        )
        with reading(self._engine) as connection:
            return connection.scalar(query)

    def attempt_times(self, sweep_id: str) -> list[tuple[str, float, float | None]]:
        """Workers, and when they began and ended with a sweep's trials; None: not yet."""
        query = (
            sa.select(attempts.c.worker, attempts.c.started_at, attempts.c.ended_at)
            .join(trials, trials.c.trial_id == attempts.c.trial_id)
            .where(trials.c.sweep_id == sweep_id)
        )
        with reading(self._engine) as connection:
            return [tuple(row) for row in connection.execute(query)]

    def reports(self, sweep_id: str) -> Sequence[sa.Row[Any]]:
        """All reports of a sweep's trials, by trial and time."""
        query = (
            sa.select(reports)
            .join(trials, trials.c.trial_id == reports.c.trial_id)
            .where(trials.c.sweep_id == sweep_id)
            .order_by(trials.c.number, reports.c.branch, reports.c.step)
        )
        with reading(self._engine) as connection:
            return connection.execute(query).all()


def open_store(home: Home) -> Store:
    """The store of a home; see `sweeps.database.tables.open_ledger`."""
    return Store(open_ledger(home))


class _DryRun(Exception):
    """Takes everything back."""


def _set_sweep(connection: sa.Connection, sweep_id: str, **values: Any) -> None:
    connection.execute(sweeps.update().where(sweeps.c.sweep_id == sweep_id).values(**values))
