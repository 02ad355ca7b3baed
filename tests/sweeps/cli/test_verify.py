"""`dp-sweeps verify` and `dp-sweeps sync`: what they say, and how they end."""

import json
from pathlib import Path
from typing import Any

import pytest

from sweeps.database.states import TrialState
from sweeps.database.store import Store, open_store
from sweeps.database.tables import writing
from sweeps.home import Home
from tests.sweeps.cli.test_documents import documented, keys_of
from tests.sweeps.tracking.tracked_sweep import SWEEP, Worker, a_trial, create, free_port


@pytest.fixture
def store(home: Path) -> Any:
    store = open_store(Home.from_environment())
    create(store, a_trial(0), a_trial(1))
    yield store
    store.ledger.close()


def test_a_sweep_that_agrees(command: Any, store: Store) -> None:
    code, printed, noted = command("verify", "--no-mlflow")
    assert code == 0
    assert "2 trials, 0 reports, 0 checkpoints" in printed
    assert printed.endswith("MLflow: left out\nall of it agrees\n")
    assert noted == "MLflow has yet to get 3 messages; `dp-sweeps sync` delivers them\n"


def test_every_difference_is_a_row(command: Any, store: Store) -> None:
    with writing(store.ledger.engine) as connection:
        connection.exec_driver_sql("UPDATE trials SET charged_iterations = 7 WHERE number = 1")
    code, printed, _ = command("verify", SWEEP, "--no-mlflow")
    assert code == 1
    assert "iterations charged, by its branches" in printed
    assert printed.endswith("2 differences\n")
    code, printed, _ = command("verify", "--no-mlflow", "--json")
    assert code == 1
    found = json.loads(printed)
    assert keys_of(found) <= documented()
    assert found == {
        "ok": False,
        "sweep_id": SWEEP,
        "trials": 2,
        "reports": 0,
        "checkpoints": 0,
        "elsewhere": 0,
        "ledger_entries": found["ledger_entries"],
        "undelivered": 3,
        "mlflow_checked": False,
        "mlflow_problem": "",
        "differences": [
            {
                "trial_id": f"{SWEEP}-1",
                "what": f"iterations charged, by {who}",
                "expected": 0,
                "found": 7,
            }
            for who in ("its branches", "the ledger")
        ],
    }


def test_an_mlflow_that_is_away_is_said_and_fails(
    command: Any, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    code, printed, _ = command("verify")
    assert code == 1
    assert "MLflow: not checked: MLflow at http://127.0.0.1" in printed
    assert "all of it agrees" not in printed


def test_a_damaged_ledger_is_verified_too(command: Any, store: Store) -> None:
    with writing(store.ledger.engine) as connection:
        connection.exec_driver_sql("DELETE FROM ledger_journal WHERE seq = 2")
    code, printed, _ = command("verify", "--no-mlflow")
    assert code == 1
    assert "ledger" in printed


def test_no_sweep_is_not_a_clean_one(command: Any, home: Path) -> None:
    code, _, noted = command("verify")
    assert code == 1
    assert "no ledger" in noted


@pytest.mark.slow
def test_sync_and_then_all_of_it_agrees(command: Any, store: Store) -> None:
    Worker(store, 0)
    store.end_trial(f"{SWEEP}-0", TrialState.FAILED, "a bug")
    assert command("sync")[:2] == (0, "delivered 4 messages\n")
    code, printed, noted = command("verify")
    assert (code, noted) == (0, "")
    assert printed.endswith("all of it agrees\n")
