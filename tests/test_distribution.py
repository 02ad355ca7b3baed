"""The rooms have generic names: they must be ours alone, and imported from here."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import accounting
import cluster
import sweeps
import trainer

ROOT = Path(__file__).resolve().parent.parent
ROOMS = [accounting, cluster, sweeps, trainer]


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_a_room_is_ours_alone(room):
    assert Path(str(room.__file__)).parent == ROOT / room.__name__
    owners = importlib.metadata.packages_distributions().get(room.__name__, [])
    assert set(owners) <= {"dp-sweeps"}


@pytest.mark.parametrize(
    ("imported", "forbidden"),
    [
        ("accounting", ["jax", "ray", "mlflow", "dp_accounting"]),
        ("trainer.config", ["jax", "ray", "mlflow"]),
        ("sweeps", ["jax", "ray", "mlflow", "pandas", "pydantic", "sqlalchemy"]),
        # Looking at a plan or at results trains nothing, and draws nothing until it is asked to.
        ("sweeps.client", ["jax", "mlflow", "plotly", "matplotlib"]),
        ("trainer.data.datasets", ["jax", "tensorflow_datasets"]),
        # Reading a specification and deciding on it needs no machine that could train.
        ("sweeps.admission", ["jax", "ray", "mlflow"]),
    ],
)
def test_imports_stay_light(imported, forbidden):
    code = f"import sys, {imported}; print([n for n in {forbidden!r} if n in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


def test_the_lock_names_no_host():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert "://" not in line
        assert "index" not in line or line.startswith(" ") is False


def test_no_module_outgrows_one_idea():
    for room in ROOMS:
        for path in (ROOT / room.__name__).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 600, path
