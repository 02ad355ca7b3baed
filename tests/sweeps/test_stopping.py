"""Rules by which a sweep begins no more trials: each holds when it says, and no sooner."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accounting import DpSgdMechanism
from sweeps.database.states import TrialState
from sweeps.driver import drive
from sweeps.schedule import Schedule
from sweeps.spec.stop_spec import StopSpec
from sweeps.stopping import busy_secs, why_to_stop
from sweeps.verification import verify
from tests.sweeps.fork_parents import MEASURED, branch, row_of
from tests.sweeps.test_proposals import SPEC, queue_of, ran, submitted

LISTED = {"num_samples": 3}
OPEN = {**SPEC["privacy"], "policy": "open"}


def begun(stop, **changes):
    return submitted(**{"search": LISTED, **changes, "stop": stop})


def test_without_rules_nothing_stops():
    spec, sweep_id, store, _ = begun({})
    for row in store.trials(sweep_id):
        ran(store, row.trial_id, 1.0)
    assert why_to_stop(spec, sweep_id, store) == ""


def test_a_utility_that_was_reached():
    spec, sweep_id, store, _ = begun({"utility": 0.75})
    first, second, _ = store.trials(sweep_id)
    assert why_to_stop(spec, sweep_id, store) == ""
    ran(store, first.trial_id, 0.74)
    assert why_to_stop(spec, sweep_id, store) == ""
    ran(store, second.trial_id, 0.75)
    assert why_to_stop(spec, sweep_id, store) == "stop.utility: 0.7500 was reached, of 0.75"


def test_trials_that_have_run():
    spec, sweep_id, store, _ = begun({"trials": 2})
    first, second, _ = store.trials(sweep_id)
    ran(store, first.trial_id, 0.5)
    store.end_trial(second.trial_id, TrialState.CANCELLED)
    assert why_to_stop(spec, sweep_id, store) == "", "that one has not run"
    store.readmit({second.trial_id: None})
    ran(store, second.trial_id, 0.5)
    assert why_to_stop(spec, sweep_id, store) == "stop.trials: 2 have run"


def test_epsilon_that_is_spent_counts_and_what_is_promised_does_not():
    space = {**SPEC["search_space"], "noise_multiplier": 1.5}
    spec, sweep_id, store, _ = begun({"epsilon": 1.0}, privacy=OPEN, search_space=space)
    assert why_to_stop(spec, sweep_id, store) == ""
    for row in store.trials(sweep_id):
        assert why_to_stop(spec, sweep_id, store) == ""
        ran(store, row.trial_id, 0.5)
        if store.ledger.status(sweep_id).level.epsilon_spent >= 1.0:
            break
    assert why_to_stop(spec, sweep_id, store).startswith("stop.epsilon: ")


def test_a_budget_that_is_nearly_gone_whoever_took_it():
    spec, sweep_id, store, _ = begun({"budget_left": 0.25}, privacy=OPEN)
    assert why_to_stop(spec, sweep_id, store) == ""
    level = store.ledger.status(sweep_id).level
    taken = 0
    while level.free / level.limit > 0.25:
        assert why_to_stop(spec, sweep_id, store) == ""
        other = DpSgdMechanism(
            noise_multiplier=2.0,
            sampling_prob=0.05,
            iterations=20,
            neighboring_relation="zero_out",
        )
        store.ledger.reserve(sweep_id, other, request_id=f"other-{taken}")
        taken += 1
        level = store.ledger.status(sweep_id).level
    assert why_to_stop(spec, sweep_id, store).startswith("stop.budget_left: ")


def at(store, *spans, workers: Sequence[int] = range(9)):
    """Says when workers, each another one, began and ended."""
    with store.ledger.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM attempts")
        (trial_id,) = connection.exec_driver_sql("SELECT min(trial_id) FROM trials").one()
        for number, ((start, end), worker) in enumerate(zip(spans, workers, strict=False)):
            connection.exec_driver_sql(
                "INSERT INTO attempts (attempt_id, trial_id, number, worker, started_at, ended_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (f"{number:032}", trial_id, number, f"host:{worker}", start, end),
            )


def test_time_is_that_in_which_any_trial_ran():
    spec, sweep_id, store, _ = begun({"time_budget_s": 50})
    at(store, (100, 120), (110, 130), (1000, 1019))
    assert why_to_stop(spec, sweep_id, store) == ""
    at(store, (100, 120), (110, 130), (1000, 1020))
    why = why_to_stop(spec, sweep_id, store)
    assert why == "stop.time_budget_s: trials have run for 50 s, of 50"
    at(store, (100, None))
    assert why_to_stop(spec, sweep_id, store), "one that runs counts until now"


@pytest.mark.parametrize(("resources", "hours"), [({"cpus_per_trial": 2}, 2), ({}, 1)])
def test_hours_of_all_workers_together(resources, hours):
    rules = {"accelerator_hours": hours}
    spec, sweep_id, store, _ = begun(rules, resources=resources)
    at(store, (0, 1800), (0, 1799))
    assert why_to_stop(spec, sweep_id, store) == ""
    at(store, (0, 1800), (0, 1800))
    assert why_to_stop(spec, sweep_id, store).startswith("stop.accelerator_hours: ")
    at(store, (0, 1800), (0, 1800), workers=[7, 7])  # one, which had two trials at once
    assert why_to_stop(spec, sweep_id, store) == ""


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10))))
def test_busy_seconds_are_those_that_any_span_covers(given_spans):
    spans = sorted((start, start + length) for start, length in given_spans)
    covered = {second for start, end in spans for second in range(start, end)}
    assert busy_secs(spans) == len(covered)


def test_a_queue_lets_what_has_begun_and_what_was_asked_for_run_and_no_other():
    spec, sweep_id, store, home = begun({"trials": 1}, search={"num_samples": 4})
    first, second, third, fourth = [row.trial_id for row in store.trials(sweep_id)]
    queue = queue_of(spec, sweep_id, store, home)
    assert queue.take() == first
    ran(store, first, 0.5)
    store.attempts.begin(second)
    store.end_trial(third, TrialState.CANCELLED)
    store.readmit({third: None})  # by name
    assert queue.is_over(), "all that waited was to begin by itself"
    queue = queue_of(spec, sweep_id, store, home)
    assert {queue.take(), queue.take()} == {second, third}
    assert queue.is_over()
    assert queue.stopped == "stop.trials: 1 have run"
    assert row_of(store, fourth).state == TrialState.ADMITTED


def test_what_a_rule_kept_from_beginning_is_cancelled_with_the_rule_and_pays_nothing():
    spec, sweep_id, store, home = begun({"trials": 1})
    ran(store, store.trials(sweep_id)[0].trial_id, 0.5)
    with store.driving_lock(sweep_id):
        drive(sweep_id, store, home)
    rows = store.trials(sweep_id)
    assert [row.state for row in rows] == ["COMPLETED", "CANCELLED", "CANCELLED"]
    why = "stop.trials: 1 have run"
    assert rows[1].reason == f"the sweep ended before it began ({why})"
    assert store.ledger.reservation(rows[1].trial_id).state == "released"
    sweep = store.sweep(sweep_id)
    assert (sweep.state, sweep.reason) == ("COMPLETED", why)
    assert spec.stop.trials == 1


def test_a_search_proposes_nothing_once_a_rule_holds():
    _, sweep_id, store, home = begun({"utility": 0.9}, search=SPEC["search"])
    for row in store.trials(sweep_id):
        ran(store, row.trial_id, 0.95)
    with store.driving_lock(sweep_id):
        drive(sweep_id, store, home)
    assert len(store.trials(sweep_id)) == 2
    assert store.sweep(sweep_id).reason.startswith("stop.utility: 0.9500 was reached")


def test_none_that_waits_at_a_rung_goes_on_once_a_rule_holds():
    scheduler = {
        "name": "async_hyperband", "grace_period": 5, "reduction_factor": 2, "promotion": True,
    }  # fmt: skip
    spec, sweep_id, store, home = begun({}, scheduler=scheduler)
    schedule = Schedule(spec, store, home)
    ids = [row.trial_id for row in store.trials(sweep_id)]
    for trial_id, accuracy in zip(ids, (0.9, 0.5, 0.4), strict=True):
        attempt = store.attempts.begin(trial_id)
        store.attempts.charge(attempt, branch(1), 5)
        measured = {**MEASURED, "eval_accuracy": accuracy}
        store.attempts.report(attempt, branch(1).branch_id, 5, measured)
        schedule.decide(trial_id)
        store.rungs.set_aside(trial_id)
    assert schedule.promotable(sweep_id) == ids[0], "it is the better half of those three"
    waiting = [one.what for one in verify(store, home, sweep_id, with_mlflow=False).differences]
    assert not [what for what in waiting if "rung" in what], "it is as it should be"
    assert not queue_of(spec, sweep_id, store, home).is_over()
    ruled = spec.model_copy(update={"stop": StopSpec(utility=0.9)})
    queue = queue_of(ruled, sweep_id, store, home)
    assert queue.is_over()
    assert queue.take() is None
