"""Homes with an MLflow store that is made once, and a real MLflow server."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sweeps.home import HOME_VARIABLE, Home
from tests.sweeps.tracking.tracked_sweep import Place, Server, opened


@pytest.fixture(scope="session")
def mlflow_client() -> Callable[[Home], Any]:
    """Gives MLflow's own client for a home, by which tests read."""
    from mlflow import MlflowClient

    return lambda home: MlflowClient(tracking_uri=home.mlflow_uri)


@pytest.fixture(scope="session")
def empty_mlflow(
    tmp_path_factory: pytest.TempPathFactory, mlflow_client: Callable[[Home], Any]
) -> Path:
    """An MLflow database without experiments: to copy it is quicker than to migrate one."""
    folder = tmp_path_factory.mktemp("mlflow")
    mlflow_client(Home.from_environment({HOME_VARIABLE: str(folder)})).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


@pytest.fixture
def place(tmp_path: Path, empty_mlflow: Path) -> Iterator[Place]:
    with opened(tmp_path / "home", empty_mlflow) as place:
        yield place


@pytest.fixture
def server(tmp_path: Path, empty_mlflow: Path) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copy(empty_mlflow, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()
