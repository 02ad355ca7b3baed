"""What every test gets: no test sees the person's own state, and chance repeats."""

import os

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
