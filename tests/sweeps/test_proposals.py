"""Proposals made while trials run: decided on before they are trials, learnt from, and ended."""

import pytest
import yaml

from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import open_store
from sweeps.driver import proposals_of
from sweeps.errors import SweepError
from sweeps.home import Home
from sweeps.schedule import Schedule
from sweeps.service import make_plan, record
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.trial_queue import TrialQueue
from tests.sweeps.fork_parents import MEASURED, branch
from trainer.config import TrialConfig

SPEC = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {"policy": "per_trial", "target_epsilon": 3.0, "target_delta": 1e-5},
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": {"loguniform": [0.1, 10.0]},
        "expected_batch_size": 32,
        "iterations": 20,
        "noise_multiplier": 2.0,
        "l2_clip_norm": 1.0,
    },
    "search": {"name": "optuna", "num_samples": 4, "n_startup_trials": 2, "max_refused": 5},
    "report_every_steps": 5,
}
DEAR = {"search_space": {**SPEC["search_space"], "noise_multiplier": {"uniform": [0.3, 0.4]}}}


def submitted(**changes):
    """A new sweep: its specification, its id, the database and the home."""
    home = Home.from_environment()
    home.create()
    path = home.path / "spec.yaml"
    path.write_text(yaml.safe_dump({**SPEC, **changes}))
    plan = make_plan(path, home)
    store = open_store(home)
    return plan.spec, record(plan, store), store, home


def queue_of(spec, sweep_id, store, home, limit=100):
    return TrialQueue(
        spec,
        sweep_id,
        store,
        waiting=store.runnable(sweep_id),
        schedule=Schedule(spec, store),
        proposals=proposals_of(spec, sweep_id, store, home),
        limit=limit,
    )


def end_of(spec, sweep_id, store, home):
    proposals = proposals_of(spec, sweep_id, store, home)
    assert proposals is not None
    return proposals.end()


def ran(store, trial_id, accuracy):
    """Makes up that a trial ran to its end."""
    attempt = store.attempts.begin(trial_id)
    store.attempts.charge(attempt, branch(1), 20)
    measured = {**MEASURED, "eval_accuracy": accuracy}
    store.attempts.report(
        attempt, branch(1).branch_id, 20, measured, end=TrialState.COMPLETED, reason=""
    )


def test_what_was_listed_comes_first_and_then_what_is_proposed():
    spec, sweep_id, store, home = submitted()
    queue = queue_of(spec, sweep_id, store, home)
    taken = []
    while not queue.is_over():
        trial_id = queue.take()
        assert trial_id is not None
        ran(store, trial_id, 0.5)
        taken.append(trial_id)
    rows = store.trials(sweep_id)
    assert [row.trial_id for row in rows] == taken
    assert [row.number for row in rows] == [0, 1, 2, 3]
    assert {row.state for row in rows} == {TrialState.COMPLETED}
    assert queue.take() is None
    for row in rows:
        config = TrialConfig.from_json(row.trial_config)
        assert config.learning_rate == row.setting["learning_rate"] == row.config["learning_rate"]
        assert store.ledger.reservation(row.trial_id).charged == 20
    assert len({row.config["learning_rate"] for row in rows}) == 4
    assert end_of(spec, sweep_id, store, home) == ""


def test_a_driver_that_comes_back_proposes_what_the_dead_one_would_have(monkeypatch):
    spec, sweep_id, store, home = submitted()
    for row in store.trials(sweep_id):
        ran(store, row.trial_id, 0.5 + row.number / 10)
    told = []
    with monkeypatch.context() as patched:
        patched.setattr(
            store, "add_trial", lambda _, new, **__: told.append(new.setting) or ("", "REJECTED")
        )
        for _ in range(2):
            assert queue_of(spec, sweep_id, store, home).take() is None
    assert told[0] == told[1]
    third = queue_of(spec, sweep_id, store, home).take()
    (row,) = [row for row in store.trials(sweep_id) if row.trial_id == third]
    assert row.setting == told[0]


