"""What a sweep will take: from trials of known lengths to hours, and from rows to lengths."""

import math

import pytest
import yaml

from sweeps.database.states import TrialState
from sweeps.database.tables import attempts, checkpoints, reports, sweeps, trials, writing
from sweeps.forecast.earlier_trials import earlier_trials
from sweeps.forecast.measured import Measured
from sweeps.forecast.reckoning import Range, forecast, reckon
from sweeps.home import Home
from sweeps.report.forecast_view import forecast_lines
from sweeps.service import make_plan
from tests.sweeps.fork_parents import MEASURED, branch
from tests.sweeps.test_proposals import SPEC, submitted

GRID = {"learning_rate": {"grid_search": [0.5, 1.0, 2.0, 4.0]}}
SPACE = {**SPEC["search_space"], **GRID}
LISTED = {"search": {}, "search_space": SPACE}


def plan_of(tmp_path, **changes):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump({**SPEC, **LISTED, **changes}))
    return make_plan(path, Home.from_environment())


def took(config, start, step, size=1000):
    return Measured(
        config=config, start_secs=start, step_secs=step, checkpoint_bytes=size, where="here"
    )


def like(plan, *times):
    """As if the first trial of a plan had taken so long, once for each start and step."""
    return [took(plan.admitted[0].config, start, step) for start, step in times]


def exactly(value):
    return pytest.approx(Range(value, value, value).__dict__)


def test_a_trial_takes_its_start_and_its_steps(tmp_path):
    plan = plan_of(tmp_path)
    found = reckon(plan, like(plan, (2.0, 0.5)), "seen")
    # Four trials of 20 steps, one after the other, on one CPU each.
    assert vars(found.wall_secs) == exactly(4 * 12.0)
    assert vars(found.accelerator_hours) == exactly(4 * 12.0 / 3600)
    assert (found.trials, found.unknown_trials, found.is_most) == (4, 0, False)
    assert (found.checkpoint_bytes, found.most_checkpoint_bytes) == (4000, 6000)
    assert found.origin == "seen"


def test_the_first_of_a_shape_on_each_worker_compiles(tmp_path):
    plan = plan_of(tmp_path, resources={"max_concurrent_trials": 2, "cpus_per_trial": 3})
    found = reckon(plan, like(plan, (10.0, 0.1), (1.0, 0.1), (1.0, 0.2)), "")
    # Twice 10 and twice 1 to begin; 80 steps of 0.1, for the middle of three is 0.1.
    assert found.wall_secs is not None
    assert found.wall_secs.about == pytest.approx((22 + 8) / 2)
    assert found.wall_secs.least == pytest.approx((4 + 8) / 2)
    assert found.wall_secs.most == pytest.approx((40 + 16) / 2)
    assert found.accelerator_hours is not None
    assert found.accelerator_hours.about == pytest.approx(30 * 3 / 3600)


def test_trials_that_share_a_worker_take_a_share_of_it_each(tmp_path):
    resources = {"max_concurrent_trials": 1, "trials_per_worker": 3}
    plan = plan_of(tmp_path, resources=resources, stop={"trials": 1})
    found = reckon(plan, like(plan, (2.0, 0.5)), "")
    assert (found.concurrent, found.trials_per_worker) == (1, 3)
    assert vars(found.accelerator_hours) == exactly((1 + 3 - 1) * 12.0 / 3600)
    assert vars(found.wall_secs) == exactly(3 * 12.0), "three go on to their end"
    assert found.most_checkpoint_bytes == 4000 + 3 * 2000
    (line, _) = forecast_lines(found)
    assert "1 worker at a time with up to 3 trials each; less where" in line.plain


def test_gpus_count_instead_of_cpus(tmp_path):
    plan = plan_of(tmp_path, resources={"cpus_per_trial": 8, "gpus_per_trial": 2})
    found = reckon(plan, like(plan, (0.0, 1.0)), "")
    assert vars(found.accelerator_hours) == exactly(80 * 2 / 3600)


def test_a_sweep_lasts_as_long_as_its_longest_trial(tmp_path):
    plan = plan_of(tmp_path, resources={"max_concurrent_trials": 100})
    assert vars(reckon(plan, like(plan, (2.0, 0.5)), "").wall_secs) == exactly(12.0)


def test_batches_between_two_lie_on_a_line_and_others_are_unknown(tmp_path):
    batches = {"expected_batch_size": {"grid_search": [16, 32, 64]}}
    plan = plan_of(tmp_path, search_space={**SPEC["search_space"], **batches})
    small, middle, large = (one.config for one in plan.proposals)
    seen = [took(small, 0.0, 1.0), took(large, 0.0, 4.0)]
    found = reckon(plan, seen, "")
    assert (found.trials, found.unknown_trials) == (3, 0)
    assert vars(found.wall_secs) == exactly(20 * (1.0 + 2.0 + 4.0))
    partly = reckon(plan, [seen[0], took(middle, 0.0, 2.0)], "")
    assert (partly.trials, partly.unknown_trials) == (3, 1)
    assert vars(partly.wall_secs) == exactly(20 * (1.0 + 2.0))


