"""A driver where nothing is left to run: who may be one, and what it leaves behind."""

import threading
import time

import pytest

from sweeps import standing_driver
from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import Store, open_store
from sweeps.driver import ask, drive, driving
from sweeps.errors import DrivenError, StoreError, SweepError
from sweeps.home import Home
from sweeps.schedule import Schedule
from sweeps.service import mlflow_environment
from sweeps.spec.sweep_spec import SweepSpec
from tests.sweeps.database.small_sweep import go_to
from tests.sweeps.fork_parents import SPEC
from tests.sweeps.small_run import EVERY, STEPS, SWEEP, TRIAL, submit
from tests.sweeps.spec.spec_text import GOOD_DATA


@pytest.fixture
def home() -> Home:
    home = Home.from_environment()
    home.create()
    return home


@pytest.fixture
def store(home: Home) -> Store:
    """With a sweep whose only trial was cancelled."""
    store = open_store(home)
    submit(store)
    store.end_trial(TRIAL, TrialState.CANCELLED)
    return store


def test_a_report_that_cannot_be_written_is_told_and_ends_no_sweep(
    home: Home, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    spec = SweepSpec.model_validate(SPEC)  # its row has the privacy section alone
    monkeypatch.setattr("sweeps.driver.SweepSpec.model_validate", lambda _spec: spec)
    monkeypatch.setattr("sweeps.driver.write_report", full)
    assert drive(SWEEP, store, home) is SweepState.COMPLETED
    sweep = store.sweep(SWEEP)
    assert sweep.state == "COMPLETED"
    assert "report could not be written" in sweep.reason
    assert "No space left on device" in sweep.reason
    assert "No space left on device" in home.driver_log(SWEEP).read_text()


def test_why_a_driver_went_no_further_is_in_the_rows(home: Home, store: Store) -> None:
    # What is recorded is no specification.
    with pytest.raises(ValueError, match="privacy"):
        drive(SWEEP, store, home)
    assert store.sweep(SWEEP).state == "RUNNING"
    assert "privacy" in store.sweep(SWEEP).reason
    assert not store.is_to_be_driven(SWEEP), "another would come no further"
    store.reopen(SWEEP)
    assert store.is_to_be_driven(SWEEP)
    store.set_wish(SWEEP, Wish.INTERRUPT)
    assert not store.is_to_be_driven(SWEEP)


def test_nothing_is_driven_that_does_not_run(home: Home, store: Store) -> None:
    store.end_sweep(SWEEP, SweepState.PAUSED)
    with pytest.raises(StoreError, match="is PAUSED; allowed is a running one"):
        drive(SWEEP, store, home)


def test_one_drives_at_a_time(store: Store, home: Home) -> None:
    other = open_store(home)
    store.take_over(SWEEP, "elsewhere:7")
    with (
        driving(SWEEP, store),
        pytest.raises(DrivenError, match="already, by elsewhere:7"),
        driving(SWEEP, other),
    ):
        raise AssertionError
    with driving(SWEEP, other):
        pass


def test_who_is_patient_drives_next(store: Store, home: Home) -> None:
    other, began = open_store(home), threading.Event()

    def hold() -> None:
        with driving(SWEEP, other):
            began.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    assert began.wait(60)
    with driving(SWEEP, store, patience_secs=60):
        pass
    thread.join()


def test_one_that_stands_by_says_why_it_would_not_find_its_sweep(store: Store) -> None:
    problem = standing_driver._problem  # pyright: ignore[reportPrivateUsage]
    assert not problem(SWEEP)
    assert "'elsewhere'" in problem("elsewhere")


def test_a_password_of_mlflow_does_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ward 7")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org/x")
    assert mlflow_environment(Home.from_environment()) == {
        "MLFLOW_TRACKING_URI": "https://mlflow.example.org/x",
        "MLFLOW_EXPERIMENT_NAME": "ward 7",
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example.org")
    with pytest.raises(SweepError, match="MLFLOW_TRACKING_USERNAME") as refused:
        mlflow_environment(Home.from_environment())
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("wish", "state", "reason"),
    [
        (Wish.NONE, "PRUNED", "eval_accuracy 0.2500 at step 4 was never among the best of those"),
        (Wish.STOP, "CANCELLED", "the sweep was stopped before it ended"),
        (Wish.PAUSE, "PAUSED", "waits at step 4 until others have come there and it"),
    ],
)
def test_what_becomes_of_a_trial_that_waits_at_a_rung(
    home: Home, monkeypatch: pytest.MonkeyPatch, wish: Wish, state: str, reason: str
) -> None:
    text = {**GOOD_DATA, "search_space": {**GOOD_DATA["search_space"], "iterations": STEPS}}
    rule = {"name": "async_hyperband", "grace_period": EVERY, "promotion": True}
    spec = SweepSpec.model_validate({**text, "scheduler": rule, "report_every_steps": EVERY})
    monkeypatch.setattr("sweeps.driver.SweepSpec.model_validate", lambda _spec: spec)
    monkeypatch.setattr("sweeps.driver.write_report", lambda *_: {})
    store = open_store(home)
    submit(store)
    go_to(store, store.attempts.begin(TRIAL), EVERY, accuracy=0.25)
    assert Schedule(spec, store, home).decide(TRIAL)
    assert store.rungs.set_aside(TRIAL)
    if wish:
        ask(SWEEP, wish, store, home)
    else:
        drive(SWEEP, store, home)
    row = store.trial(TRIAL)
    assert row is not None
    assert row.state == state
    assert row.reason.startswith(reason)
    assert row.charged_iterations == EVERY
    settled = store.ledger.reservation(TRIAL).state
    assert settled == ("open" if wish is Wish.PAUSE else "closed")
    assert store.sweep(SWEEP).state == ("PAUSED" if wish is Wish.PAUSE else "COMPLETED")