def test_proposals_that_are_all_refused_end_the_search_with_a_reason():
    spec, sweep_id, store, home = submitted(**DEAR)
    queue = queue_of(spec, sweep_id, store, home)
    asked = 0
    while not queue.is_over():
        assert queue.take() is None
        asked += 1
    assert asked == 3, "two were listed"
    rows = store.trials(sweep_id)
    assert [row.state for row in rows] == [TrialState.REJECTED] * 5
    assert all(row.trial_config is None and row.reason for row in rows)
    end = end_of(spec, sweep_id, store, home)
    assert end is not None
    assert end.startswith("the search has ended: its last 5 proposals (search.max_refused) were")
    assert rows[-1].reason in end
    assert all(store.ledger.reservation(row.trial_id).charged == 0 for row in rows)


def test_refused_proposals_do_not_count_as_samples():
    space = {**SPEC["search_space"], "noise_multiplier": {"choice": [0.3, 2.0]}}
    spec, sweep_id, store, home = submitted(search_space=space)
    queue = queue_of(spec, sweep_id, store, home)
    while not queue.is_over():
        if trial_id := queue.take():
            ran(store, trial_id, 0.5)
    states = [row.state for row in store.trials(sweep_id)]
    assert states.count(TrialState.COMPLETED) == 4
    assert "REJECTED" in states, "otherwise this shows nothing: take another seed"


def test_under_open_the_budget_decides_on_each_proposal():
    privacy = {**SPEC["privacy"], "policy": "open"}
    spec, sweep_id, store, home = submitted(
        privacy=privacy,
        search={**SPEC["search"], "num_samples": 50},
        search_space={**SPEC["search_space"], "noise_multiplier": 1.0},
    )
    queue = queue_of(spec, sweep_id, store, home)
    while not queue.is_over():
        if trial_id := queue.take():
            ran(store, trial_id, 0.5)
            queue.put_down()
    rows = store.trials(sweep_id)
    states = [row.state for row in rows]
    assert 2 < states.count("COMPLETED") < 50
    assert states[-5:] == ["REJECTED"] * 5
    level = store.ledger.status(sweep_id).level
    assert level.spent <= level.limit
    assert all(row.planned_epsilon < 3.0 for row in rows), "each by itself would be allowed"


def test_nothing_is_proposed_once_somebody_has_asked_for_the_end():
    spec, sweep_id, store, home = submitted()
    queue = queue_of(spec, sweep_id, store, home)
    store.set_wish(sweep_id, Wish.STOP)
    assert queue.is_over()
    assert queue.take() is None
    store.set_wish(sweep_id, Wish.NONE)
    assert queue.take() is not None
    store.cancel_sweep(sweep_id)
    assert queue.take() is None
    assert store.sweep(sweep_id).state == SweepState.CANCELLED
    assert len(store.trials(sweep_id)) == 2


def test_a_queue_hands_out_no_more_than_its_limit():
    spec, sweep_id, store, home = submitted()
    queue = queue_of(spec, sweep_id, store, home, limit=3)
    assert [queue.take() is not None for _ in range(4)] == [True, True, True, False]
    assert queue.is_over()
    assert not queue_of(spec, sweep_id, store, home).is_over()


def test_other_data_than_the_sweep_began_with_is_refused(monkeypatch):
    spec, sweep_id, store, home = submitted()
    queue = queue_of(spec, sweep_id, store, home)
    for _ in range(2):
        queue.take()
    with store.ledger.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE sweeps SET dataset_fingerprint = 'other'")
    with pytest.raises(SweepError, match="its data set digits has changed since it began"):
        queue.take()
    assert len(store.trials(sweep_id)) == 2


def test_a_specification_from_before_there_were_searches_is_random():
    spec = SweepSpec.model_validate({**SPEC, "search": {"num_samples": 3, "seed": 1}})
    assert spec.search.name == "random"
