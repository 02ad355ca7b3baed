"""A trial that begins with another one's checkpoint, and what it says that this has cost."""

import dataclasses
import hashlib
import json
import logging
import shutil

import numpy as np
import pytest

import accounting
from tests.trainer.killed_trial import (
    CHILD,
    CONFIG,
    FORKED_AT,
    SPENT_BEFORE,
    arrays,
    charges_of,
    fork,
    train,
)
from trainer.config import ClippingConfig
from trainer.config_sections import AveragingConfig, EvaluationConfig, MechanismConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.loop import run_trial, trial_reports
from trainer.mechanism.keys import BranchKeys
from trainer.training import devices
from trainer.training.plan import mechanism_of
from trainer.weights.checkpoint_writer import checkpoint_path
from trainer.weights.checkpoints import read_manifest
from trainer.weights.weight_files import read_arrays

STEPS = CONFIG.iterations


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def begun(config, data_home, folder):
    """A trial that was left at the step to fork at; its checkpoint."""
    running = trial_reports(
        config,
        data_home=data_home,
        checkpoint_dir=folder / "checkpoints",
        secrets_dir=folder / "secrets",
    )
    next(running)
    running.close()
    return checkpoint_path(folder / "checkpoints", FORKED_AT)


@pytest.fixture(scope="module")
def parent(data_home, tmp_path_factory):
    return begun(CONFIG, data_home, tmp_path_factory.mktemp("parent"))


def contents(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).digest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def values(checkpoint, part):
    return dict(read_arrays(checkpoint / part, "orbax"))


def epsilon_of(*mechanisms):
    parts = {}
    for mechanism in mechanisms:
        parts[mechanism.step] = parts.get(mechanism.step, 0) + mechanism.repetitions
    return accounting.epsilon_of_list(parts, delta=1e-5, accountant="rdp")


@pytest.mark.parametrize("clipping", ["flat", "quantile"])
def test_a_fork_that_changes_nothing_is_the_trial_going_on_with_other_noise(
    data_home, tmp_path, monkeypatch, clipping
):
    config = dataclasses.replace(
        CONFIG,
        clipping=ClippingConfig(mode=clipping, engine="vmap"),
        averaging=AveragingConfig(ema_decay=0.9, polyak=True),
    )
    parent = begun(config, data_home, tmp_path / "parent")
    before = contents(tmp_path / "parent")
    # The same new noise for both, so that nothing else can differ.
    monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(bytes(32)))
    gone_on = run_trial(
        config,
        data_home=data_home,
        checkpoint_dir=tmp_path / "gone_on",
        resume_from=parent,
        charge=lambda branch, step: FORKED_AT + step - branch.start_step,
    )
    reports = []
    forked = fork(tmp_path, data_home, parent, config, on_report=reports.append)
    assert forked.report == gone_on.report  # the composed epsilon, too
    assert forked.checkpoint is not None
    assert arrays(forked.checkpoint) == arrays(gone_on.checkpoint)
    assert [report.step for report in reports] == [8, 12]
    assert contents(tmp_path / "parent") == before
    (branch,) = charges_of(tmp_path, config).branches
    assert branch.start_step == FORKED_AT
    assert charges_of(tmp_path, config).iterations == STEPS - FORKED_AT


def test_a_fork_has_noise_of_its_own_though_the_parents_root_is_at_hand(
    data_home, tmp_path, parent
):
    branches = set()
    for secrets in (parent.parent.parent / "secrets", None):
        run_trial(
            CONFIG,
            data_home=data_home,
            fork_from=parent,
            spent_before=SPENT_BEFORE,
            secrets_dir=secrets,
            charge=lambda branch, step: branches.add(branch.branch_id) or step,
        )
    manifest = read_manifest(parent)
    assert manifest.branch is not None
    assert len(branches - {manifest.branch.branch_id}) == 2


def test_epsilon_is_that_of_the_prefix_and_of_its_own_steps(data_home, tmp_path, parent):
    reports = []
    fork(tmp_path, data_home, parent, on_report=reports.append)
    for report in reports:
        own = mechanism_of(CHILD).after(report.step - FORKED_AT)
        assert report.epsilon == epsilon_of(*SPENT_BEFORE, own)
        assert report.epsilon > epsilon_of(own)
        assert report.epsilon > epsilon_of(*SPENT_BEFORE)


