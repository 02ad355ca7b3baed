"""Tells MLflow of sweeps, from the outbox.

A sweep is a run; each admitted trial is a child run of it, with its hyperparameters as
parameters and its reports as curves over the steps. `disclosure` lists what is told. A trial that
goes on after it had ended goes on in its run.

A message may be delivered twice, when a process died before it could mark it, and changes nothing
the second time: a run is looked up by its tags before one is created, a metric carries the time
of its message, by which MLflow knows it again, and a parameter keeps the value that it has.

MLflow's requests cost much more than what they carry, so what a run has to hear is put together,
over as many messages as wait.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from sweeps.database.outbox_rows import Message
from sweeps.database.store import Store
from sweeps.errors import RefusedError
from sweeps.guarantee import guarantee
from sweeps.home import EXPERIMENT_VARIABLE, Home
from sweeps.report.results import SweepResults, read_results
from sweeps.tracking import disclosure
from sweeps.tracking.mlflow_client import Mlflow
from sweeps.tracking.outbox import OutboxThread

_BATCH_MESSAGES = 5000
_MARK_EVERY_SECS = 1.0
_PARENT = "mlflow.parentRunId"


class MlflowWriter:
    """Delivers the outbox to MLflow, which is imported and reached when first needed.

    Args:
        store: The database.
        home: Says where MLflow is.
        experiment_name: MLflow experiment; without it ``MLFLOW_EXPERIMENT_NAME``, and without
            that the sweep's name.
    """

    def __init__(self, store: Store, home: Home, experiment_name: str | None = None) -> None:
        self._store = store
        self._home = home
        self._experiment_name = experiment_name or os.environ.get(EXPERIMENT_VARIABLE)
        self._mlflow: Mlflow | None = None

    def deliver(
        self,
        on_delivered: Callable[[int], None] | None = None,
        *,
        max_secs: float | None = None,
    ) -> int:
        """Delivers everything that is pending at the moment.

        Args:
            on_delivered: Called now and then with the number of messages taken since the last
                call.
            max_secs: What is not delivered by then stays pending, about; None takes all.

        Returns:
            How many messages MLflow took; 0 also while another process is delivering.

        Raises:
            TrackingError: If MLflow cannot be reached; what it did not take stays pending.
            RefusedError: If it refused some messages, which stay pending; it got the others.
        """
        taken, after = 0, 0
        end = math.inf if max_secs is None else time.monotonic() + max_secs
        refusals: list[RefusedError] = []
        outbox = self._store.outbox
        with outbox.delivery_lock() as held:
            sweeps: dict[str, _Sweep] = {}  # nobody else creates runs as long as this lasts
            while held and (messages := outbox.undelivered(_BATCH_MESSAGES, after=after)):
                after = messages[-1].message_id
                for count in self._deliver(messages, sweeps, refusals, end):
                    taken += count
                    if on_delivered is not None:
                        on_delivered(count)
                if time.monotonic() > end or len(messages) < _BATCH_MESSAGES:
                    break  # what has come meanwhile waits for the next time, with more
        if refusals:
            raise refusals[0]
        return taken

    def connect(self) -> Mlflow:
        """Imports MLflow and connects to it, unless that is done; else `deliver` does.

        Raises:
            TrackingError: If that fails.
        """
        self._mlflow = self._mlflow or Mlflow(self._home)
        return self._mlflow

    def count_undelivered(self) -> int:
        """How many messages MLflow has not yet got."""
        return self._store.outbox.count_undelivered()

    def _deliver(
        self,
        messages: Sequence[Message],
        sweeps: "dict[str, _Sweep]",
        refusals: list[RefusedError],
        end: float,
    ) -> Iterable[int]:
        """Delivers a batch, or until a time; yields how many were marked, each time."""
        mlflow = self.connect()
        for sweep_id in {message.sweep_id for message in messages}:
            if sweep_id not in sweeps:
                sweeps[sweep_id] = _Sweep(mlflow, self._store, sweep_id, self._experiment_name)
            sweeps[sweep_id].read({m.trial_id for m in messages if m.sweep_id == sweep_id})
        done: list[int] = []
        marked_at = time.monotonic()
        try:
            for group in _by_run(messages):
                try:
                    sweeps[group[0].sweep_id].deliver(group)
                except RefusedError as error:
                    refusals.append(error)
                else:
                    done += [message.message_id for message in group]
                if done and time.monotonic() - marked_at > _MARK_EVERY_SECS:
                    self._store.outbox.mark_delivered(done)
                    yield len(done)
                    done, marked_at = [], time.monotonic()
                if time.monotonic() > end:
                    break
        finally:
            if done:
                self._store.outbox.mark_delivered(done)
        yield len(done)


def delivering(writer: MlflowWriter) -> OutboxThread:
    """Delivers in the background while a ``with`` block runs, and what is left at its end."""
    return OutboxThread(writer)


def _by_run(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages of each run together, runs by their first message.

    A sweep's messages from its end on are apart: what its trials said before comes before.
    """
    groups: dict[tuple[str, str | None, bool], list[Message]] = {}
    ended: set[str] = set()
    for message in messages:
        if message.kind == "sweep_end":
            ended.add(message.sweep_id)
        late = message.trial_id is None and message.sweep_id in ended
        groups.setdefault((message.sweep_id, message.trial_id, late), []).append(message)
    return list(groups.values())


