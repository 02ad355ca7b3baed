"""A branch that a ledger remembers can be gone on with though no checkpoint of it is left."""

import dataclasses
import functools
import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.trainer.killed_trial import CHILD, CONFIG, arrays, charges_of, fork, train
from trainer.config import ClippingConfig, DataConfig
from trainer.config_sections import MechanismConfig
from trainer.errors import ConfigError, OutOfMemory
from trainer.loop import run_trial
from trainer.mechanism.branch import Branch
from trainer.mechanism.keys import BranchKeys
from trainer.training import devices
from trainer.training.runners import ResidentRunner
from trainer.weights.checkpoint_writer import checkpoint_path, checkpoints_in

ROOT = Path(__file__).resolve().parents[2]
STEPS = CONFIG.iterations


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


class Killed(Exception):
    pass


def killed(folder, data_home, config=CONFIG, step=4, **more):
    """Runs a trial whose process ends when a step has been charged; gives its newest branch."""

    def on_charge(charged):
        if charged == step:
            raise Killed

    with pytest.raises(Killed):
        train(folder, data_home, config, on_charge=on_charge, **more)
    return charges_of(folder, config).branches[-1]


def undisturbed(folder, data_home, monkeypatch, root, run=train, *arguments):
    """The same trial from its beginning to its end with this root."""
    with monkeypatch.context() as known:
        known.setattr(devices, "BranchKeys", lambda: BranchKeys(root))
        return run(folder, data_home, *arguments)


def root_in(folder):
    (key,) = (folder / "secrets").iterdir()
    return key.read_bytes()


def assert_same(ours, theirs):
    """Two results are equal to the last bit."""
    assert ours.report == theirs.report
    first, second = arrays(ours.checkpoint), arrays(theirs.checkpoint)
    assert first == second
    assert first


@pytest.mark.slow
@pytest.mark.parametrize("forked", [False, True], ids=["from the start", "forked"])
def test_a_trial_killed_before_its_first_checkpoint_loses_nothing(
    data_home, tmp_path, monkeypatch, forked
):
    config, run, more = CONFIG, train, []
    if forked:
        killed(tmp_path / "parent", data_home, step=8)
        parent = checkpoint_path(tmp_path / "parent" / "checkpoints", 4)
        config, run, more = CHILD, functools.partial(fork, parent=parent), [parent]
    folder, first = tmp_path / "killed", 8 if forked else 4
    command = [sys.executable, "-m", "tests.trainer.killed_trial", folder, data_home, first, *more]
    process = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (folder / "checkpoints").exists()
    charges = charges_of(folder, config)
    (branch,) = charges.branches
    assert charges.iterations == 4
    root = root_in(folder)

    ours = run(folder, data_home)
    theirs = undisturbed(tmp_path / "calm", data_home, monkeypatch, root, run)
    assert_same(ours, theirs)
    assert charges_of(folder, config).branches == [branch]
    for name in (folder, tmp_path / "calm"):
        assert charges_of(name, config).iterations == STEPS - branch.start_step
    assert branch.start_step == 4 * forked
    assert not list((folder / "secrets").iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"mechanism": MechanismConfig(bands=4)},
        {"data": DataConfig(name="digits", placement="streamed")},
        {"sampling_prob": 1.0, "optimizer": "dp_adam_bc"},
        {"clipping": ClippingConfig(mode="quantile", engine="vmap", microbatch_size=32)},
    ],
    ids=["banded", "streamed", "full batch", "quantile"],
)
def test_every_kind_of_trial_restarts_on_its_branch(data_home, tmp_path, monkeypatch, change):
    config = dataclasses.replace(CONFIG, **change)
    branch = killed(tmp_path / "a", data_home, config)
    theirs = undisturbed(
        tmp_path / "b", data_home, monkeypatch, root_in(tmp_path / "a"), train, config
    )
    assert_same(train(tmp_path / "a", data_home, config), theirs)
    charges = charges_of(tmp_path / "a", config)
    assert (charges.branches, charges.iterations) == ([branch], STEPS)


def test_a_trial_whose_checkpoints_are_all_damaged_restarts_on_its_branch(
    data_home, tmp_path, monkeypatch
):
    branch = killed(tmp_path / "a", data_home, step=STEPS)
    found = checkpoints_in(tmp_path / "a" / "checkpoints")
    assert len(found) == 2
    for path in found:
        (path / "checkpoint.json").write_text("{")
    theirs = undisturbed(tmp_path / "b", data_home, monkeypatch, root_in(tmp_path / "a"))
    assert_same(train(tmp_path / "a", data_home), theirs)
    assert charges_of(tmp_path / "a").branches == [branch]


