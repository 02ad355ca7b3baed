"""Forks and readmissions: what is decided, what is written, and what stays as it was."""

import bisect
import dataclasses
from typing import Any

import pytest
import sqlalchemy as sa

import accounting
from accounting.mechanism import composed
from sweeps.database.states import TrialState
from sweeps.database.tables import branches, checkpoints, reading, reports, sweeps, trials, writing
from sweeps.errors import CommandError, OverspentError, SpecError, StoreError
from sweeps.forks import new_fork, parse_changes
from sweeps.tracking.disclosure import trial_tags
from sweeps.worker import TrialRun
from tests.sweeps.fork_parents import (
    OPEN,
    branch,
    home_at,
    journal,
    paid_for,
    pretend,
    row_of,
    submitted,
)
from trainer.config import TrialConfig

DELTA = 1e-5
LIMIT = 0.5


@pytest.fixture
def home(tmp_path):
    return home_at(tmp_path / "home")


def epsilon_of(*mechanisms):
    return accounting.epsilon_of_list(composed(mechanisms), delta=DELTA, accountant="rdp")


def forked(store, home, trial_id, *changes, dry_run=False, **options):
    return store.fork(
        new_fork(store, home, trial_id, parse_changes(changes), **options), dry_run=dry_run
    )


def rows_of(store, trial_id) -> list[Any]:
    """Everything that the database says of a trial."""
    with reading(store.ledger.engine) as connection:
        return [
            connection.execute(sa.select(table).where(table.c.trial_id == trial_id)).all()
            for table in (trials, branches, checkpoints, reports)
        ]


def everything(store):
    with reading(store.ledger.engine) as connection:
        found = [connection.execute(sa.select(table)).all() for table in (trials, sweeps)]
    return found, store.ledger.head(), store.outbox.undelivered()


# --- What is decided -----------------------------------------------------------------------


def test_a_fork_is_a_trial_that_pays_for_its_own_steps_alone(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5, 10)
    before = rows_of(store, parent), paid_for(store, parent)
    fork = forked(store, home, parent, "learning_rate=0.25", "noise_multiplier=3")
    assert (fork.number, fork.parent_step, fork.iterations) == (2, 10, 20)
    assert fork.trial_id == f"{fork.sweep_id}-0002"
    assert fork.admitted
    row = row_of(store, fork.trial_id)
    assert (row.state, row.exempt) == (TrialState.ADMITTED, True)
    assert (row.parent_trial_id, row.parent_step) == (parent, 10)
    assert (row.planned_iterations, row.charged_iterations) == (10, 0)
    config = TrialConfig.from_json(row.trial_config)
    theirs = TrialConfig.from_json(before[0][0][0].trial_config)
    assert config == dataclasses.replace(theirs, learning_rate=0.25, noise_multiplier=3.0)
    assert row.config["learning_rate"] == 0.25
    assert row.config["sampling_prob"] == theirs.sampling_prob
    paid = paid_for(store, fork.trial_id)
    (prefix,) = paid.request.prefix
    assert prefix == before[1].mechanism.after(10)
    assert (paid.mechanism.iterations, paid.mechanism.noise_multiplier) == (10, 3.0)
    assert fork.epsilon == epsilon_of(prefix)
    assert fork.epsilon_after == row.planned_epsilon == epsilon_of(prefix, paid.mechanism)
    assert (rows_of(store, parent), paid_for(store, parent)) == before
    newest = store.outbox.undelivered()[-1]
    assert (newest.kind, newest.trial_id) == ("trial_start", fork.trial_id)
    assignment = store.attempts.assignment(fork.trial_id)
    assert assignment.fork_from == ("/nowhere/10",)
    assert tuple(assignment.spent_before) == (prefix,)


def test_the_prefix_counts_every_branch_as_far_as_it_had_come(home):
    store, (parent, _) = submitted(home, privacy={"target_epsilon": 30.0})
    attempt = pretend(store, parent, 5, 10, state=None)
    store.attempts.charge(attempt, branch(2, 5), 15)  # began at 5, and took 10 steps
    store.attempts.charge(attempt, branch(3, 15), 20)  # began after the checkpoint
    fork = forked(store, home, parent, "learning_rate=0.5", from_step=10)
    prefix = paid_for(store, fork.trial_id).request.prefix
    assert [mechanism.iterations for mechanism in prefix] == [10, 5]