class _Sweep:
    """One sweep's runs, while one delivery lasts. A run's key is its trial, None: its own."""

    _row: sa.Row[Any]

    def __init__(
        self, mlflow: Mlflow, store: Store, sweep_id: str, experiment_name: str | None
    ) -> None:
        self._mlflow = mlflow
        self._store = store
        self._sweep_id = sweep_id
        self._experiment_name = experiment_name
        self._trials: dict[str, sa.Row[Any]] = {}
        self._run_ids: dict[str | None, str] = {}
        self._looked_up = False

    def read(self, keys: Iterable[str | None]) -> None:
        """Reads the rows that a batch speaks of, and no others: a sweep may have thousands."""
        self._row = self._store.sweep(self._sweep_id)
        self._trials = self._store.outbox.trials([key for key in keys if key is not None])
        for key, row in {None: self._row, **self._trials}.items():
            if row.mlflow_run_id:
                self._run_ids[key] = row.mlflow_run_id

    def deliver(self, messages: Sequence[Message]) -> None:
        """Delivers messages of one run, in order."""
        trial_id = messages[0].trial_id
        trial = None if trial_id is None else self._trials[trial_id]
        told = disclosure.update(messages, self._row, trial, self._results)
        run_id = self._run_id(trial_id)
        try:
            self._tell(run_id, told)
        except RefusedError:
            if not self._mlflow.is_deleted(run_id):
                raise  # else somebody deleted the run, and nobody waits for the rest of it

    def _tell(self, run_id: str, told: disclosure.Update) -> None:
        paths = [Path(path) for path in told.artifacts]
        if missing := [path.name for path in paths if not path.is_file()]:
            told.tags[disclosure.MISSING_ARTIFACTS] = ", ".join(missing)
        for path in paths:
            if path.is_file():
                self._mlflow.upload(run_id, path)
        self._log(run_id, told)
        if told.end_state is not None:
            status = disclosure.status(told.end_state)
            self._mlflow.end_run(run_id, status, told.end_millis)
        elif told.goes_on:
            self._mlflow.reopen_run(run_id)

    def _log(self, run_id: str, told: disclosure.Update) -> None:
        metrics, tags = told.metrics, told.tags
        try:
            self._mlflow.log(run_id, metrics=metrics, params=told.params, tags=tags)
        except RefusedError:
            # A parameter has one value for ever. It may have been told before, and then the
            # trial was given more iterations: the value stays, and a tag says the new one.
            if not told.params:
                raise
            known = self._mlflow.params(run_id)
            new = {name: value for name, value in told.params.items() if name not in known}
            if len(new) == len(told.params):
                raise
            self._mlflow.log(run_id, metrics=metrics, params=new, tags=tags)

    def _results(self) -> SweepResults:
        return read_results(self._store, self._sweep_id)

    def _run_id(self, trial_id: str | None) -> str:
        if trial_id not in self._run_ids and not self._looked_up:
            self._look_up()
        if trial_id not in self._run_ids:
            self._keep(trial_id, self._create(trial_id))
        return self._run_ids[trial_id]

    def _look_up(self) -> None:
        """Finds the runs whose ids an earlier process died too early to keep."""
        for run in self._mlflow.find_runs(
            [self._experiment_id], disclosure.SWEEP_ID, self._sweep_id
        ):
            trial_id = run.tags.get(disclosure.TRIAL_ID)
            if trial_id not in self._run_ids:
                self._keep(trial_id, run.run_id)
        self._looked_up = True

    def _create(self, trial_id: str | None) -> str:
        promise = guarantee(self._row.spec)
        if trial_id is None:
            tags = disclosure.sweep_tags(self._row, promise)
        else:
            tags = disclosure.trial_tags(self._row, self._trials[trial_id], promise)
            tags[_PARENT] = self._run_id(None)
        return self._mlflow.create_run(
            self._experiment_id,
            name=trial_id or self._sweep_id,
            start_millis=disclosure.to_millis(self._row.created_at),
            tags=tags,
        )

    def _keep(self, trial_id: str | None, run_id: str) -> None:
        self._store.outbox.set_mlflow_run_id(self._sweep_id, trial_id, run_id)
        self._run_ids[trial_id] = run_id

    @functools.cached_property
    def _experiment_id(self) -> str:
        if None in self._run_ids:
            return self._mlflow.experiment_of(self._run_ids[None])
        return self._mlflow.experiment_id(self._experiment_name or self._row.name)
