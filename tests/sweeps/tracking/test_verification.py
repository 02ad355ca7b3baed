"""All that is recorded of a sweep agrees, and whatever is changed by hand is named."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import accounting
from accounting.mechanism import composed
from sweeps import verification
from sweeps.database.states import SweepState, TrialState
from sweeps.database.tables import writing
from sweeps.home import Home
from sweeps.tracking.comparison import Difference
from sweeps.verification import Verification
from tests.sweeps.tracking.tracked_sweep import (
    SWEEP,
    TRIAL_CONFIG,
    Place,
    Worker,
    a_trial,
    create,
    free_port,
    opened,
)
from trainer.training.plan import mechanism_of
from trainer.weights.checkpoints import save_checkpoint


def honest_report(worker: Worker, step: int, end: TrialState | None = None) -> None:
    """A report whose epsilon is that of all that was charged."""
    spent = mechanism_of(TRIAL_CONFIG).after(worker.charge(step))
    epsilon = accounting.epsilon_of_list(composed([spent]), delta=1e-5, accountant="pld")
    worker.report(step, end=end, epsilon=epsilon)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory, empty_mlflow: Path) -> Path:
    """The home of a sweep in which much has happened, all of it told to MLflow."""
    folder = tmp_path_factory.mktemp("lived") / "home"
    rejected = a_trial(4, TrialState.REJECTED, reason="too much", planned_epsilon=9.0)
    with opened(folder, empty_mlflow) as place:
        store = place.store
        create(store, *(a_trial(number) for number in range(4)), rejected)
        whole = Worker(store, 0)
        for step in (10, 20, 30):
            honest_report(whole, step)
        honest_report(whole, 40, TrialState.COMPLETED)
        checkpoint = folder / "checkpoints" / "step-40"
        save_checkpoint(
            checkpoint,
            params={"w": [0.0]},
            opt_state=(),
            step=40,
            architecture={"model": "mlp"},
            dataset_fingerprint="0" * 32,
            config_digest="0" * 64,
        )
        whole.checkpoint(40, str(checkpoint))
        honest_report(Worker(store, 1), 10)
        store.rungs.decide(f"{SWEEP}-1", [10], lambda utility, others: False)
        honest_report(Worker(store, 2), 20)
        honest_report(Worker(store, 2, start=10), 20)  # taken again with other noise, and paid
        store.end_sweep(SWEEP, SweepState.PAUSED)
        store.reopen(SWEEP)
        place.writer().deliver()
    return folder


@pytest.fixture
def life(lived: Path, tmp_path: Path) -> Any:
    """A copy of it, open."""
    shutil.copytree(lived, tmp_path / "home")
    with opened(tmp_path / "home") as place:
        yield place


def verify(place: Place, **options: Any) -> Verification:
    return verification.verify(place.store, place.home, SWEEP, **options)


def test_what_nobody_touched_agrees(life: Place) -> None:
    calls: list[None] = []
    found = verify(life, on_trial=lambda: calls.append(None))
    assert found == Verification(
        sweep_id=SWEEP,
        trials=5,
        reports=7,
        checkpoints=1,
        elsewhere=0,
        ledger_entries=found.ledger_entries,
        undelivered=0,
        mlflow_checked=True,
        mlflow_problem="",
        differences=(),
    )
    assert found.ok
    assert found.ledger_entries > 10
    assert len(calls) == 2 * 5


def test_a_sweep_is_verified_at_any_moment_of_its_life(tmp_path: Path, empty_mlflow: Path) -> None:
    with opened(tmp_path / "home", empty_mlflow) as place:
        store, writer = place.store, place.writer()

        def agrees() -> None:
            before = verify(place)
            assert before.differences == ()
            writer.deliver()
            after = verify(place)
            assert (after.differences, after.undelivered) == ((), 0)
            assert after.mlflow_checked

        create(store, a_trial(0), a_trial(1))
        agrees()
        worker = Worker(store, 0)
        agrees()
        honest_report(worker, 10)
        agrees()
        store.rungs.decide(f"{SWEEP}-0", [10], lambda utility, others: False)
        store.end_trial(f"{SWEEP}-1", TrialState.CANCELLED, "somebody cancelled it")
        store.end_sweep(SWEEP, SweepState.COMPLETED)
        agrees()
        assert all(one.admitted for one in store.readmit({f"{SWEEP}-0": 60, f"{SWEEP}-1": None}))
        agrees()
        store.reopen(SWEEP)
        honest_report(Worker(store, 0, start=10), 60, TrialState.COMPLETED)
        Worker(store, 1).charge(7)
        store.end_trial(f"{SWEEP}-1", TrialState.FAILED, "a bug")
        agrees()
        store.end_sweep(SWEEP, SweepState.COMPLETED)
        agrees()


ROWS = {
    "a branch's steps": (
        "UPDATE branches SET charged_step = 39 WHERE trial_id = 'digits-1-0'",
        ("iterations charged, by its branches", 39, 40),
    ),
    "a trial's charge": (
        "UPDATE trials SET charged_iterations = 39 WHERE trial_id = 'digits-1-0'",
        ("iterations charged, by the ledger", 40, 39),
    ),
    "a trial's plan": (
        "UPDATE trials SET planned_iterations = 41 WHERE trial_id = 'digits-1-0'",
        ("iterations reserved, by the ledger", 40, 41),
    ),
    "a trial's state": (
        "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 'digits-1-0'",
        ("reservation of a RUNNING trial", "open", "closed"),
    ),
    "a rejection": (
        "UPDATE trials SET state = 'REJECTED' WHERE trial_id = 'digits-1-0'",
        ("reservation of a rejected trial", "refused", "closed"),
    ),
    "an admission": (
        "UPDATE trials SET state = 'ADMITTED' WHERE trial_id = 'digits-1-4'",
        ("reservation in the ledger", "digits-1-4", None),
    ),
    "a reservation": (
        "UPDATE ledger_reservations SET charged = 38 WHERE request_id = 'digits-1-0'",
        ("iterations charged, by the ledger", 38, 40),
    ),
    "a report that is gone": (
        "DELETE FROM reports WHERE trial_id = 'digits-1-0' AND step = 40",
        ("last report of a COMPLETED trial", 40, 30),
    ),
    "a report of a later step": (
        "UPDATE reports SET step = 41 WHERE trial_id = 'digits-1-0' AND step = 40",
        ("reported step, charged on branch 1", "1 to 40", 41),
    ),
    "a report of no branch": (
        "UPDATE reports SET branch = 9 WHERE trial_id = 'digits-1-0' AND step = 40",
        ("branch of the report of step 40", 9, None),
    ),
    "a report's charge": (
        "UPDATE reports SET charged_iterations = 99 WHERE trial_id = 'digits-1-0' AND step = 40",
        ("iterations charged by the report of step 40", "1 to 40", 99),
    ),
    "a report's utility": (
        "UPDATE reports SET eval_accuracy = 0.9 WHERE trial_id = 'digits-1-0' AND step = 40",
        ("messages to MLflow of the report of step 40", 1, 0),
    ),
    "a message that is gone": (
        "DELETE FROM outbox WHERE trial_id = 'digits-1-1' AND kind = 'metrics'",
        ("messages to MLflow of the report of step 10", 1, 0),
    ),
    "a rung that is gone": (
        "DELETE FROM rungs",
        ("rung at which it was to stop", "one", None),
    ),
    "a rung's utility": (
        "UPDATE rungs SET utility = 0.5",
        ("report that decided at rung 10", 0.5, None),
    ),
    "a pruned trial's state": (
        "UPDATE trials SET state = 'CANCELLED' WHERE trial_id = 'digits-1-1'",
        ("state after a rung at which it was to stop", "PRUNED", "CANCELLED"),
    ),
}


@pytest.mark.parametrize("end", [TrialState.CANCELLED, TrialState.PRUNED])
def test_a_trial_that_waits_at_a_rung_may_be_where_it_is(tmp_path: Path, end: TrialState) -> None:
    with opened(tmp_path / "home") as place:
        create(place.store, a_trial(0), scheduler={"name": "hyperband"})
        worker = Worker(place.store, 0)
        honest_report(worker, 10)
        place.store.rungs.decide(f"{SWEEP}-0", [10], lambda _, __: False, may_wait=True)
        assert verify(place, with_mlflow=False).ok
        assert place.store.rungs.set_aside(f"{SWEEP}-0")
        assert verify(place, with_mlflow=False).ok
        place.store.end_trial(f"{SWEEP}-0", end, "the sweep was stopped")
        assert verify(place, with_mlflow=False).ok
        with writing(place.engine) as connection:
            connection.exec_driver_sql("UPDATE trials SET state = 'DIVERGED'")
        found = verify(place, with_mlflow=False).differences
        assert ("PRUNED", "DIVERGED") in [(one.expected, one.found) for one in found]


@pytest.mark.parametrize(("statement", "expected"), ROWS.values(), ids=list(ROWS))
def test_a_row_changed_by_hand_is_named(
    life: Place, statement: str, expected: tuple[Any, ...]
) -> None:
    with writing(life.engine) as connection:
        connection.exec_driver_sql(statement)
    found = verify(life, with_mlflow=False)
    assert expected in [(one.what, one.expected, one.found) for one in found.differences]
    assert not found.ok


def test_an_epsilon_changed_by_hand_is_named(life: Place) -> None:
    with writing(life.engine) as connection:
        connection.exec_driver_sql(
            "UPDATE reports SET epsilon = epsilon * 0.999 WHERE trial_id = 'digits-1-2'"
        )
    wrong = [one for one in verify(life, with_mlflow=False).differences if "epsilon" in one.what]
    assert [one.what for one in wrong] == ["epsilon reported at step 20"] * 2
    for one in wrong:
        assert isinstance(one.expected, float)
        assert one.found == pytest.approx(one.expected * 0.999)


def test_a_damaged_ledger_is_named(life: Place) -> None:
    with writing(life.engine) as connection:
        connection.exec_driver_sql("UPDATE ledger_reservations SET reserved = 1000")
    found = verify(life, with_mlflow=False)
    assert any(one.trial_id is None and one.what == "ledger" for one in found.differences)


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_checkpoint_that_is_not_whole_is_named(life: Place, damage: str) -> None:
    path = life.home.path / "checkpoints" / "step-40"
    with writing(life.engine) as connection:
        connection.exec_driver_sql("UPDATE checkpoints SET location = ?", (str(path),))
    assert verify(life, with_mlflow=False).ok
    if damage == "gone":
        shutil.rmtree(path)
    else:
        changed = next(file for file in sorted((path / "params").rglob("*")) if file.is_file())
        changed.write_bytes(changed.read_bytes() + b"x")
    (one,) = verify(life, with_mlflow=False).differences
    assert (one.trial_id, one.what, one.expected) == (
        f"{SWEEP}-0",
        "checkpoint of step 40",
        str(path),
    )


# -- MLflow ----------------------------------------------------------------------------------


def of_mlflow(place: Place) -> list[Difference]:
    found = verify(place)
    assert found.mlflow_checked
    return list(found.differences)


def test_a_value_too_many_and_one_too_few_are_named(
    life: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    client = mlflow_client(life.home)
    run_id = life.store.trials(SWEEP)[0].mlflow_run_id
    client.log_metric(run_id, "eval_accuracy", 0.75, timestamp=5, step=20)
    client.log_metric(run_id, "train_loss", 0.5, timestamp=6, step=20)
    assert of_mlflow(life) == [
        Difference(f"{SWEEP}-0", f"MLflow's {name} at step 20 ({millis} ms): {what}", None, value)
        for name, millis, value, what in (
            ("eval_accuracy", 5, 0.75, "not told, or told once more"),
            ("train_loss", 6, 0.5, "not told, or told once more"),
        )
    ]


def test_values_that_are_gone_are_named(life: Place) -> None:
    rows = life.store.trials(SWEEP)
    with writing(life.engine) as connection:
        connection.exec_driver_sql(
            "INSERT INTO outbox (sweep_id, trial_id, kind, payload, created_at, delivered_at) "
            "SELECT sweep_id, trial_id, 'metrics', "
            '\'{"step": 11, "metrics": {"eval_loss": 0.5}}\', 1.5, 2.5 FROM trials '
            "WHERE trial_id = ?",
            (rows[0].trial_id,),
        )
    said = Difference(f"{SWEEP}-0", "MLflow's eval_loss at step 11 (1500 ms): missing", 0.5, None)
    assert said in of_mlflow(life)


def test_a_second_run_and_a_deleted_run_are_named(
    life: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    client = mlflow_client(life.home)
    first, second, *_ = life.store.trials(SWEEP)
    run = client.get_run(first.mlflow_run_id)
    # In another experiment: it is found wherever it is.
    client.create_run(client.create_experiment("elsewhere"), tags=run.data.tags)
    client.delete_run(second.mlflow_run_id)
    stranger = {**run.data.tags, "dp_sweeps.trial_id": "nobody"}
    client.create_run(run.info.experiment_id, tags=stranger)
    assert of_mlflow(life) == [
        Difference(f"{SWEEP}-0", "MLflow runs", 1, 2),
        Difference(f"{SWEEP}-1", "MLflow runs", 1, 0),
        Difference("nobody", "MLflow runs of a trial not in the sweep", 0, 1),
    ]


def test_a_status_that_does_not_fit_is_named(
    life: Place, mlflow_client: Callable[[Home], Any]
) -> None:
    client = mlflow_client(life.home)
    client.set_terminated(life.store.trials(SWEEP)[1].mlflow_run_id, "FINISHED")
    client.set_terminated(life.store.sweep(SWEEP).mlflow_run_id, "FINISHED")
    assert of_mlflow(life) == [
        Difference(None, "MLflow run's status", "RUNNING", "FINISHED"),
        Difference(f"{SWEEP}-1", "MLflow run's status", "KILLED", "FINISHED"),
    ]


def test_what_was_not_delivered_is_counted_and_no_difference(life: Place) -> None:
    with writing(life.engine) as connection:
        # Half of it as after a kill between delivery and mark, and something really new.
        connection.exec_driver_sql("UPDATE outbox SET delivered_at = NULL WHERE message_id % 2")
        marked = connection.exec_driver_sql("SELECT count(*) FROM outbox WHERE message_id % 2")
        count = marked.scalar_one()
    honest_report(Worker(life.store, 3), 10)
    found = verify(life)
    assert found.ok
    assert found.undelivered == count + 1


def test_an_mlflow_that_is_away_is_not_a_clean_bill(life: Place) -> None:
    home = dataclasses.replace(life.home, mlflow_uri=f"http://127.0.0.1:{free_port()}")
    found = verification.verify(life.store, home, SWEEP)
    assert found.differences == ()
    assert not found.mlflow_checked
    assert "Connection refused" in found.mlflow_problem
    assert not found.ok


def test_nobody_delivers_while_it_compares(life: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_PATIENCE_SECS", 0.0)
    with life.store.outbox.delivery_lock() as held:
        assert held
        found = verify(life)
    assert found.mlflow_problem == "another process is delivering to it"
    assert not found.ok
