"""Whole sweeps whose trials are compared with each other: the installed command on a real Ray."""

import json

import pytest

from sweeps.verification import verify
from tests.sweeps.test_run import SPEC, by_state
from tests.sweeps.whole_sweep import (
    DEADLINE_SECS,
    attempts_at,
    branch_rows,
    running,
    store_of,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


# What comes last is refused, for its batch is too dear.
TOO_DEAR = 0.5


def finished(folder, scheduler, learning_rates, **sections):
    """A sweep whose trials learn much, or nothing, one after the other: its document and store.

    Another configuration is refused by the budget, which is left out of the document.
    """
    space = {**SPEC["search_space"], "optimizer": "sgd"}
    space["learning_rate"] = {"grid_search": [*learning_rates, TOO_DEAR]}
    # Of a linear model a small rate alone is no worse than a large one. With this decay each step
    # undoes the one before, and only their noise adds up.
    undone = {str(rate): 2 / rate for rate in learning_rates if rate < 1e-3}
    space["weight_decay"] = {"by": "learning_rate", **undone, "else": 0.0}
    space["expected_batch_size"] = {"by": "learning_rate", str(TOO_DEAR): 512, "else": 128}
    spec = {**SPEC, "search_space": space, "scheduler": scheduler, **sections}
    with running(folder, spec) as process:
        out, err = process.communicate(timeout=DEADLINE_SECS)
    assert process.returncode == 0, err
    document = json.loads(out)
    store, home = store_of(folder)
    assert verify(store, home, document["sweep_id"], with_mlflow=False).ok
    (refused,) = (
        trial for trial in document["trials"] if trial["config"]["learning_rate"] == TOO_DEAR
    )
    assert (refused["state"], refused["step"]) == ("REJECTED", 0)
    assert not attempts_at(store, refused["trial_id"])
    document["trials"].remove(refused)
    return document, store


def rates(trials):
    return {trial["config"]["learning_rate"] for trial in trials}


def test_trials_below_the_median_are_pruned(tmp_path):
    rule = {"name": "median_stopping_rule", "grace_period": 10, "min_samples_required": 2}
    document, store = finished(tmp_path, rule, [8.0, 4.0, 1e-6, 2.0, 1e-7])
    assert document["state"] == "COMPLETED"
    pruned = by_state(document, "PRUNED")
    assert rates(pruned) >= {1e-6, 1e-7}
    assert rates(by_state(document, "COMPLETED")) >= {8.0, 4.0}, "they came first"
    for trial in pruned:
        assert 10 <= trial["step"] < 30
        assert trial["epsilon"] < trial["planned_epsilon"]
        assert "was below the median of the" in trial["reason"]
        assert store.ledger.reservation(trial["trial_id"]).charged == trial["step"]
    assert store.ledger.verify().ok
    store.ledger.close()


def test_trials_that_wait_at_a_rung_go_on_once_they_are_among_the_best(tmp_path):
    rule = {"name": "async_hyperband", "grace_period": 10, "promotion": True}
    rule["reduction_factor"] = 2
    document, store = finished(tmp_path, rule, [8.0, 1e-6, 4.0, 1e-7, 2.0])
    assert document["state"] == "COMPLETED"
    pruned, completed = by_state(document, "PRUNED"), by_state(document, "COMPLETED")
    assert len(pruned) + len(completed) == 5
    assert rates(pruned) >= {1e-6, 1e-7}
    for trial in pruned:
        assert trial["step"] in (10, 20)
        assert "was never among the best of those that reached step" in trial["reason"]
    ends = {}
    for trial in document["trials"]:
        ends[trial["trial_id"]] = [each.end for each in attempts_at(store, trial["trial_id"])]
        reservation = store.ledger.reservation(trial["trial_id"])
        assert (reservation.state, reservation.charged) == ("closed", trial["step"])
    # The first of all had nobody to be better than, and waited until the second was there.
    first = ends[min(ends)]
    assert first[0] == "paused"
    assert len(first) > 1
    assert len(branch_rows(store)) == 5, "whoever went on did so on its branch, and paid once"
    assert store.ledger.verify().ok
    store.ledger.close()


def test_a_bracket_is_halved_once_all_of_it_have_come_to_a_rung(tmp_path):
    rule = {"name": "hyperband", "grace_period": 10, "reduction_factor": 2}
    document, store = finished(tmp_path, rule, [1e-6, 8.0, 1e-7])
    assert document["state"] == "COMPLETED"
    (pruned,) = by_state(document, "PRUNED")
    assert pruned["config"]["learning_rate"] == 1e-6
    assert pruned["step"] == 15
    assert pruned["reason"].endswith(
        "was not among the best 1 of the 2 of its bracket that came to step 15"
    )
    # The second bracket, with one of its two, compares nobody.
    assert rates(by_state(document, "COMPLETED")) == {8.0, 1e-7}
    assert len(branch_rows(store)) == 3, "who waited went on on its branch, and paid once"
    for trial in document["trials"]:
        reservation = store.ledger.reservation(trial["trial_id"])
        assert (reservation.state, reservation.charged) == ("closed", trial["step"])
    assert store.ledger.verify().ok
    store.ledger.close()


def test_steps_that_a_pruned_trial_gives_back_admit_one_that_was_refused(tmp_path):
    rule = {"name": "async_hyperband", "grace_period": 10, "reduction_factor": 2}
    # Room for two and a half trials.
    privacy = {"policy": "open", "target_epsilon": 2.0, "target_delta": 1e-5}
    learning_rates = [8.0, 1e-6, 4.0, 1e-7]
    document, store = finished(tmp_path, rule, learning_rates, privacy=privacy)
    assert document["state"] == "COMPLETED"
    by_rate = {trial["config"]["learning_rate"]: trial for trial in document["trials"]}
    first, pruned, late, never = (by_rate[rate] for rate in learning_rates)
    assert (first["state"], pruned["state"], pruned["step"]) == ("COMPLETED", "PRUNED", 10)
    assert late["state"] in ("COMPLETED", "PRUNED"), "it was refused until then"
    assert late["eval_accuracy"] is not None
    assert never["state"] == "REJECTED", "there was not room for another"
    entries = [(entry.kind, entry.facts.get("request_id")) for entry, _ in store.ledger.entries()]
    assert ("refused", late["trial_id"]) in entries
    again = entries.index(("reserved_later", late["trial_id"]))
    assert entries.index(("settled", pruned["trial_id"])) < again
    level = store.ledger.status(document["sweep_id"]).level
    assert 0 < level.spent <= level.limit
    assert store.ledger.verify().ok
    store.ledger.close()


def test_the_worst_make_room_for_forks_of_the_best(tmp_path):
    # A list of two: noise stays as it is, or is so little that no trial may have it.
    mutations = {
        "learning_rate": {"choice": [2.0, 4.0, 8.0]},
        "noise_multiplier": {"choice": [0.3, 2.0]},
    }
    rule = {
        "name": "pbt",
        "perturbation_interval": 15,
        "quantile_fraction": 0.5,
        "hyperparam_mutations": mutations,
    }
    document, store = finished(
        tmp_path, rule, [8.0, 4.0, 1e-6, 1e-7], search={"num_samples": 1, "seed": 3}
    )
    assert document["state"] == "COMPLETED"
    (pruned,), (refused,) = by_state(document, "PRUNED"), by_state(document, "REJECTED")
    assert pruned["config"]["learning_rate"] < 1e-3
    assert pruned["step"] == 15
    completed = by_state(document, "COMPLETED")
    forks = [trial for trial in completed if trial["parent_trial_id"]]
    (fork,) = forks
    best = {trial["trial_id"] for trial in completed if trial["config"]["learning_rate"] > 1}
    assert fork["parent_trial_id"] in best
    number = int(fork["trial_id"].rpartition("-")[2])
    assert f"trial {number} took its place, a fork of trial" in pruned["reason"]
    assert refused["parent_trial_id"] in best
    assert refused["config"]["noise_multiplier"] == 0.3
    assert refused["epsilon"] > 3.0
    # Who was to make room for what was refused went on.
    assert len(rates(completed) & {1e-6, 1e-7}) == 1
    assert len(completed) == 4
    # It goes on from what its parent has learnt, pays for its own steps, and says what all cost.
    assert fork["parent_step"] == 15
    assert store.ledger.reservation(fork["trial_id"]).charged == 15
    by_id = {trial["trial_id"]: trial for trial in document["trials"]}
    assert fork["eval_accuracy"] > pruned["eval_accuracy"]
    assert fork["epsilon"] == pytest.approx(by_id[fork["parent_trial_id"]]["epsilon"])
    assert len(branch_rows(store)) == 5, "a branch of noise of its own"
    assert store.ledger.verify().ok
    store.ledger.close()