def test_another_model_tells_nothing(tmp_path):
    plan = plan_of(tmp_path)
    other = plan_of(tmp_path, model={"name": "mlp"})
    found = reckon(plan, like(other, (1.0, 1.0)), "")
    assert (found.accelerator_hours, found.wall_secs, found.checkpoint_bytes) == (None, None, None)
    assert found.unknown_trials == 4
    assert "--calibrate" in found.origin


@pytest.mark.parametrize(
    ("stop", "secs"),
    [
        # Two at a time, 12 s each, 10 of them: 60 s of two workers.
        ({"trials": 3}, (3 + 1) * 12.0),
        ({"time_budget_s": 15}, 2 * (15 + 12.0)),
        ({"accelerator_hours": 30 / 3600}, 30 + 2 * 12.0),
        ({"accelerator_hours": 1}, 120.0),
        ({"utility": 0.9}, 120.0),
    ],
)
def test_rules_of_stop_bound_it_but_what_runs_goes_to_its_end(tmp_path, stop, secs):
    plan = plan_of(
        tmp_path,
        search_space={**SPACE, "learning_rate": {"grid_search": [*range(1, 11)]}},
        resources={"max_concurrent_trials": 2},
        stop=stop,
    )
    found = reckon(plan, like(plan, (2.0, 0.5)), "")
    assert found.is_most
    assert vars(found.accelerator_hours) == exactly(secs / 3600)
    assert vars(found.wall_secs) == exactly(secs / 2)


def test_pruning_leaves_the_most(tmp_path):
    rule = {"name": "async_hyperband", "grace_period": 5}
    plan = plan_of(tmp_path, scheduler=rule)
    found = reckon(plan, like(plan, (2.0, 0.5)), "")
    assert found.is_most
    assert vars(found.wall_secs) == exactly(48.0)


def test_what_a_search_proposes_later_is_like_what_it_begins_with(tmp_path):
    plan = plan_of(tmp_path, search_space=SPEC["search_space"], search=SPEC["search"])
    assert (len(plan.admitted), plan.proposed_later) == (2, 2)
    found = reckon(plan, like(plan, (2.0, 0.5)), "")
    assert found.trials == 4
    assert vars(found.wall_secs) == exactly(48.0)


def test_a_private_selection_runs_its_trials_one_after_the_other_and_keeps_one(tmp_path):
    policy = {"policy": "private_selection", "target_epsilon": 50.0, "target_delta": 1e-5}
    law = {"selection": {"distribution": "geometric", "mean": 6}}
    space = {**SPEC["search_space"], "learning_rate": {"uniform": [0.5, 4.0]}}
    plan = plan_of(
        tmp_path,
        privacy={**policy, **law},
        search_space=space,
        resources={"max_concurrent_trials": 4},
    )
    found = reckon(plan, like(plan, (2.0, 0.5)), "")
    assert (found.trials, found.concurrent) == (6, 1)
    assert vars(found.wall_secs) == exactly(6 * 12.0)
    # The best so far has two, and the trial under way two and one that is written.
    assert (found.checkpoint_bytes, found.most_checkpoint_bytes) == (1000, 5000)


def test_nothing_admitted_takes_nothing(tmp_path):
    plan = plan_of(tmp_path, privacy={**SPEC["privacy"], "target_epsilon": 0.01})
    assert reckon(plan, [], "").trials == 0


# -- out of the rows ------------------------------------------------------------------------------


def made_up(store, trial_id, steps, at, *, end, folder):
    """A trial that began and ended at some moments, with a report each time it had taken steps."""
    attempt = store.attempts.begin(trial_id, worker="node7:123")
    store.attempts.charge(attempt, branch(1), 20)
    for step in steps:
        done = TrialState.COMPLETED if step == 20 else None
        store.attempts.report(attempt, branch(1).branch_id, step, MEASURED, end=done)
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"0" * 700)
    begin, *moments = at
    with writing(store.ledger.engine) as connection:
        ours = attempts.c.trial_id == trial_id
        connection.execute(attempts.update().where(ours).values(started_at=begin, ended_at=end))
        for step, moment in zip(steps, moments, strict=True):
            this = (reports.c.trial_id == trial_id) & (reports.c.step == step)
            connection.execute(reports.update().where(this).values(reported_at=moment))
        connection.execute(
            checkpoints.insert().values(
                trial_id=trial_id, step=20, attempt=1, location=str(folder), written_at=end
            )
        )