def test_a_fork_of_a_fork_begins_with_all_that_was_spent(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    first = forked(store, home, parent, "noise_multiplier=4")
    attempt = store.attempts.begin(first.trial_id)
    with pytest.raises(StoreError, match="cannot begin at step 6"):
        store.attempts.charge(attempt, branch(7, 6), 10)
    assert store.attempts.charge(attempt, branch(8, 5), 10) == 5
    store.attempts.report(attempt, branch(8).branch_id, 10, {})
    store.attempts.checkpoint(attempt, 10, "/nowhere/first/10")
    assert store.attempts.assignment(first.trial_id).checkpoints == ("/nowhere/first/10",)
    second = forked(store, home, first.trial_id, "learning_rate=0.5")
    prefix = paid_for(store, second.trial_id).request.prefix
    assert [(m.noise_multiplier, m.iterations) for m in prefix] == [(2.0, 5), (4.0, 5)]
    assert second.epsilon_after == epsilon_of(*prefix, prefix[1].after(10))


def test_iterations_say_where_a_fork_ends(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    fork = forked(store, home, parent, iterations=12)
    assert (fork.iterations, fork.new_iterations) == (12, 7)
    row = row_of(store, fork.trial_id)
    assert row.config["iterations"] == row.trial_config["iterations"] == 12


@pytest.mark.parametrize("accepted", [True, False])
def test_a_dry_run_says_what_would_be_and_changes_nothing(home, accepted):
    store, (parent, _) = submitted(home, privacy=OPEN)
    pretend(store, parent, 5)
    before = everything(store)
    change = f"noise_multiplier={2 if accepted else 0.5}"
    said = forked(store, home, parent, change, dry_run=True)
    assert everything(store) == before
    assert said.admitted is accepted
    assert forked(store, home, parent, change) == said


def test_a_refused_fork_leaves_the_journals_word_and_nothing_else(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    store.ledger.freeze(store.sweeps()[0].sweep_id)
    (before, head, messages) = everything(store)
    fork = forked(store, home, parent, "learning_rate=0.5")
    assert fork.refusal == "the budget is frozen"
    assert everything(store)[0] == before
    assert everything(store)[2] == messages
    kind, facts = journal(store)[-1]
    assert store.ledger.head().seq == head.seq + 1
    assert (kind, facts["request_id"]) == ("refused", fork.trial_id)
    # What was refused once is asked anew, under a name of its own.
    store.ledger.thaw(fork.sweep_id)
    again = forked(store, home, parent, "learning_rate=0.5")
    assert (again.refusal, again.number) == ("", fork.number + 1)
    assert store.ledger.verify().ok


def test_under_open_the_prefix_is_paid_for_once(home):
    store, (parent, _) = submitted(home, privacy=OPEN)
    pretend(store, parent, 10)
    budget = store.sweeps()[0].sweep_id
    for _ in range(2):
        before = store.ledger.status(budget).level.reserved
        fork = forked(store, home, parent, "learning_rate=0.5")
        own = paid_for(store, fork.trial_id)
        assert own.verdict.requested == pytest.approx(
            store.ledger.status(budget).level.reserved - before
        )
        assert own.mechanism.iterations == 10


def test_a_list_that_has_begun_takes_no_fork(home):
    store, (parent, _) = submitted(home, privacy={"policy": "declared", "target_epsilon": 9.0})
    pretend(store, parent, 5)
    fork = forked(store, home, parent, "learning_rate=0.5")
    assert "list was closed when the first of it was trained" in fork.refusal
    assert len(store.trials(fork.sweep_id)) == 2


def test_under_private_selection_nothing_goes_on_from_another(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    new = new_fork(store, home, parent, {})
    spec = store.sweeps()[0].spec
    spec["privacy"]["policy"] = "private_selection"
    with writing(store.ledger.engine) as connection:
        connection.execute(sweeps.update().values(spec=spec))
    with pytest.raises(StoreError, match="under private_selection no trial goes on"):
        store.fork(new)


def test_data_that_has_changed_is_not_forked_on(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    new = dataclasses.replace(new_fork(store, home, parent, {}), dataset_fingerprint="other")
    with pytest.raises(accounting.InvalidPrivacyParameter, match="dataset_fingerprint"):
        store.fork(new)
    assert len(store.trials(store.sweeps()[0].sweep_id)) == 2


# --- What cannot be forked, and what is no change -------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate", "allowed is KEY=VALUE"),
        ("learning_rat=1", r"unknown key \(did you mean learning_rate\?\); allowed: optimizer"),
        ("iterations=5", "allowed is --iterations 5"),
        ("learning_rate=1\nname: x", "allowed is one value"),
    ],
)
def test_a_text_that_is_no_change_is_refused(text, words):
    with pytest.raises(CommandError, match=words):
        parse_changes([text])


def test_a_field_is_set_once():
    with pytest.raises(CommandError, match="set twice"):
        parse_changes(["learning_rate=1", "learning_rate=2"])


def test_values_are_read_as_a_specification_says_them():
    texts = ["optimizer=adam", "learning_rate=1e-3", "warmup_steps=3", "weight_decay=.5"]
    assert parse_changes(texts) == {
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "warmup_steps": 3,
        "weight_decay": 0.5,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("learning_rate=-1", r"^search_space.learning_rate: -1 is not allowed; allowed: a number"),
        ("learning_rate='1'", "search_space.learning_rate: '1' is not allowed .*without quotes"),
        ("learning_rate=.nan", "search_space.learning_rate"),
        ("optimizer=adm", "search_space.optimizer: 'adm' is not allowed"),
        ("optimizer={grid_search: [sgd, adam]}", "grid_search is not allowed in a fork"),
        ("learning_rate={uniform: [1, 2]}", "uniform is not allowed in a fork"),
        ("learning_rate={by: optimizer, sgd: 1}", "by is not allowed in a fork; allowed: one va"),
        ("noise_multiplier=calibrated", "allowed: a number > 0"),
        ("expected_batch_size=5000", "exceeds the 1437 examples"),
        ("warmup_steps=1.5", "search_space.warmup_steps"),
    ],
)
def test_a_change_is_refused_as_the_specification_would(home, change, words):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    before = everything(store)
    with pytest.raises(SpecError, match=words):
        forked(store, home, parent, change)
    assert everything(store) == before


def test_what_cannot_be_forked_says_why(home):
    store, (parent, other) = submitted(home)
    pretend(store, parent, 5, 10, 15)
    with pytest.raises(StoreError, match="'nobody': not in the ledger"):
        forked(store, home, "nobody")
    with pytest.raises(StoreError, match="is ADMITTED and has no checkpoint"):
        forked(store, home, other)
    with pytest.raises(StoreError, match=r"--from-step 5: allowed is .* checkpoint: 10, 15$"):
        forked(store, home, parent, from_step=5)
    with pytest.raises(StoreError, match="--iterations 15: allowed is more than the 15 steps"):
        forked(store, home, parent, iterations=15)


BANDED = {
    "mechanism": {"bands": 2},
    "privacy": {"target_epsilon": 30.0},
}


def test_correlated_noise_is_of_a_whole_trial(home):
    store, (parent, _) = submitted(home, **BANDED)
    pretend(store, parent, 5)
    with pytest.raises(StoreError, match=r"mechanism\.bands=2: allowed to fork are trials with 1"):
        forked(store, home, parent)
    with pytest.raises(StoreError, match="--iterations 40: allowed is 20, for how its noise"):
        store.readmit({parent: 40})
    (going_on,) = store.readmit({parent: None})
    assert going_on.admitted


# --- The limit of one trial ----------------------------------------------------------------


def shared_budget(home, epsilon=30.0):
    """A budget that allows every trial more than a sweep of it promises."""
    store, _ = submitted(home)  # any, for the data's fingerprint
    fingerprint = store.sweeps()[0].dataset_fingerprint
    store.ledger.create_budget(
        "team",
        dataset="digits:1.0.0",
        dataset_fingerprint=fingerprint,
        epsilon=epsilon,
        delta=DELTA,
        policy="per_trial",
    )
    return {"budget": "team", "target_epsilon": LIMIT}


def part_of_all(_home):
    return {**OPEN, "target_epsilon": 8.0, "trial_epsilon": LIMIT}


def most_within_limit(mechanism):
    """The most iterations whose epsilon is within the limit."""
    counts = range(20, 400)
    fitting = bisect.bisect_right(counts, LIMIT, key=lambda n: epsilon_of(mechanism.after(n)))
    return counts[fitting - 1]


@pytest.mark.parametrize("stricter", [shared_budget, part_of_all])
def test_a_trial_that_goes_on_keeps_to_the_limit_of_one(home, stricter):
    store, (trial, _) = submitted(home, privacy=stricter(home))
    paid = paid_for(store, trial)
    most = most_within_limit(paid.mechanism)
    pretend(store, trial, 20, state=TrialState.COMPLETED)
    head = store.ledger.head()
    (refused,) = store.readmit({trial: most + 1})
    assert "exceeds the budget of 0.5 at delta 1e-05" in refused.refusal
    assert store.ledger.head() == head
    row = row_of(store, trial)
    assert row.state == TrialState.COMPLETED
    (admitted,) = store.readmit({trial: most})
    assert admitted.admitted
    assert admitted.epsilon_after == epsilon_of(paid.mechanism.after(most))


@pytest.mark.parametrize("stricter", [shared_budget, part_of_all])
def test_a_fork_keeps_to_the_limit_with_what_it_begins_with(home, stricter):
    store, (parent, _) = submitted(home, privacy=stricter(home))
    mechanism = paid_for(store, parent).mechanism
    most = most_within_limit(mechanism)
    pretend(store, parent, 20, state=TrialState.COMPLETED)
    refused = forked(store, home, parent, "learning_rate=0.5", iterations=most + 1)
    assert "with what was spent before" in refused.refusal
    assert "exceeds the budget of 0.5" in refused.refusal
    admitted = forked(store, home, parent, "learning_rate=0.5", iterations=most)
    assert admitted.admitted
    assert admitted.epsilon_after == epsilon_of(mechanism.after(most))


@pytest.mark.parametrize("stricter", [shared_budget, part_of_all])
def test_a_new_branch_keeps_to_the_limit_too(home, stricter):
    store, (trial, _) = submitted(home, privacy=stricter(home))
    mechanism = paid_for(store, trial).mechanism
    most = most_within_limit(mechanism)
    attempt = pretend(store, trial, 20, state=None)
    for number in range(2, most // 20 + 1):
        store.attempts.charge(attempt, branch(number), 20)
    with pytest.raises(OverspentError):
        store.attempts.charge(attempt, branch(100), 20)
    row = row_of(store, trial)
    assert row.planned_iterations == most // 20 * 20
    assert paid_for(store, trial).reserved == row.planned_iterations


# --- Trained -------------------------------------------------------------------------------


def trained(store, home, trial_id, reports) -> list[Any]:
    """Runs a trial as a worker does, for so many reports."""
    with TrialRun(store, home, trial_id) as run:
        return [run.next_report() for _ in range(reports)]


@pytest.mark.slow
def test_a_fork_is_trained_from_its_parents_checkpoint(home):
    store, (parent, _) = submitted(home)
    trained(store, home, parent, 2)
    store.end_trial(parent, TrialState.PRUNED)
    before = rows_of(store, parent), paid_for(store, parent)
    files = {path for path in home.checkpoint_dir(before[0][0][0].sweep_id, parent).rglob("*")}
    fork = forked(store, home, parent, "learning_rate=0.25", "optimizer=adam")
    first, last = trained(store, home, fork.trial_id, 2)
    assert (first.step, last.step) == (15, 20)
    row = row_of(store, fork.trial_id)
    assert (row.state, row.charged_iterations) == (TrialState.COMPLETED, 10)
    paid = paid_for(store, fork.trial_id)
    assert (paid.charged, paid.state) == (10, "closed")
    assert first.epsilon == epsilon_of(*paid.request.prefix, paid.mechanism.after(5))
    assert last.epsilon == fork.epsilon_after == row.planned_epsilon
    assert (rows_of(store, parent), paid_for(store, parent)) == before
    assert {path for path in home.checkpoint_dir(fork.sweep_id, parent).rglob("*")} == files
    # It can itself go on, as any trial that has ended.
    (going_on,) = store.readmit({fork.trial_id: 25})
    assert (going_on.step, going_on.new_iterations) == (20, 5)
    (last,) = trained(store, home, fork.trial_id, 1)
    assert last.step == 25
    assert last.epsilon == epsilon_of(*paid.request.prefix, paid.mechanism.after(15))


@pytest.mark.slow
def test_what_a_fork_begins_with_is_kept_while_its_parent_runs_on(home):
    store, (parent, _) = submitted(home)
    with TrialRun(store, home, parent) as run:
        for _ in range(2):
            run.next_report()
        # The checkpoint of the second report is being written; that of the first is recorded.
        fork = forked(store, home, parent, "learning_rate=0.25", from_step=5)
        for _ in range(2):
            run.next_report()
    kept = [row.step for row in rows_of(store, parent)[2]]
    assert kept == [5, 20]
    first, *_ = trained(store, home, fork.trial_id, 1)
    assert first.step == 10
    assert store.attempts.assignment(fork.trial_id).fork_from is not None


def test_mlflow_hears_of_the_parent(home):
    store, (parent, _) = submitted(home)
    pretend(store, parent, 5)
    fork = forked(store, home, parent, "learning_rate=0.25")
    sweep = store.sweep(fork.sweep_id)
    tags = trial_tags(sweep, row_of(store, fork.trial_id), "a guarantee")
    assert tags["dp_sweeps.parent_trial_id"] == parent
    assert tags["dp_sweeps.parent_step"] == "5"
    of_parent = trial_tags(sweep, row_of(store, parent), "a guarantee")
    assert not {name for name in of_parent if "parent" in name}
