"""Drives a sweep from wherever its rows say that it is, to its end or to where it is told to wait.

A sweep that begins and a sweep whose driver died are the same to this module: it takes what may
run, in waves that Ray Tune can hold, and looks at the rows again after each. One driver has a
sweep at a time; the right ends with its process, so that whoever comes next need not ask.
"""

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from sweeps.choosing import trial_row
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import Store
from sweeps.errors import DatabaseError, DrivenError, StoreError, SweepError
from sweeps.home import Home
from sweeps.log_file import LogFile
from sweeps.proposals import Proposals
from sweeps.report.files import write_report
from sweeps.report.results import read_results
from sweeps.schedule import Schedule
from sweeps.selection_folder import SelectionFolder
from sweeps.service import worker_resources
from sweeps.spec.search_spec import OptunaSpec
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.trial_queue import TrialQueue, begins_by_itself

_LOG = logging.getLogger(__name__)
MAX_WAVE = 2000
"""Trials that Ray Tune gets at once: with more it is slow to start and large."""

_LOOK_AGAIN_SECS = 0.2


def drive(sweep_id: str, store: Store, home: Home) -> SweepState:
    """Runs a sweep's trials on the connected Ray until none is left that may run, and reports.

    Ray need not be connected where nothing may run.

    Args:
        sweep_id: A sweep that runs, as far as its rows say; see `Store.reopen`. The caller has
            the right to drive it; see `driving`.
        store: The driver's own.
        home: State, the same for the workers.

    Returns:
        Where the sweep is now: PAUSED if somebody asked for that; CANCELLED if somebody ended it;
        RUNNING if somebody asked for all to be left where it is; FAILED if every trial that was
        admitted failed; else COMPLETED.

    Raises:
        KeyboardInterrupt: If the person wants it to end now; all is left where it is.
        DatabaseError: If the database fails; all is left where it is.
        StoreError: If there is no such sweep, or it does not run.
        SweepError: If the workers get nowhere; all is left where it is, and the sweep's row says
            why.
    """
    driver = f"{socket.gethostname()}:{os.getpid()}"
    store.take_over(sweep_id, driver)
    with LogFile(home.driver_log(sweep_id)):
        _LOG.info("sweep %s: driven by %s", sweep_id, driver)
        try:
            return _drive(sweep_id, store, home)
        except Exception as error:
            _LOG.exception("sweep %s: left where it is", sweep_id)
            if not isinstance(error, DatabaseError):
                store.give_up(sweep_id, str(error))
            raise


@contextmanager
def driving(sweep_id: str, store: Store, *, patience_secs: float = 0.0) -> Generator[None]:
    """The right to drive a sweep, for one at a time; it ends with the block or the process.

    Args:
        sweep_id: The sweep.
        store: The driver's own.
        patience_secs: How long to wait for another, who may be about to end.

    Raises:
        DrivenError: If somebody drives it.
    """
    deadline = time.monotonic() + patience_secs
    while True:
        with store.driving_lock(sweep_id) as held:
            if held:
                yield
                return
        if time.monotonic() >= deadline:
            driver = store.sweep(sweep_id).driver or "another process"
            raise DrivenError(
                f"sweep {sweep_id}: is driven already, by {driver}; "
                f"`dp-sweeps watch {sweep_id}` shows it"
            )
        time.sleep(_LOOK_AGAIN_SECS)


def _drive(sweep_id: str, store: Store, home: Home) -> SweepState:
    spec = SweepSpec.model_validate(store.sweep(sweep_id).spec)
    while True:
        reason = _run_waves(spec, sweep_id, store, home)
        if store.wish(sweep_id) is Wish.INTERRUPT:
            return SweepState.RUNNING
        if (state := _end(sweep_id, store, home, reason)) is not None:
            return state


def ask(sweep_id: str, wish: Wish, store: Store, home: Home) -> bool:
    """Asks a sweep to pause or to stop; one that nobody drives does so at once.

    Returns:
        Whether somebody drives it, who will see to it.

    Raises:
        StoreError: If there is no such sweep, or it does not run.
    """
    store.set_wish(sweep_id, wish)
    with store.driving_lock(sweep_id) as held:
        if held:
            _end(sweep_id, store, home)
    return not held


def cancel(sweep_id: str, store: Store, home: Home) -> None:
    """Ends a sweep and everything of it now; whatever still works for it is fenced.

    Raises:
        StoreError: If there is no such sweep, or it has ended.
    """
    store.cancel_sweep(sweep_id)
    with store.driving_lock(sweep_id) as held:
        if held:
            _end(sweep_id, store, home)


def cancel_trial(trial_id: str, store: Store, home: Home) -> None:
    """Ends one trial now, whoever works on it.

    Raises:
        StoreError: If there is no such trial, or it has ended.
    """
    row = trial_row(store, trial_id)
    if not store.end_trial(trial_id, TrialState.CANCELLED, "somebody cancelled it"):
        raise StoreError(f"trial {trial_id}: is {trial_row(store, trial_id).state} already")
    _forget_secrets(row.sweep_id, store, home)


