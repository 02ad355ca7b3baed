"""Each search as a real sweep on digits, with refused configurations among its proposals."""

import json

import pytest

from tests.sweeps.test_run import SPEC
from tests.sweeps.whole_sweep import DEADLINE_SECS, running, store_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Of what is drawn, some is too dear and some is not.
SPACE = {
    "optimizer": "sgd",
    "learning_rate": {"loguniform": [0.1, 10.0]},
    "expected_batch_size": 128,
    "iterations": 20,
    "noise_multiplier": {"uniform": [0.5, 4.0]},
    "l2_clip_norm": 1.0,
}
CHEAP = {"optimizer": "sgd", "learning_rate": 2.0, "noise_multiplier": 3.5}
DEAR = {"noise_multiplier": 0.5}


def swept(folder, **sections):
    """A whole sweep: its exit code, its document, its notes."""
    spec = {**SPEC, "scheduler": {"name": "fifo"}, "search_space": SPACE, **sections}
    with running(folder, spec) as process:
        out, err = process.communicate(timeout=DEADLINE_SECS)
    return process.returncode, json.loads(out), err


def states(document):
    trials = sorted(document["trials"], key=lambda trial: trial["trial_id"])
    return [trial["state"] for trial in trials]


def test_quasi_random_with_points_first(tmp_path):
    search = {"name": "quasi_random", "num_samples": 6, "points_to_evaluate": [DEAR, CHEAP]}
    code, document, err = swept(tmp_path, search=search, stop={"trials": 2})
    assert code == 0, err
    found = states(document)
    assert found[:2] == ["REJECTED", "COMPLETED"]
    assert found.count("COMPLETED") == 2
    assert found.count("CANCELLED") == len(found) - 2 - found.count("REJECTED")
    assert "stop.trials: 2 have run" in err
    store, _ = store_of(tmp_path)
    assert store.ledger.verify().ok


def test_a_search_that_learns_goes_on_past_what_is_refused(tmp_path):
    search = {
        "name": "optuna",
        "num_samples": 3,
        "repeats": 2,
        "n_startup_trials": 3,
        "points_to_evaluate": [DEAR, CHEAP],
        "objective": "frontier",
    }
    privacy = {"policy": "open", "target_epsilon": 8.0, "trial_epsilon": 3.0}
    # The learning rate depends on the optimizer.
    rate = {"by": "optimizer", "sgd": SPACE["learning_rate"], "else": 0.05}
    space = {**SPACE, "optimizer": {"choice": ["sgd", "adam"]}, "learning_rate": rate}
    code, document, err = swept(
        tmp_path,
        search=search,
        search_space=space,
        privacy={**SPEC["privacy"], **privacy},
        resources={"max_concurrent_trials": 2},
    )
    assert code == 0, err
    found = states(document)
    assert found[:4] == ["REJECTED"] * 2 + ["COMPLETED"] * 2
    assert found.count("COMPLETED") == 6
    measured = [each for each in document["configurations"] if each["num_measured"]]
    assert [len(each["trial_ids"]) for each in measured] == [2, 2, 2]
    means = [each["eval_accuracy_mean"] for each in measured]
    assert means == sorted(means, reverse=True)
    assert all(each["eval_accuracy_std"] > 0 for each in measured)
    store, _ = store_of(tmp_path)
    level = store.ledger.status(document["sweep_id"]).level
    assert level.spent <= level.limit
    assert store.ledger.verify().ok
    ledger = store.ledger
    ids = ledger.reservation_ids(document["sweep_id"])
    charged = {name: ledger.reservation(name).charged for name in ids}
    assert {name: count for name, count in charged.items() if count} == {
        trial["trial_id"]: 20 for trial in document["trials"] if trial["state"] == "COMPLETED"
    }


def test_a_search_of_which_all_is_refused_ends_and_says_why(tmp_path):
    search = {"name": "optuna", "num_samples": 4, "n_startup_trials": 2, "max_refused": 8}
    space = {**SPACE, "noise_multiplier": {"uniform": [0.3, 0.4]}}
    code, document, err = swept(tmp_path, search=search, search_space=space)
    assert code == 3, "nothing was admitted"
    assert states(document) == ["REJECTED"] * 8
    assert "the search has ended: its last 8 proposals (search.max_refused) were all" in err
    assert document["state"] == "COMPLETED"
