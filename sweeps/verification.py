"""Holds a sweep's records to each other: steps, charges, reports, decisions, checkpoints, MLflow.

Everything that a trial did is written down in several places, each for its own reader. Here they
are compared, and what disagrees is named. The rows are read in one transaction, so a sweep that
runs can be verified, too; MLflow is read while nobody delivers to it.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from accounting import Mechanism, Reservation, Selection, selection_epsilon
from accounting.ledger.lookup import find_reservations
from sweeps.database.attempts import spent_epsilon
from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.database.tables import (
    METRICS,
    branches,
    checkpoints,
    finite_or_none,
    outbox,
    reading,
    reports,
    rungs,
    trials,
)
from sweeps.errors import TrackingError
from sweeps.home import Home
from sweeps.tracking import comparison
from sweeps.tracking.comparison import Difference, Told
from sweeps.tracking.mlflow_client import Mlflow
from trainer.config import TrialConfig
from trainer.errors import CheckpointError
from trainer.weights.checkpoints import read_manifest

_PATIENCE_SECS = 60.0
_LOOK_AGAIN_SECS = 0.1
# FFTs of different machines round differently, and epsilon comes out of one.
_EPSILON_TOLERANCE = 1e-9
_STOPPED = frozenset({TrialState.PRUNED})
# What may become of a trial that waits; with RUNNING it is about to.
_WAITING = frozenset(
    {TrialState.RUNNING, TrialState.PAUSED, TrialState.CANCELLED, TrialState.FAILED}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        sweep_id: The sweep.
        trials: How many trials were looked at.
        reports: How many of their reports.
        checkpoints: How many checkpoints were read from the first byte to the last.
        elsewhere: How many more lie behind a URL and were not read.
        ledger_entries: How many entries of the ledger follow from each other.
        undelivered: Messages that MLflow has yet to get.
        mlflow_checked: Whether MLflow was compared.
        mlflow_problem: Why not, where it should have been; else empty.
        differences: Everything that disagrees, the sweep's own first, then by trial.
    """

    sweep_id: str
    trials: int
    reports: int
    checkpoints: int
    elsewhere: int
    ledger_entries: int
    undelivered: int
    mlflow_checked: bool
    mlflow_problem: str
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that was asked for was compared, and agrees."""
        return not self.differences and not self.mlflow_problem

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}


def verify(
    store: Store,
    home: Home,
    sweep_id: str,
    *,
    with_mlflow: bool = True,
    on_trial: Callable[[], None] = lambda: None,
) -> Verification:
    """Compares all that is recorded of a sweep.

    Args:
        store: The database. Its ledger may be a damaged one.
        home: Says where MLflow is.
        sweep_id: The sweep.
        with_mlflow: Whether MLflow is asked.
        on_trial: Called after every trial; twice for each with MLflow.

    Raises:
        StoreError: If there is no such sweep.
    """
    scheduler = store.sweep(sweep_id).spec.get("scheduler", {})
    may_wait = scheduler.get("name") in ("hyperband", "pbt") or scheduler.get("promotion", False)
    problem = ""
    with ExitStack() as stack:
        if with_mlflow and not stack.enter_context(_nobody_delivers(store)):
            problem = "another process is delivering to it"
        records, told = _read(store, sweep_id, may_wait=may_wait)
        ledger = store.ledger.verify()
        found = [Difference(None, "ledger", None, said) for said in ledger.problems]
        epsilons = _Epsilons()
        for trial in records:
            found += _of_trial(trial, epsilons)
            found += _of_checkpoints(store, trial)
            on_trial()
        if with_mlflow and not problem:
            states = {trial.trial_id: trial.state for trial in records}
            try:
                found += comparison.differences(Mlflow(home), sweep_id, states, told, on_trial)
            except TrackingError as error:
                problem = str(error)
    locations = [row.location for trial in records for row in trial.checkpoints]
    elsewhere = sum(_is_elsewhere(location) for location in locations)
    return Verification(
        sweep_id=sweep_id,
        trials=len(records),
        reports=sum(len(trial.reports) for trial in records),
        checkpoints=len(locations) - elsewhere,
        elsewhere=elsewhere,
        ledger_entries=ledger.entries,
        undelivered=sum(not message.is_delivered for message in told),
        mlflow_checked=with_mlflow and not problem,
        mlflow_problem=problem,
        differences=tuple(sorted(found, key=lambda one: one.trial_id or "")),
    )


@contextmanager
def _nobody_delivers(store: Store) -> Generator[bool]:
    """Holds the right to deliver, once who has it lets it go; gives False if that takes long."""
    deadline = time.monotonic() + _PATIENCE_SECS
    while True:
        with store.outbox.delivery_lock() as held:
            if held or time.monotonic() > deadline:
                yield held
                return
        time.sleep(_LOOK_AGAIN_SECS)


# -- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Records:
    """All that is written down of a trial but in MLflow.

    ``may_wait`` says whether its sweep's trials wait at rungs instead of being pruned there.
    """

    row: sa.Row[Any]
    may_wait: bool
    reservation: Reservation | None
    branches: Sequence[sa.Row[Any]]
    reports: Sequence[sa.Row[Any]]
    rungs: Sequence[sa.Row[Any]]
    checkpoints: Sequence[sa.Row[Any]]
    told: Sequence[Told]

    @property
    def trial_id(self) -> str:
        return self.row.trial_id

    @property
    def state(self) -> TrialState:
        return TrialState(self.row.state)

    @property
    def selects(self) -> bool:
        """Whether it stands for a private selection."""
        asked = self.reservation and self.reservation.request.mechanism
        return isinstance(asked, Selection)

    @property
    def config(self) -> TrialConfig | None:
        return self.row.trial_config and TrialConfig.from_json(self.row.trial_config)

    @property
    def states_at_a_rung(self) -> frozenset[TrialState]:
        """Where it may be once it has been told not to go on."""
        return _STOPPED | _WAITING if self.may_wait else _STOPPED


def _read(store: Store, sweep_id: str, *, may_wait: bool) -> tuple[list[_Records], list[Told]]:
    """A sweep's trials by number, and all messages about it, oldest first."""
    with reading(store.ledger.engine) as connection:
        query = sa.select(trials).where(trials.c.sweep_id == sweep_id).order_by(trials.c.number)
        ours = connection.execute(query).all()
        ids = [row.trial_id for row in ours]
        reservations = {one.request_id: one for one in find_reservations(connection, ids)}
        of_trial = {
            table.name: _by_trial(connection, table, sweep_id)
            for table in (branches, reports, rungs, checkpoints)
        }
        messages = connection.execute(
            sa.select(outbox).where(outbox.c.sweep_id == sweep_id).order_by(outbox.c.message_id)
        )
        told = [
            Told(
                trial_id=row.trial_id,
                kind=row.kind,
                payload=row.payload,
                created_at=row.created_at,
                is_delivered=row.delivered_at is not None,
            )
            for row in messages
        ]
    told_of: dict[str | None, list[Told]] = collections.defaultdict(list)
    for message in told:
        told_of[message.trial_id].append(message)
    records = [
        _Records(
            row=row,
            may_wait=may_wait,
            reservation=reservations.get(row.trial_id),
            told=told_of[row.trial_id],
            **{name: found[row.trial_id] for name, found in of_trial.items()},
        )
        for row in ours
    ]
    return records, told


