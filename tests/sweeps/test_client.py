"""The notebook's client without Ray: what it decides, reads, asks and refuses."""

import numpy as np
import pytest
import yaml

from sweeps.client import Client
from sweeps.client.progress import text_progress
from sweeps.database.states import Wish
from sweeps.errors import CommandError, SpecError, StoreError, SweepError
from tests.sweeps.cli.spec_files import write
from tests.sweeps.fork_parents import pretend
from tests.sweeps.test_proposals import SPEC, submitted

GRID = {**SPEC["search_space"], "learning_rate": {"grid_search": [0.5, 1.0, 2.0]}}
LISTED = {**SPEC, "search": {}, "search_space": GRID}


@pytest.fixture
def client():
    with Client() as client:
        yield client


@pytest.fixture
def swept(client):
    """A sweep of three trials: one was pruned, one has come further, one waits."""
    _, sweep_id, store, _ = submitted(search={}, search_space=GRID)
    first, second, _ = (row.trial_id for row in store.trials(sweep_id))
    pretend(store, first, 5, 10)
    pretend(store, second, 5, 10, 15, state=None)
    store.ledger.close()
    return client.sweep(sweep_id)


def test_a_mapping_is_decided_as_its_file(client, tmp_path):
    path = write(tmp_path)
    from_file = client.check(str(path))
    from_text = client.check(yaml.safe_load(path.read_text()))
    assert from_file.to_json() == from_text.to_json()
    assert from_file.trials["decision"].tolist() == ["admitted", "rejected"]
    assert from_file.trials["expected_batch_size"].tolist() == [32.0, 512.0]
    assert from_file.trials["epsilon"].dtype == float


def test_a_mapping_is_refused_in_the_same_words(client):
    with pytest.raises(SpecError) as refused:
        client.check({**LISTED, "privacy": {**SPEC["privacy"], "target_epsilon": float("nan")}})
    (problem,) = refused.value.problems
    assert problem.key_path == "privacy.target_epsilon"
    assert (problem.source, problem.line) == (None, None)
    with pytest.raises(SpecError, match=r"^seeed: unknown key \(did you mean seed\?\)"):
        client.check({**LISTED, "seeed": 1})


def test_what_yaml_could_not_have_said_is_refused_by_name(client):
    space = {**GRID, "iterations": np.int64(20)}
    with pytest.raises(SpecError, match=r"search_space.iterations: .*of type int64 is not allow"):
        client.check({**LISTED, "search_space": space})
    with pytest.raises(SpecError, match=r"^data: 1 of type int is not allowed"):
        client.check({**LISTED, "data": {1: "digits"}})


def test_looking_at_nothing_creates_nothing(client, tmp_path):
    nowhere = Client(tmp_path / "elsewhere")
    for look in (nowhere.sweeps, nowhere.sweep, nowhere.results, nowhere.budgets, nowhere.sync):
        with pytest.raises(StoreError, match="no ledger at"):
            look()
    nowhere.check(LISTED)
    assert not (tmp_path / "elsewhere").exists()


def test_a_team_needs_a_budget(client):
    with pytest.raises(CommandError, match="team='vision': allowed with budget"):
        client.check(LISTED, team="vision")


def test_tables_have_their_columns_before_there_is_anything(client):
    _, sweep_id, store, _ = submitted(search={}, search_space=GRID)
    store.ledger.close()
    results = client.results(sweep_id)
    assert len(results.trials) == 3
    assert results.trials["eval_accuracy"].isna().all()
    assert (len(results.reports), len(results.frontier)) == (0, 0)
    assert list(results.frontier.columns) == ["epsilon", "eval_accuracy", "trial_id", "step"]
    assert results.figure().data


def test_results_are_what_the_command_prints(client, swept):
    results = swept.results()
    document = results.to_json()
    assert results.trials["trial_id"].tolist() == [one["trial_id"] for one in document["trials"]]
    assert results.reports.groupby("number")["step"].apply(list).to_dict() == {
        0: [5, 10],
        1: [5, 10, 15],
    }
    assert results.guarantee == document["guarantee"]
    assert "Each trial on its own" in results._repr_html_()
    assert client.sweeps()["sweep_id"].tolist() == [swept.sweep_id]