def test_a_forked_trial_that_was_killed_goes_on_from_its_own_checkpoint(
    data_home, tmp_path, monkeypatch, parent
):
    class Killed(Exception):
        pass

    def kill(step):
        if step == STEPS:
            raise Killed

    with pytest.raises(Killed):
        fork(tmp_path / "a", data_home, parent, on_charge=kill)
    (key,) = (tmp_path / "a" / "secrets").iterdir()
    root = key.read_bytes()
    # What was spent before must be said again.
    with pytest.raises(CheckpointError, match=r"allowed is spent_before with at least"):
        train(tmp_path / "a", data_home, CHILD)
    ours = fork(tmp_path / "a", data_home, parent)
    monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(root))
    theirs = fork(tmp_path / "b", data_home, parent)
    assert ours.report == theirs.report
    assert arrays(ours.checkpoint) == arrays(theirs.checkpoint)
    assert charges_of(tmp_path / "a", CHILD).iterations == STEPS - FORKED_AT
    assert len(charges_of(tmp_path / "a", CHILD).branches) == 1


def test_what_means_something_else_begins_afresh(data_home, tmp_path, parent, caplog):
    caplog.set_level(logging.INFO, "trainer")
    config = dataclasses.replace(
        CHILD,
        optimizer="adam",
        averaging=AveragingConfig(polyak=True, ema_decay=0.9),
        l2_clip_norm=0.5,
        iterations=FORKED_AT + 1,
    )
    result = fork(tmp_path, data_home, parent, config)
    assert f"forked at step {FORKED_AT} from {parent}" in caplog.text
    assert "fresh: optimizer state, averages" in caplog.text
    assert result.report.l2_clip_norm == 0.5
    assert result.checkpoint is not None
    # One step into averages that began here, the mean of all iterates is the iterate.
    params = values(result.checkpoint, "params")
    averages = values(result.checkpoint, "averages")
    assert len(averages) == 2 * len(params)
    sizes = {array.size: array for array in params.values()}
    close = [np.allclose(each, sizes[each.size], atol=1e-6) for each in averages.values()]
    assert sum(close) == len(params)
    # Adam's count of steps.
    counts = [array for array in values(result.checkpoint, "opt_state").values() if not array.ndim]
    assert [int(count) for count in counts] == [1]


def test_averages_that_began_at_a_fork_are_resumed_as_such(
    data_home, tmp_path, monkeypatch, parent
):
    config = dataclasses.replace(CHILD, averaging=AveragingConfig(ema_decay=0.9, polyak=True))
    monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(bytes(32)))
    whole = fork(tmp_path / "whole", data_home, parent, config)
    running = trial_reports(
        config,
        data_home=data_home,
        checkpoint_dir=tmp_path / "parts" / "checkpoints",
        fork_from=parent,
        spent_before=SPENT_BEFORE,
        secrets_dir=tmp_path / "parts" / "secrets",
        charge=charges_of(tmp_path / "parts", config).charge,
    )
    next(running)
    running.close()
    parts = fork(tmp_path / "parts", data_home, parent, config)
    assert whole.checkpoint is not None
    assert read_manifest(whole.checkpoint).averages_start == FORKED_AT
    assert arrays(parts.checkpoint) == arrays(whole.checkpoint)


def test_parameters_that_are_not_trained_are_the_parents(data_home, tmp_path):
    mlp = dataclasses.replace(CONFIG.model, name="mlp", hidden_sizes=(6,))
    parent = begun(dataclasses.replace(CONFIG, model=mlp), data_home, tmp_path / "parent")
    head = dataclasses.replace(mlp, trainable="head")
    result = fork(tmp_path / "child", data_home, parent, dataclasses.replace(CHILD, model=head))
    assert result.checkpoint is not None
    before, after = values(parent, "params"), values(result.checkpoint, "params")
    assert before.keys() == after.keys()
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {name for name in before if "head" not in name}
    assert same
    # Averages and momentum were those of all parameters.
    assert read_manifest(result.checkpoint).averages_start == FORKED_AT


@pytest.mark.parametrize("other", ["to quantile", "from quantile"])
def test_a_clip_norm_is_taken_over_where_both_move_it(data_home, tmp_path, other):
    quantile = ClippingConfig(mode="quantile", engine="vmap")
    theirs, ours = (CONFIG.clipping, quantile)[:: 1 if other == "to quantile" else -1]
    parent = begun(dataclasses.replace(CONFIG, clipping=theirs), data_home, tmp_path / "parent")
    config = dataclasses.replace(CHILD, clipping=ours, l2_clip_norm=0.25, iterations=FORKED_AT + 1)
    report = fork(tmp_path / "child", data_home, parent, config).report
    # A step moves it by at most eta_C = 0.2 times a fraction, plus noise.
    assert report.l2_clip_norm == pytest.approx(0.25, rel=0.5 if other == "to quantile" else 0)