def _by_trial(
    connection: sa.Connection, table: sa.Table, sweep_id: str
) -> dict[str, list[sa.Row[Any]]]:
    """A table's rows about a sweep, by trial, in the order of their keys."""
    query = (
        sa.select(table)
        .join(trials, trials.c.trial_id == table.c.trial_id)
        .where(trials.c.sweep_id == sweep_id)
        .order_by(*table.primary_key.columns)
    )
    found: dict[str, list[sa.Row[Any]]] = collections.defaultdict(list)
    for row in connection.execute(query):
        found[row.trial_id].append(row)
    return found


# -- comparing -----------------------------------------------------------------------------------


def _of_trial(trial: _Records, epsilons: "_Epsilons") -> list[Difference]:
    found = [
        *_of_charges(trial),
        *_of_reservation(trial),
        *_of_reports(trial, epsilons),
        *_of_messages(trial),
        *_of_end(trial),
    ]
    return [Difference(trial.trial_id, *difference) for difference in found]


_Found = list[tuple[str, comparison.Value, comparison.Value]]


def _of_charges(trial: _Records) -> _Found:
    """Whether the branches' steps add up to what the trial was charged."""
    if trial.selects:
        return []  # charged before it had any
    config = trial.config
    bands = config.mechanism.bands if config else 1
    steps = [row.charged_step - row.start_step for row in trial.branches]
    whole = [-(-each // bands) * bands for each in steps]
    # The branch that was charged last is counted to the step, the others in whole groups.
    totals = [sum(whole) - w + s for s, w in zip(steps, whole, strict=True)] or [0]
    charged = trial.row.charged_iterations
    if min(totals) <= charged <= max(totals):
        return []
    return [("iterations charged, by its branches", max(totals), charged)]


def _of_reservation(trial: _Records) -> _Found:
    """Whether the ledger says the same as the trial's row."""
    row, reservation = trial.row, trial.reservation
    if trial.state is TrialState.REJECTED:
        if reservation is not None and reservation.state != "refused":
            return [("reservation of a rejected trial", "refused", reservation.state)]
        return []
    if reservation is None:
        return [("reservation in the ledger", row.trial_id, None)]
    state = "open"
    if trial.state.is_finished:
        state = "closed" if reservation.charged else "released"
    found: _Found = []
    settled_list = state == "released" and reservation.state == "closed"  # see `Ledger.settle`
    if reservation.state != state and not settled_list:
        found.append((f"reservation of a {trial.state} trial", state, reservation.state))
    if reservation.charged != row.charged_iterations:
        found.append(
            ("iterations charged, by the ledger", reservation.charged, row.charged_iterations)
        )
    if reservation.reserved != row.planned_iterations:
        found.append(
            ("iterations reserved, by the ledger", reservation.reserved, row.planned_iterations)
        )
    return found


def _of_reports(trial: _Records, epsilons: "_Epsilons") -> _Found:
    """Whether reports are of charged steps, and state what those had cost."""
    by_number = {row.number: row for row in trial.branches}
    found: _Found = []
    for report in trial.reports:
        branch = by_number.get(report.branch)
        if branch is None:
            found.append((f"branch of the report of step {report.step}", report.branch, None))
        elif not branch.start_step < report.step <= branch.charged_step:
            within = f"{branch.start_step + 1} to {branch.charged_step}"
            found.append(
                (f"reported step, charged on branch {branch.number}", within, report.step)
            )
        if not 0 < report.charged_iterations <= trial.row.charged_iterations:
            found.append(
                (
                    f"iterations charged by the report of step {report.step}",
                    f"1 to {trial.row.charged_iterations}",
                    report.charged_iterations,
                )
            )
        elif trial.config is not None and trial.reservation is not None:
            expected = epsilons(trial.reservation, trial.config, report.charged_iterations)
            if not _same(expected, report.epsilon):
                found.append((f"epsilon reported at step {report.step}", expected, report.epsilon))
    return found


def _of_messages(trial: _Records) -> _Found:
    """Whether MLflow is told every report, once."""
    reported = collections.Counter(
        (row.step, *(getattr(row, name) for name in METRICS)) for row in trial.reports
    )
    told = collections.Counter(
        _said(message) for message in trial.told if message.kind == "metrics"
    )
    found: _Found = []
    for kept, missing in ((reported - told, True), (told - reported, False)):
        for point, count in kept.items():
            what = f"messages to MLflow of the report of step {point[0]}"
            found.append((what, count if missing else 0, 0 if missing else count))
    return found


def _said(message: Told) -> tuple[Any, ...]:
    metrics = message.payload["metrics"]
    return (message.payload["step"], *(metrics.get(name) for name in METRICS))


def _of_end(trial: _Records) -> _Found:
    """Whether a trial's state is one that its reports and rungs led to."""
    found: _Found = []
    last = max((row.step for row in trial.reports), default=0)
    end = trial.config.iterations if trial.config else last  # a selection may have no winner
    if trial.state is TrialState.COMPLETED and last != end:
        found.append(("last report of a COMPLETED trial", end, last))
    # Trials from before decisions were kept have branches without facts.
    known = any(row.facts is not None for row in trial.branches)
    stopped = any(not row.goes_on for row in trial.rungs)
    if trial.state is TrialState.PRUNED and known and not stopped:
        found.append(("rung at which it was to stop", "one", None))
    if stopped and not (trial.row.exempt or trial.state in trial.states_at_a_rung):
        found.append(("state after a rung at which it was to stop", "PRUNED", trial.state))
    reported = {(row.step, row.eval_accuracy) for row in trial.reports}
    reported |= set(_best_until(trial))  # by which the median rule decides
    for row in trial.rungs:
        if row.step < row.rung or (row.step, row.utility) not in reported:
            found.append((f"report that decided at rung {row.rung}", row.utility, None))
    return found


def _best_until(trial: _Records) -> Generator[tuple[int, float | None]]:
    """At each step that a trial reported, the best utility that it had reported by then.

    A step that was reported again by a later branch counts as it was the first time.
    """
    best, seen = -math.inf, 0
    for row in trial.reports:  # by step, and each step by branch
        if row.step > seen and row.eval_accuracy is not None:
            best = max(best, row.eval_accuracy)
        seen = row.step
        yield row.step, finite_or_none(best)


class _Epsilons:
    """Epsilon of so many iterations; trials of a sweep share many of them."""

    def __init__(self) -> None:
        self._known: dict[Any, float | None] = {}

    def __call__(
        self, reservation: Reservation, config: TrialConfig, iterations: int
    ) -> float | None:
        spent = reservation.mechanism
        if isinstance(spent, Mechanism):
            spent = spent.after(iterations)
        terms = (config.target_delta, config.accountant)
        key = (spent, reservation.request.prefix, *terms)
        if key not in self._known:
            after = dataclasses.replace(reservation, charged=iterations)
            self._known[key] = finite_or_none(
                selection_epsilon([spent], delta=config.target_delta)
                if isinstance(spent, Selection)
                else spent_epsilon(after, config)
            )
        return self._known[key]


def _same(expected: float | None, found: float | None) -> bool:
    if expected is None or found is None:
        return expected is found
    return math.isclose(expected, found, rel_tol=_EPSILON_TOLERANCE)


# -- checkpoints ---------------------------------------------------------------------------------


def _of_checkpoints(store: Store, trial: _Records) -> list[Difference]:
    """Which of a trial's checkpoints are not there in full."""
    found: list[Difference] = []
    for row in trial.checkpoints:
        if _is_elsewhere(row.location):
            continue
        try:
            step, problem = read_manifest(Path(row.location)).step, ""
        except CheckpointError as error:
            step, problem = row.step, str(error)
        if (problem or step != row.step) and _is_kept(store, row):
            what = f"checkpoint of step {row.step}"
            found.append(Difference(trial.trial_id, what, row.location, problem or step))
    return found


def _is_kept(store: Store, row: sa.Row[Any]) -> bool:
    """Whether a checkpoint is still one: a trial that runs forgets old ones."""
    query = sa.select(checkpoints.c.step).where(
        checkpoints.c.trial_id == row.trial_id,
        checkpoints.c.step == row.step,
        checkpoints.c.attempt == row.attempt,
    )
    with reading(store.ledger.engine) as connection:
        return connection.execute(query).first() is not None


def _is_elsewhere(location: str) -> bool:
    return "://" in location