def test_earlier_trials_tell_from_their_rows(tmp_path):
    _, sweep_id, store, home = submitted(**LISTED)
    first, second, third, _ = (row.trial_id for row in store.trials(sweep_id))
    made_up(store, first, (10, 20), (100.0, 104.0, 109.0), end=110.0, folder=tmp_path / "1")
    made_up(store, second, (20,), (0.0, 5.0), end=6.0, folder=tmp_path / "2")
    store.attempts.begin(third)  # still runs
    plan = plan_of(tmp_path)
    found = {one.config.learning_rate: one for one in earlier_trials(plan, store)}
    assert set(found) == {0.5, 1.0}
    # 5 s for 10 steps; of 10 s in all 20 steps took all.
    assert (found[0.5].step_secs, found[0.5].start_secs) == (0.5, 0.0)
    # One report does not tell steps from the rest.
    assert (found[1.0].step_secs, found[1.0].start_secs) == (0.3, 0.0)
    assert {one.checkpoint_bytes for one in found.values()} == {700}
    foreseen = forecast(plan, home)
    assert foreseen.origin == "from 2 earlier trials on node7"
    assert foreseen.wall_secs is not None
    assert foreseen.wall_secs.least == pytest.approx(4 * 20 * 0.3)
    assert foreseen.wall_secs.most == pytest.approx(4 * 20 * 0.5)
    # Two that a worker had at a time took half of it each, while both were there.
    with writing(store.ledger.engine) as connection:
        both = {"resources": {**store.sweep(sweep_id).spec["resources"], "trials_per_worker": 2}}
        spec = store.sweep(sweep_id).spec
        connection.execute(sweeps.update().values(spec={**spec, **both}))
        later = attempts.update().where(attempts.c.trial_id == second)
        connection.execute(later.values(started_at=104.0, ended_at=110.0))
        moment = reports.update().where(reports.c.trial_id == second)
        connection.execute(moment.values(reported_at=109.0))
    assert not earlier_trials(plan, store)
    packed = plan_of(tmp_path, resources=both["resources"])
    shared = {one.config.learning_rate: one for one in earlier_trials(packed, store)}
    assert shared[0.5].step_secs == pytest.approx(0.5 / 1.6)
    assert shared[1.0].step_secs == pytest.approx(0.3 / 2)
    with writing(store.ledger.engine) as connection:
        connection.execute(sweeps.update().values(spec=spec))
    # Workers that had other resources are no guide, nor are trials that branched off.
    wider = plan_of(tmp_path, resources={"cpus_per_trial": 2})
    assert not earlier_trials(wider, store)
    with writing(store.ledger.engine) as connection:
        forks = trials.update().where(trials.c.trial_id == first).values(parent_trial_id=second)
        connection.execute(forks)
    assert [one.config.learning_rate for one in earlier_trials(plan, store)] == [1.0]
    # Nobody reckons how long the trials of a private selection took.
    spec = store.sweep(sweep_id).spec
    spec["privacy"]["policy"] = "private_selection"
    with writing(store.ledger.engine) as connection:
        connection.execute(sweeps.update().values(spec=spec))
    assert not earlier_trials(plan, store)
    store.ledger.close()


def test_looking_at_no_ledger_creates_none(tmp_path):
    plan = plan_of(tmp_path)
    home = Home.from_environment()
    assert forecast(plan, home).wall_secs is None
    assert not (home.path / "ledger.db").exists()


def test_a_database_that_is_away_leaves_it_unknown(tmp_path, monkeypatch):
    plan = plan_of(tmp_path)
    monkeypatch.setenv("DP_SWEEPS_DATABASE_URL", "postgresql+psycopg://nobody@127.0.0.1:1/none")
    found = forecast(plan, Home.from_environment())
    assert found.wall_secs is None
    assert found.origin.startswith("unknown: ")
    assert "127.0.0.1" in found.origin


# -- measured here --------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_calibrated_on_random_data_and_nothing_is_written(tmp_path):
    batches = {"expected_batch_size": {"grid_search": [16, 32, 64]}}
    plan = plan_of(tmp_path, search_space={**SPEC["search_space"], **batches})
    home = Home.from_environment()
    before = sorted(home.path.rglob("*"))
    measured: list[None] = []
    found = forecast(plan, home, calibrated=True, on_trial=lambda: measured.append(None))
    assert len(measured) == 2, "the smallest batch and the largest"
    assert found.unknown_trials == 0
    assert found.wall_secs is not None
    assert 0 < found.wall_secs.least <= found.wall_secs.about <= found.wall_secs.most < math.inf
    assert found.checkpoint_bytes is not None
    # 64 weights and a bias for each of 10 classes, and what says whose they are.
    assert found.checkpoint_bytes > 3 * 650 * 4
    assert found.origin == "calibrated here on CPU with random data"
    assert sorted(home.path.rglob("*")) == before