def test_a_branch_that_began_at_a_checkpoint_restarts_there(data_home, tmp_path):
    # Its own first checkpoint was never written; what it began with was another branch's.
    first = killed(tmp_path, data_home, step=8)
    for key in (tmp_path / "secrets").iterdir():
        key.unlink()
    second = killed(tmp_path, data_home, step=8)
    assert (first.start_step, second.start_step) == (0, 4)
    train(tmp_path, data_home)
    charges = charges_of(tmp_path)
    assert charges.branches == [first, second]
    assert charges.iterations == 8 + (STEPS - 4)


def lose_root(folder, monkeypatch):
    for key in (folder / "secrets").iterdir():
        key.unlink()


def change_program(folder, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")


def move_start(folder, monkeypatch):
    path = folder / "charges.json"
    body = json.loads(path.read_text())
    (entry,) = body["branches"].values()
    entry["start_step"] = 2
    body.pop("sha256")
    from trainer.alone.charges import _digest

    path.write_text(json.dumps({**body, "sha256": _digest(body)}))


@pytest.mark.parametrize("disturb", [lose_root, change_program, move_start])
def test_what_cannot_be_repeated_begins_another_branch(data_home, tmp_path, monkeypatch, disturb):
    branch = killed(tmp_path, data_home)
    disturb(tmp_path, monkeypatch)
    train(tmp_path, data_home)
    charges = charges_of(tmp_path)
    assert len(charges.branches) == 2
    taken = 2 if disturb is move_start else 4
    assert charges.iterations == taken + STEPS
    assert branch.branch_id == charges.branches[0].branch_id


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.25},
        {"seed": 1},
        {"l2_clip_norm": 2.0},
        {"data": DataConfig(name="digits", train_split="train[:1400]")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_neither_other_numbers_nor_other_data_share_a_branchs_noise(data_home, tmp_path, change):
    branch = killed(tmp_path, data_home)
    used = set()

    def charge(branch, step):
        used.add(branch.branch_id)
        return step

    run_trial(
        dataclasses.replace(CONFIG, **change),
        data_home=data_home,
        known_branches=[branch],
        secrets_dir=tmp_path / "secrets",
        charge=charge,
    )
    assert used
    assert branch.branch_id not in used


def test_other_initial_weights_share_no_noise(data_home, tmp_path):
    # The path is the same; what is in the file is not.
    weights = tmp_path / "weights.npz"
    arrays = {"head/kernel": np.zeros((64, 10), np.float32), "head/bias": np.zeros(10, np.float32)}
    np.savez(weights, **arrays)
    model = dataclasses.replace(CONFIG.model, init_from=str(weights), init_is_public=True)
    config = dataclasses.replace(CONFIG, model=model)
    branch = killed(tmp_path, data_home, config)
    np.savez(weights, **{**arrays, "head/bias": np.ones(10, np.float32)})
    train(tmp_path, data_home, config)
    first, second = charges_of(tmp_path, config).branches
    assert first == branch
    assert first.program == second.program
    assert first.origin != second.origin


def test_known_branches_need_a_ledger(data_home):
    with pytest.raises(ConfigError, match="known_branches without charge"):
        run_trial(CONFIG, data_home=data_home, known_branches=[Branch("0" * 16, 0)])


def limit_memory(monkeypatch, most):
    """Lets steps fail with more than so many units at a time."""
    real = ResidentRunner.advance

    def advance(self, recipe, state, *arguments, **more):
        if (recipe.microbatch_size or self.capacity) > most:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # donated, and lost
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(self, recipe, state, *arguments, **more)

    monkeypatch.setattr(ResidentRunner, "advance", advance)


def test_a_branch_keeps_the_microbatch_that_it_came_to(data_home, tmp_path, monkeypatch):
    asked = ClippingConfig(engine="vmap", microbatch_size=64)
    config = dataclasses.replace(CONFIG, clipping=asked)
    with monkeypatch.context() as short:
        limit_memory(short, 40)
        branch = killed(tmp_path, data_home, config)
    assert (branch.microbatch_size, branch.asked_microbatch_size) == (32, 64)

    # Less memory than it had: the branch cannot be gone on with, and nothing was charged.
    with monkeypatch.context() as shorter:
        limit_memory(shorter, 20)
        with pytest.raises(OutOfMemory, match="microbatch_size=32: allowed is a smaller") as full:
            train(tmp_path, data_home, config)
    assert full.value.microbatch_size == 32
    assert charges_of(tmp_path, config).iterations == 4

    # With more, it goes on as it was, and with a smaller one on another branch.
    killed(tmp_path, data_home, config, step=8)
    assert charges_of(tmp_path, config).branches == [branch]
    smaller = dataclasses.replace(config, clipping=dataclasses.replace(asked, microbatch_size=16))
    train(tmp_path, data_home, smaller)
    charges = charges_of(tmp_path, config)
    assert [each.microbatch_size for each in charges.branches] == [32, 16]
    assert [each.start_step for each in charges.branches] == [0, 4]
    assert charges.iterations == 8 + (STEPS - 4)