def _end(sweep_id: str, store: Store, home: Home, reason: str = "") -> SweepState | None:
    """Writes down what became of a sweep, for people and for MLflow.

    None if it goes on after all, for somebody let a trial go on.
    """
    state = _settle(sweep_id, store)
    _forget_secrets(sweep_id, store, home)
    results = dataclasses.replace(read_results(store, sweep_id), state=state)
    report: Mapping[str, str] = {}
    try:
        report = write_report(results, home)
    except OSError as error:  # a disk that is full, most likely: the rows are what counts
        reason = f"its report could not be written: {error}"
        _LOG.exception("sweep %s: %s", sweep_id, reason)
    ended = store.end_sweep(sweep_id, state, list(report.values()), reason=reason)
    return state if ended else None


def _forget_secrets(sweep_id: str, store: Store, home: Home) -> None:
    """Removes what a private selection had to remember, once it has ended, whoever ended it.

    Its worker does, too, unless it was killed.
    """
    if store.sweep(sweep_id).spec["privacy"]["policy"] != "private_selection":
        return
    for trial in store.trials(sweep_id):
        if TrialState(trial.state).is_finished:
            SelectionFolder(home.secrets_dir, trial.trial_id).remove()


def _run_waves(spec: SweepSpec, sweep_id: str, store: Store, home: Home) -> str:
    """Runs trials as long as any comes; gives what a person has to know of why none does."""
    folder = home.sweep_dir(sweep_id) / "tune"
    schedule = Schedule(spec, store, home)
    before: list[Any] | None = None
    while True:
        waiting = store.runnable(sweep_id)
        queue = _queue(spec, sweep_id, store, home, schedule, waiting)
        if queue.is_over():
            for row in waiting if queue.stopped else ():
                if begins_by_itself(row):
                    reason = f"the sweep ended before it began ({queue.stopped})"
                    store.end_trial(row.trial_id, TrialState.CANCELLED, reason)
            return queue.why_over()
        now = [_facts(row) for row in store.trials(sweep_id)]
        if waiting and before == now:
            raise SweepError(
                f"sweep {sweep_id}: its workers get nowhere; "
                f"`dp-sweeps logs {waiting[0].trial_id}` says more, and "
                f"`dp-sweeps resume {sweep_id}` goes on"
            )
        before = now
        from sweeps.tune import run_trials  # Ray Tune takes seconds to import

        run_trials(
            spec,
            queue=queue,
            schedule=schedule,
            folder=folder,
            resources=worker_resources(spec).as_ray(),
            is_over=lambda: _is_over(store, sweep_id),
        )


def is_anything_left(spec: SweepSpec, sweep_id: str, store: Store, home: Home) -> bool:
    """Whether a sweep has anything left to run; else it can be driven where there is no Ray."""
    waiting = store.runnable(sweep_id)
    queue = _queue(spec, sweep_id, store, home, Schedule(spec, store, home), waiting)
    return not queue.is_empty()


def _queue(
    spec: SweepSpec,
    sweep_id: str,
    store: Store,
    home: Home,
    schedule: Schedule,
    waiting: Sequence[sa.Row[Any]],
) -> TrialQueue:
    return TrialQueue(
        spec,
        sweep_id,
        store,
        waiting=waiting,
        schedule=schedule,
        proposals=proposals_of(spec, sweep_id, store, home),
        limit=MAX_WAVE,
    )


def proposals_of(spec: SweepSpec, sweep_id: str, store: Store, home: Home) -> Proposals | None:
    """What a sweep's search proposes while trials run, if it is one that does."""
    if isinstance(spec.search, OptunaSpec):
        return Proposals(spec, sweep_id, store, home)
    return None


def _facts(row: sa.Row[Any]) -> tuple[str, str, int]:
    return row.trial_id, row.state, row.charged_iterations


def _is_over(store: Store, sweep_id: str) -> bool:
    """Whether a sweep is to end at once, or was told to end and nothing of it runs any more."""
    row = store.sweep(sweep_id)
    if row.state == SweepState.CANCELLED or row.wish == Wish.INTERRUPT:
        return True
    if not row.wish:
        return False
    return not any(trial.state == TrialState.RUNNING for trial in store.trials(sweep_id))


def _settle(sweep_id: str, store: Store) -> SweepState:
    """Where a sweep is after its waves; what a stopped one has not begun is cancelled."""
    row = store.sweep(sweep_id)
    if row.state == SweepState.CANCELLED:
        return SweepState.CANCELLED
    if row.wish == Wish.PAUSE:
        return SweepState.PAUSED
    if row.wish == Wish.STOP:
        for trial in [*store.runnable(sweep_id), *store.rungs.waiting(sweep_id)]:
            begun = trial.state != TrialState.ADMITTED
            reason = f"the sweep was stopped before it {'ended' if begun else 'began'}"
            store.end_trial(trial.trial_id, TrialState.CANCELLED, reason)
    store.rungs.prune_waiting(sweep_id)
    results = read_results(store, sweep_id)
    ran = len(results.trials) - results.count(TrialState.REJECTED)
    if ran and results.count(TrialState.FAILED) == ran:
        return SweepState.FAILED
    return SweepState.COMPLETED
