"""Proposals made while trials run: decided on before they are trials, learnt from, and ended."""

import pytest
import yaml

from sweeps.database.states import SweepState, TrialState, Wish
from sweeps.database.store import open_store
from sweeps.driver import proposals_of
from sweeps.errors import SweepError
from sweeps.home import Home
from sweeps.proposals import _tried  # pyright: ignore[reportPrivateUsage]
from sweeps.schedule import Schedule
from sweeps.service import make_plan, record
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.trial_queue import TrialQueue
from tests.sweeps.fork_parents import MEASURED, branch
from trainer.config import TrialConfig
from trainer.training.plan import mechanism_of

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
        schedule=Schedule(spec, store, home),
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
            store, "add_trials", lambda _, new, **__: told.append(new[0].setting) or []
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


REPEATED = {"search": {**SPEC["search"], "repeats": 3}}


def test_a_configuration_is_proposed_once_for_all_its_repeats():
    spec, sweep_id, store, home = submitted(**REPEATED)
    queue = queue_of(spec, sweep_id, store, home)
    while not queue.is_over():
        ran(store, queue.take(), 0.5)
    rows = store.trials(sweep_id)
    assert [row.number for row in rows] == list(range(12)), "4 configurations of 3 trials"
    for first in range(0, 12, 3):
        repeats = rows[first : first + 3]
        assert [row.repeat_of for row in repeats] == [None] + [repeats[0].trial_id] * 2
        assert all(row.setting == repeats[0].setting for row in repeats)
        seeds = [TrialConfig.from_json(row.trial_config).seed for row in repeats]
        assert seeds[0] == spec.seed
        assert len(set(seeds)) == 3
    assert len({row.setting["learning_rate"] for row in rows}) == 4
    assert end_of(spec, sweep_id, store, home) == ""


def learnt(store, sweep_id):
    """What a search would be told of the configurations of a sweep."""
    last = store.last_reports(sweep_id)
    rows = store.trials(sweep_id)
    return [
        _tried(rows[first : first + 3], last, lambda _: 0.0) for first in range(0, len(rows), 3)
    ]


def test_a_search_learns_the_mean_of_the_repeats_that_have_finished():
    _, sweep_id, store, _ = submitted(**REPEATED)
    ids = [row.trial_id for row in store.trials(sweep_id)]
    assert [each.outcome for each in learnt(store, sweep_id)] == ["running"] * 2
    ran(store, ids[0], 0.5)
    ran(store, ids[1], 0.8)
    store.attempts.begin(ids[2])
    (first, second) = learnt(store, sweep_id)
    assert (first.outcome, first.utility, first.step) == ("completed", pytest.approx(0.65), 20)
    assert second.outcome == "running"
    store.end_trial(ids[2], TrialState.FAILED, "no luck")
    assert learnt(store, sweep_id)[0] == first, "what failed says nothing"


def test_a_configuration_counts_as_its_worst_repeat_does():
    _, sweep_id, store, _ = submitted(**REPEATED)
    ids = [row.trial_id for row in store.trials(sweep_id)]
    for trial_id, accuracy in zip(ids[:2], (0.5, 0.8), strict=True):
        ran(store, trial_id, accuracy)
    attempt = store.attempts.begin(ids[2])
    store.attempts.charge(attempt, branch(1), 5)
    measured = {**MEASURED, "eval_accuracy": 0.2}
    store.attempts.report(attempt, branch(1).branch_id, 5, measured)
    store.end_trial(ids[2], TrialState.PRUNED, "behind")
    first = learnt(store, sweep_id)[0]
    assert (first.outcome, first.utility, first.step) == ("pruned", pytest.approx(0.5), 5)
    ran(store, ids[3], 0.9)
    store.attempts.begin(ids[4])
    store.end_trial(ids[4], TrialState.DIVERGED)
    assert learnt(store, sweep_id)[1].outcome == "diverged"


def test_a_configuration_without_room_for_its_last_repeat_is_refused_whole():
    privacy = {**SPEC["privacy"], "policy": "open", "target_epsilon": 2.5}
    spec, sweep_id, store, home = submitted(
        privacy=privacy,
        search={**REPEATED["search"], "num_samples": 20},
        search_space={**SPEC["search_space"], "noise_multiplier": 1.0},
    )
    queue = queue_of(spec, sweep_id, store, home)
    while not queue.is_over():
        if trial_id := queue.take():
            ran(store, trial_id, 0.5)
            queue.put_down()
    rows = store.trials(sweep_id)
    states = [row.state for row in rows]
    whole = [set(states[first : first + 3]) for first in range(0, len(rows), 3)]
    assert all(len(each) == 1 for each in whole)
    assert whole[-5:] == [{"REJECTED"}] * 5
    left = store.ledger.account(sweep_id).copies_that_fit(
        store.ledger.reservation(rows[0].trial_id).mechanism
    )
    assert 0 < left < 3, "otherwise this shows nothing: take another budget"
    assert store.ledger.verify().ok


def test_a_fork_in_between_takes_no_place_among_repeats():
    spec, sweep_id, store, home = submitted(**REPEATED)
    config = TrialConfig.from_json(store.trials(sweep_id)[0].trial_config)
    queue = queue_of(spec, sweep_id, store, home)
    for _ in range(6):
        ran(store, queue.take(), 0.5)
    store.ledger.reserve(sweep_id, mechanism_of(config), request_id=f"{sweep_id}-0007")
    taken = [queue.take() for _ in range(3)]
    assert taken == [f"{sweep_id}-000{number}" for number in (6, 8, 9)]
    rows = [row for row in store.trials(sweep_id) if row.trial_id in taken]
    assert [row.repeat_of for row in rows] == [None, taken[0], taken[0]]


def test_a_rule_that_ends_a_sweep_leaves_repeats_that_have_not_begun():
    spec, sweep_id, store, home = submitted(**REPEATED, stop={"trials": 7})
    queue = queue_of(spec, sweep_id, store, home)
    taken = 0
    while trial_id := queue.take():
        ran(store, trial_id, 0.5)
        taken += 1
    assert taken == 7
    assert queue.stopped
    states = [row.state for row in store.trials(sweep_id)]
    assert states == ["COMPLETED"] * 7 + ["ADMITTED"] * 2


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
