"""MLflow hears of sweeps here, from the outbox. The only module that imports it.

A sweep is a run; each admitted trial is a child run of it, with its hyperparameters as
parameters and its reports as curves over the steps. `disclosure` lists what is told.

A message may be delivered twice, when a process died before it could mark it, and changes nothing
the second time: a run is looked up by its tags before one is created, and a metric carries the
time of its message, by which MLflow knows it again.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from sweeps.database.store import Message, Store
from sweeps.errors import RefusedError, TrackingError
from sweeps.home import Home
from sweeps.report.results import SweepResults, read_results
from sweeps.tracking import disclosure
from sweeps.tracking.outbox import OutboxThread

EXPERIMENT_VARIABLE = "MLFLOW_EXPERIMENT_NAME"
ARTIFACT_PATH = "report"

_BATCH_MESSAGES = 500
_BATCH_METRICS = 900  # MLflow takes 1000 things at a time, parameters and tags among them
_PAGE_RUNS = 1000
_MAX_PARAM_CHARS = 6000
_MAX_TAG_CHARS = 8000
_MAX_ERROR_CHARS = 240
_PARENT = "mlflow.parentRunId"
_STATUS = {"COMPLETED": "FINISHED", "PRUNED": "KILLED", "CANCELLED": "KILLED"}  # else FAILED
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
_ENVIRONMENT = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow would repeat even a creation that timed out; `_Sweep` looks before it repeats one.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}

_P = ParamSpec("_P")
_T = TypeVar("_T")


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
        self._mlflow: _Mlflow | None = None

    def deliver(self) -> int:
        """Delivers everything pending.

        Returns:
            How many messages MLflow took; 0 also while another process is delivering.

        Raises:
            TrackingError: If MLflow cannot be reached; what it did not take stays pending.
            RefusedError: If it refused some messages, which stay pending; it got the others.
        """
        taken, after = 0, 0
        refusals: list[RefusedError] = []
        with self._store.delivery_lock() as held:
            while held and (messages := self._store.undelivered(_BATCH_MESSAGES, after=after)):
                after = messages[-1].message_id
                taken += self._deliver(messages, refusals)
        if refusals:
            raise refusals[0]
        return taken

    def count_undelivered(self) -> int:
        """How many messages MLflow has not yet got."""
        return self._store.count_undelivered()

    def _deliver(self, messages: Sequence[Message], refusals: list[RefusedError]) -> int:
        mlflow = self._mlflow = self._mlflow or _Mlflow(self._home)
        sweeps: dict[str, _Sweep] = {}
        done: list[int] = []
        try:
            for group in _by_run(messages):
                sweep_id = group[0].sweep_id
                if sweep_id not in sweeps:
                    sweeps[sweep_id] = _Sweep(mlflow, self._store, sweep_id, self._experiment_name)
                try:
                    sweeps[sweep_id].deliver(group)
                except RefusedError as error:
                    refusals.append(error)
                else:
                    done += [message.message_id for message in group]
        finally:
            if done:
                self._store.mark_delivered(done)
        return len(done)


def delivering(writer: MlflowWriter) -> OutboxThread:
    """Delivers in the background while a ``with`` block runs, and what is left at its end."""
    return OutboxThread(writer)


def _by_run(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages of each run together, runs by their first message, ends of sweeps apart."""
    groups: dict[tuple[str, str | None, bool], list[Message]] = {}
    for message in messages:
        key = (message.sweep_id, message.trial_id, message.kind == "sweep_end")
        groups.setdefault(key, []).append(message)
    return list(groups.values())


class _Sweep:
    """One sweep's runs, while one batch is delivered. A run's key is its trial, None: its own."""

    def __init__(
        self, mlflow: "_Mlflow", store: Store, sweep_id: str, experiment_name: str | None
    ) -> None:
        self._mlflow = mlflow
        self._store = store
        self._row = store.sweep(sweep_id)
        self._trials = {row.trial_id: row for row in store.trials(sweep_id)}
        self._experiment_name = experiment_name or self._row.name
        rows = {None: self._row, **self._trials}
        self._run_ids = {key: row.mlflow_run_id for key, row in rows.items() if row.mlflow_run_id}
        self._looked_up = False

    def deliver(self, messages: Sequence[Message]) -> None:
        """Delivers messages of one run, in order."""
        trial_id = messages[0].trial_id
        trial = None if trial_id is None else self._trials[trial_id]
        told = disclosure.update(messages, self._row, trial, lambda: self._results)
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
        self._mlflow.log(run_id, told)
        if told.end_state is not None:
            status = _STATUS.get(told.end_state, "FAILED")
            self._mlflow.end_run(run_id, status, told.end_millis)

    @functools.cached_property
    def _results(self) -> SweepResults:
        return read_results(self._store, self._row.sweep_id)

    def _run_id(self, trial_id: str | None) -> str:
        if trial_id not in self._run_ids and not self._looked_up:
            self._look_up()
        if trial_id not in self._run_ids:
            self._keep(trial_id, self._create(trial_id))
        return self._run_ids[trial_id]

    def _look_up(self) -> None:
        """Finds the runs whose ids an earlier process died too early to keep."""
        for tags, run_id in self._mlflow.find_runs(
            self._experiment_id, disclosure.SWEEP_ID, self._row.sweep_id
        ):
            trial_id = tags.get(disclosure.TRIAL_ID)
            if trial_id not in self._run_ids:
                self._keep(trial_id, run_id)
        self._looked_up = True

    def _create(self, trial_id: str | None) -> str:
        guarantee = self._results.guarantee
        if trial_id is None:
            tags = disclosure.sweep_tags(self._row, guarantee)
        else:
            tags = disclosure.trial_tags(self._row, self._trials[trial_id], guarantee)
            tags[_PARENT] = self._run_id(None)
        return self._mlflow.create_run(
            self._experiment_id,
            name=trial_id or self._row.sweep_id,
            start_millis=disclosure.to_millis(self._row.created_at),
            tags=tags,
        )

    def _keep(self, trial_id: str | None, run_id: str) -> None:
        self._store.set_mlflow_run_id(self._row.sweep_id, trial_id, run_id)
        self._run_ids[trial_id] = run_id

    @functools.cached_property
    def _experiment_id(self) -> str:
        if None in self._run_ids:
            return self._mlflow.experiment_of(self._run_ids[None])
        return self._mlflow.experiment_id(self._experiment_name)


