"""``dp-sweeps fork``: what it says, how it ends, and one that is trained on a real Ray."""

import json
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

import accounting
from accounting.mechanism import composed
from sweeps import driver
from sweeps.database.states import SweepState, TrialState
from sweeps.home import Home
from sweeps.worker import TrialRun
from tests.sweeps.cli.test_documents import documented, keys_of
from tests.sweeps.fork_parents import OPEN, SPEC, paid_for, pretend, row_of, submitted
from tests.sweeps.whole_sweep import environment_of_users

ROOT = Path(__file__).parents[3]
DEADLINE_SECS = 240


@pytest.fixture
def parent(home):
    """A store, and a trial that was pruned at step 10."""
    store, (trial, _) = submitted(Home.from_environment(), privacy=OPEN)
    pretend(store, trial, 5, 10)
    return store, trial


def test_a_dry_run_says_what_a_fork_would_cost(command, parent):
    store, trial = parent
    before = store.trials(store.sweeps()[0].sweep_id), store.ledger.head()
    code, out, _ = command("fork", trial, "--set", "learning_rate=0.5", "--dry-run", "--json")
    assert code == 0
    said = json.loads(out)
    assert keys_of(said) <= documented()
    assert said["admitted"] is True
    assert (said["parent_trial_id"], said["parent_step"]) == (trial, 10)
    assert (said["iterations"], said["new_iterations"], said["number"]) == (20, 10, 2)
    assert said["epsilon"] < said["epsilon_after"]
    code, out, _ = command("fork", trial, "--set", "learning_rate=0.5", "--dry-run")
    assert code == 0
    assert out.splitlines()[0] == f"from      trial {trial}, its checkpoint at step 10"
    assert out.splitlines()[-1] == "decision  would be admitted"
    assert (store.trials(said["sweep_id"]), store.ledger.head()) == before


def test_a_fork_that_does_not_fit_ends_with_three(command, parent):
    store, trial = parent
    for options in ([], ["--json"], ["--dry-run"]):
        code, out, _ = command("fork", trial, "--set", "noise_multiplier=0.3", *options)
        assert code == 3
        assert "exceeds the budget" in " ".join(out.split())
    assert len(store.trials(store.sweeps()[0].sweep_id)) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--set: allowed is at least one KEY=VALUE"),
        (["--set", "learning_rate"], 2, "allowed is KEY=VALUE"),
        (["--set", "learning_rate=x"], 2, "search_space.learning_rate: 'x' is not allowed"),
        (["--iterations", "10"], 1, "allowed is more than the 10 steps"),
        (["--set", "learning_rate=1", "--from-step", "7"], 1, "checkpoint: 5, 10"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(command, parent, arguments, code, words):
    store, trial = parent
    head = store.ledger.head()
    ended, out, err = command("fork", trial, *arguments)
    assert (ended, out) == (code, "")
    assert words in err
    assert "Traceback" not in err
    assert store.ledger.head() == head


def test_without_a_ledger_nothing_is_made(command, home):
    code, _, err = command("fork", "nobody", "--iterations", "5")
    assert code == 1
    assert "no ledger" in err
    assert not home.exists()


def test_a_driver_that_is_there_takes_the_fork_up(command, parent):
    store, trial = parent
    sweep_id = store.sweeps()[0].sweep_id
    with store.driving_lock(sweep_id) as held:
        assert held
        code, out, err = command("fork", trial, "--set", "learning_rate=0.5", "--json")
    assert code == 0
    fork = json.loads(out)
    assert fork["trial_id"] in [row.trial_id for row in store.runnable(sweep_id)]
    assert "its driver takes it from here" in err


@pytest.mark.ray
@pytest.mark.slow
def test_a_pruned_trial_is_forked_with_another_learning_rate(home):
    place = Home.from_environment()
    space = {**SPEC["search_space"], "learning_rate": 1.0}
    store, (parent,) = submitted(place, search_space=space)
    with TrialRun(store, place, parent) as run:
        for _ in range(2):
            assert run.next_report() is not None
    store.end_trial(parent, TrialState.PRUNED)
    sweep_id = store.sweeps()[0].sweep_id
    assert driver.drive(sweep_id, store, place) == SweepState.COMPLETED  # with nothing to run
    before = dict(row_of(store, parent)._mapping), paid_for(store, parent)
    command = "from sweeps.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", command, "fork", parent, "--set", "learning_rate=0.25", "--json"],
        env={**environment_of_users(), "DP_SWEEPS_HOME": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    (fork,) = [trial for trial in document["trials"] if trial["parent_trial_id"] == parent]
    assert document["state"] == fork["state"] == "COMPLETED"
    assert (fork["parent_step"], fork["step"], fork["iterations"]) == (10, 20, 10)
    assert fork["config"]["learning_rate"] == 0.25
    paid = paid_for(store, fork["trial_id"])
    assert (paid.charged, paid.state) == (10, "closed")
    assert paid.request.prefix == (before[1].mechanism.after(10),)
    assert fork["epsilon"] == accounting.epsilon_of_list(
        composed([*paid.request.prefix, paid.mechanism]), delta=1e-5, accountant="rdp"
    )
    assert [point["step"] for point in fork["curve"]] == [15, 20]
    # MLflow has heard of it meanwhile, and there was nothing else to hear.
    assert {**row_of(store, parent)._mapping, "mlflow_run_id": None} == before[0]
    assert paid_for(store, parent) == before[1]
    assert store.ledger.verify().ok
    mlflow.set_tracking_uri(place.mlflow_uri)
    tags = mlflow.get_run(fork["mlflow_run_id"]).data.tags
    assert tags["dp_sweeps.parent_trial_id"] == parent
    assert tags["dp_sweeps.parent_step"] == "10"
    assert tags["mlflow.parentRunId"] == document["mlflow_run_id"]