def refused(data_home, parent, **changes):
    arguments = {
        "fork_from": parent,
        "spent_before": SPENT_BEFORE,
        "charge": lambda branch, step: step,
        "config": CHILD,
        **changes,
    }
    config = arguments.pop("config")
    run_trial(config, data_home=data_home, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"charge": None}, "fork_from without charge"),
        ({"spent_before": ()}, r"spent_before=\(\): allowed with fork_from"),
        (
            {"config": dataclasses.replace(CHILD, mechanism=MechanismConfig(bands=2))},
            "mechanism.bands=2: allowed with fork_from is 1, for noise that is correlated",
        ),
        (
            {"config": dataclasses.replace(CHILD, iterations=FORKED_AT)},
            f"iterations={FORKED_AT}: allowed with fork_from is more than",
        ),
        (
            {
                "config": dataclasses.replace(
                    CHILD, evaluation=EvaluationConfig(protection="dp", noise_multiplier=9.0)
                )
            },
            "fork_from without charge_counts",
        ),
        (
            {
                "spent_before": [
                    accounting.DpSgdMechanism(
                        noise_multiplier=2.0, sampling_prob=0.05, iterations=4
                    )
                ]
            },
            r"spent_before\[0\].neighboring_relation='add_or_remove_one': allowed is the trial's",
        ),
        ({"spent_before": ["a lot"]}, r"spent_before\[0\]='a lot': allowed is an accounting"),
        (
            {
                "spent_before": [
                    accounting.TruncatedDpSgdMechanism(
                        noise_multiplier=2.0,
                        sampling_prob=0.05,
                        iterations=4,
                        num_examples=1437,
                        truncated_batch_size=110,
                    )
                ]
            },
            "accountant='rdp': allowed is pld",
        ),
    ],
    ids=["charge", "spent", "banded", "end", "counts", "relation", "type", "accountant"],
)
def test_what_cannot_be_accounted_for_is_refused(data_home, parent, changes, message):
    with pytest.raises(ConfigError, match=message):
        refused(data_home, parent, **changes)


def test_another_model_is_refused(data_home, parent):
    config = dataclasses.replace(CHILD, model=dataclasses.replace(CONFIG.model, name="mlp"))
    with pytest.raises(CheckpointError, match="of another model or data set"):
        refused(data_home, parent, config=config)


def test_another_data_set_is_refused(data_home, tmp_path, parent):
    elsewhere = shutil.copytree(parent, tmp_path / parent.name)
    file = elsewhere / "checkpoint.json"
    fingerprint = read_manifest(parent).dataset_fingerprint
    file.write_text(file.read_text().replace(fingerprint, "0" * 32))
    with pytest.raises(CheckpointError, match="of another model or data set"):
        refused(data_home, elsewhere)


def test_a_fork_of_a_fork_says_what_both_have_cost(data_home, tmp_path, parent):
    child = fork(tmp_path / "child", data_home, parent)
    own = mechanism_of(CHILD).after(STEPS - FORKED_AT)
    grandchild = dataclasses.replace(CHILD, iterations=STEPS + 2, optimizer="sgd")
    with pytest.raises(CheckpointError, match="at least that"):
        refused(data_home, child.checkpoint, config=grandchild, spent_before=[own])
    result = run_trial(
        grandchild,
        data_home=data_home,
        fork_from=child.checkpoint,
        spent_before=[*SPENT_BEFORE, own],
        charge=lambda branch, step: step - branch.start_step,
    )
    assert result.report.epsilon == epsilon_of(*SPENT_BEFORE, mechanism_of(CHILD).after(STEPS - 2))


def test_a_checkpoint_that_does_not_say_what_it_holds_gives_its_parameters(
    data_home, tmp_path, parent
):
    # As older ones do.
    older = shutil.copytree(parent, tmp_path / parent.name)
    file = older / "checkpoint.json"
    body = json.loads(file.read_text())
    for name in ("parts", "averages_start", "spent_before", "branch"):
        del body[name]
    body |= {"format": 3, "branch_id": "0" * 16, "branch_start": 0}
    body |= {"program": "p", "engine": ["vmap", None]}
    file.write_text(json.dumps(body))
    result = fork(tmp_path / "child", data_home, older)
    assert result.checkpoint is not None
    assert read_manifest(result.checkpoint).averages_start == FORKED_AT