class _Mlflow:
    """MLflow's client, its errors said shortly: unreachable, or refused."""

    def __init__(self, home: Home) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if "DO_NOT_TRACK" not in os.environ:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        import mlflow.entities

        self._entities = mlflow.entities
        self._uri = home.mlflow_uri
        self._artifact_location: str | None = None
        if home.uses_local_mlflow:
            home.create()
            self._artifact_location = home.artifacts_dir.as_uri()
        self._client = self._ask(mlflow.MlflowClient, tracking_uri=home.mlflow_uri)

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, which is created if there is none."""
        found = self._ask(self._client.get_experiment_by_name, name)
        if found is None:
            try:
                return self._ask(
                    self._client.create_experiment, name, artifact_location=self._artifact_location
                )
            except RefusedError:  # somebody else was quicker
                found = self._ask(self._client.get_experiment_by_name, name)
                if found is None:
                    raise
        return found.experiment_id

    def experiment_of(self, run_id: str) -> str:
        """The id of a run's experiment."""
        return self._ask(self._client.get_run, run_id).info.experiment_id

    def find_runs(
        self, experiment_id: str, tag: str, value: str
    ) -> Iterator[tuple[Mapping[str, str], str]]:
        """Tags and id of each run with a tag, oldest first."""
        token: str | None = None
        while True:
            page = self._ask(
                self._client.search_runs,
                [experiment_id],
                f"tags.`{tag}` = '{value}'",
                max_results=_PAGE_RUNS,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                yield run.data.tags, run.info.run_id
            token = cast(str | None, page.token)  # pyright: ignore[reportUnknownMemberType]
            if not token:
                return

    def create_run(
        self, experiment_id: str, *, name: str, start_millis: int, tags: Mapping[str, str]
    ) -> str:
        """Creates a run and gives its id."""
        run = self._ask(
            self._client.create_run,
            experiment_id,
            start_time=start_millis,
            tags={key: value[:_MAX_TAG_CHARS] for key, value in tags.items()},
            run_name=name,
        )
        return run.info.run_id

    def log(self, run_id: str, told: disclosure.Update) -> None:
        """Logs metrics, parameters and tags."""
        entities = self._entities
        metrics = [entities.Metric(*metric) for metric in told.metrics]
        for start in range(0, max(len(metrics), 1), _BATCH_METRICS):
            self._ask(
                self._client.log_batch,
                run_id,
                metrics=metrics[start : start + _BATCH_METRICS],
                params=[entities.Param(k, v[:_MAX_PARAM_CHARS]) for k, v in told.params.items()],
                tags=[entities.RunTag(k, v[:_MAX_TAG_CHARS]) for k, v in told.tags.items()],
                synchronous=True,
            )

    def end_run(self, run_id: str, status: str, end_millis: int) -> None:
        """Ends a run."""
        self._ask(self._client.set_terminated, run_id, status, end_millis)

    def upload(self, run_id: str, path: Path) -> None:
        """Adds a file to a run's artifacts."""
        upload = cast(
            Callable[..., None],
            self._client.log_artifact,  # pyright: ignore[reportUnknownMemberType]
        )
        self._ask(upload, run_id, str(path), ARTIFACT_PATH)

    def is_deleted(self, run_id: str) -> bool:
        """Whether somebody deleted a run."""
        return self._ask(self._client.get_run, run_id).info.lifecycle_stage == "deleted"

    def _ask(self, request: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return request(*args, **kwargs)
        except Exception as error:
            refused = getattr(error, "error_code", None) in _REFUSALS
            said = f"MLflow at {self._uri}: {error if refused else _root(error)}"
            said = re.sub(r"(?<=://)([^:/@\s]*):[^@/\s]*@", r"\1:***@", " ".join(said.split()))
            kind = RefusedError if refused else TrackingError
            raise kind(said[:_MAX_ERROR_CHARS]) from error


def _root(error: BaseException) -> BaseException:
    """The first cause that says anything: a refused connection below four wrappers, say."""
    while True:
        cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if cause is None or not str(cause):
            return error
        error = cause
