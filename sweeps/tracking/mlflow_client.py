"""MLflow's client, and nothing that knows a sweep. The only module that imports MLflow.

Its errors are said shortly, and are of two kinds: MLflow is away, or it refused.
"""

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

import sqlalchemy as sa

from sweeps.errors import RefusedError, TrackingError
from sweeps.home import Home

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.store.entities import PagedList

ARTIFACT_PATH = "report"

_BATCH_METRICS = 900  # MLflow takes 1000 things at a time, parameters and tags among them
_PAGE_RUNS = 1000
_MAX_PARAM_CHARS = 6000
_MAX_TAG_CHARS = 8000
_MAX_ERROR_CHARS = 240
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
_ENVIRONMENT = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # MLflow would repeat even a creation that timed out; who writes looks before repeating one.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}

_P = ParamSpec("_P")
_T = TypeVar("_T")

Metric = tuple[str, float, int, int]
"""Name, value, time in milliseconds, step."""
Point = tuple[int, float, int]
"""Of one metric: step, value, time in milliseconds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run as MLflow has it.

    Attributes:
        run_id: MLflow's name for it.
        status: ``RUNNING``, ``SCHEDULED``, ``FINISHED``, ``FAILED`` or ``KILLED``.
        tags: Its tags.
        metric_names: The metrics that have at least one value.
    """

    run_id: str
    status: str
    tags: Mapping[str, str]
    metric_names: frozenset[str]


def _make_whole(uri: str, client: Callable[..., object]) -> None:
    """Makes a local store's file where there is none, with every table or not at all.

    MLflow makes its tables in many steps. If its process dies in between, no MLflow can open what
    it leaves.
    """
    path = Path(sa.make_url(uri).database or "")
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="mlflow-new-") as folder:
        new = Path(folder, path.name)
        client(tracking_uri=f"sqlite:///{new}")
        try:
            os.link(new, path)
        except FileExistsError:  # somebody else was quicker
            return
        except OSError:  # a file system without links
            new.rename(path)


class Mlflow:
    """A connection to MLflow. To make one imports MLflow, and for a local store its tables.

    Args:
        home: Says where MLflow is.

    Raises:
        TrackingError: By every method, if MLflow cannot be reached.
        RefusedError: By every method, if it refused.
    """

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
            self._ask(_make_whole, home.mlflow_uri, mlflow.MlflowClient)
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

    def experiment_ids(self) -> list[str]:
        """The ids of all experiments that nobody deleted."""
        search = cast(
            "Callable[..., PagedList[Experiment]]",
            self._client.search_experiments,  # pyright: ignore[reportUnknownMemberType]
        )
        found: list[str] = []
        token: str | None = None
        while True:
            page = self._ask(search, max_results=_PAGE_RUNS, page_token=token)
            found += [experiment.experiment_id for experiment in page]
            token = cast(str | None, page.token)  # pyright: ignore[reportUnknownMemberType]
            if not token:
                return found

    def find_runs(self, experiment_ids: Sequence[str], tag: str, value: str) -> Iterator[Run]:
        """Each run with a tag that nobody deleted, oldest first."""
        token: str | None = None
        while True:
            page = self._ask(
                self._client.search_runs,
                list(experiment_ids),
                f"tags.`{tag}` = '{value}'",
                max_results=_PAGE_RUNS,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                yield Run(
                    run_id=run.info.run_id,
                    status=run.info.status,
                    tags=run.data.tags,
                    metric_names=frozenset(run.data.metrics),
                )
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

    def log(
        self,
        run_id: str,
        *,
        metrics: Sequence[Metric],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """Logs metrics, parameters and tags, in as few requests as MLflow takes."""
        entities = self._entities
        for start in range(0, max(len(metrics), 1), _BATCH_METRICS):
            some = metrics[start : start + _BATCH_METRICS]
            first = start == 0  # it carries the rest, too
            self._ask(
                self._client.log_batch,
                run_id,
                metrics=[entities.Metric(*metric) for metric in some],
                params=[
                    entities.Param(k, v[:_MAX_PARAM_CHARS]) for k, v in params.items() if first
                ],
                tags=[entities.RunTag(k, v[:_MAX_TAG_CHARS]) for k, v in tags.items() if first],
                synchronous=True,
            )

    def params(self, run_id: str) -> Mapping[str, str]:
        """The parameters that a run has."""
        return self._ask(self._client.get_run, run_id).data.params

    def history(self, run_id: str, name: str) -> list[Point]:
        """All values of a metric of a run, in no certain order."""
        found = self._ask(self._client.get_metric_history, run_id, name)
        return [(metric.step, metric.value, metric.timestamp) for metric in found]

    def end_run(self, run_id: str, status: str, end_millis: int) -> None:
        """Ends a run."""
        self._ask(self._client.set_terminated, run_id, status, end_millis)

    def reopen_run(self, run_id: str) -> None:
        """Lets a run that had ended go on."""
        self._ask(self._client.update_run, run_id, status="RUNNING")

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