def test_repeats_of_a_configuration_are_one_row(client):
    search = {"num_samples": 1, "repeats": 2}
    assert client.check({**LISTED, "search": search}).trials["repeat"].tolist() == [0, 1] * 3
    _, sweep_id, store, _ = submitted(search=search, search_space=GRID)
    first, second, *_ = (row.trial_id for row in store.trials(sweep_id))
    pretend(store, first, 5, 10)
    pretend(store, second, 5, 10)
    store.ledger.close()
    results = client.results(sweep_id)
    assert results.trials["repeat_of"].dropna().tolist()[0] == first
    best = results.configurations.iloc[0]
    assert sorted(best["trial_ids"]) == [first, second]
    assert best["eval_accuracy_mean"] == results.trials["eval_accuracy"].iloc[:2].mean()
    assert best["learning_rate"] == 0.5
    assert results.configurations["eval_accuracy_std"].tolist()[0] == 0.0
    assert len(results.configurations) == 3


def test_what_is_asked_of_a_sweep_is_written_down(client, swept):
    assert swept.state == "RUNNING"
    swept.pause()
    assert swept.state == "PAUSED"
    with pytest.raises(StoreError, match="is PAUSED"):
        swept.stop()
    swept.cancel(2)
    with pytest.raises(StoreError, match="is CANCELLED already"):
        swept.cancel(2)
    swept.cancel()
    assert swept.state == "CANCELLED"
    assert swept.status().wish == Wish.NONE


def test_a_dry_run_of_going_on_changes_nothing(client, swept):
    (decision,) = swept.resume(top=1, dry_run=True)
    assert (decision.step, decision.iterations, decision.admitted) == (10, 20, True)
    fork = swept.fork(0, {"learning_rate": 4.0}, iterations=40, dry_run=True)
    assert (fork.parent_step, fork.new_iterations, fork.admitted) == (10, 30, True)
    assert len(swept.results().trials) == 3
    with pytest.raises(CommandError, match="dry_run: allowed with trials, top or pruned"):
        swept.resume(dry_run=True)
    with pytest.raises(CommandError, match="allowed is at least one"):
        swept.fork(0)
    with pytest.raises(SpecError, match="learning_rat: unknown key"):
        swept.fork(0, {"learning_rat": 4.0})
    with pytest.raises(StoreError, match="'9': not in sweep"):
        swept.logs(9)
    assert swept.logs(0) == ""


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_that_cannot_start_says_why(client):
    _, sweep_id, store, _ = submitted(**LISTED, resources={"gpus_per_trial": 64})
    store.ledger.close()
    sweep = client.sweep(sweep_id)
    sweep.drive()
    with pytest.raises(SweepError, match=r"a trial asks for 1 CPU and 64 GPU on one node.* goes"):
        sweep.wait(progress=False)
    assert sweep.state == "RUNNING", "nothing is lost"


def test_a_line_says_how_far_it_is(client, swept, capsys):
    show = text_progress(swept.sweep_id, client.sweep()._store)
    show()
    show()
    said = capsys.readouterr().err
    assert said.count("\r") == 1, "nothing has changed"
    assert f"{swept.sweep_id}: 1 of 3 trials ended, 1 running; best 50.00% at" in said
    swept.cancel()
    show()
    assert "3 of 3 trials ended" in capsys.readouterr().err


def test_a_second_budget_on_the_same_data_is_a_warning(client):
    terms = {"spec": LISTED, "policy": "open", "epsilon": 8.0}
    first = client.create_budget("a", **terms)
    assert first.terms.policy == "open"
    with pytest.warns(UserWarning, match="the same data is protected by a"):
        client.create_budget("b", **terms)
    assert client.budgets()["name"].tolist() == ["b", "a"]
    assert client.budget("a").level.spent == 0
    open_spec = {**LISTED, "privacy": {**SPEC["privacy"], "policy": "open", "target_epsilon": 8.0}}
    room = client.room("a", open_spec)
    assert room is not None
    assert room.whole_fits
    with pytest.raises(CommandError, match="exists already, with other terms"):
        client.create_budget("a", **{**terms, "epsilon": 4.0})
