"""What a trial that was interrupted goes on with, and when it has to begin another branch.

That it goes on bit for bit is in `test_resume_identity`.
"""

import dataclasses

import jax
import numpy as np
import pytest

from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import (
    AveragingConfig,
    EvaluationConfig,
    MechanismConfig,
)
from trainer.errors import CheckpointError, OutOfMemory, SecretError
from trainer.loop import run_trial, trial_reports
from trainer.mechanism.keys import BranchKeys
from trainer.training import devices
from trainer.trial import Trial
from trainer.weights.checkpoint_writer import checkpoint_path
from trainer.weights.checkpoints import read_manifest

STEPS = 24
CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="sgd",
    learning_rate=0.5,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=0.05,
    expected_batch_size=0.05 * 1437,
    iterations=STEPS,
    report_every_steps=5,
    target_delta=1e-5,
    averaging=AveragingConfig(ema_decay=0.9, polyak=True),
    # Of two that give other bits neither may be preferred because a machine is busy.
    clipping=ClippingConfig(engine="book_keeping"),
)
BANDED = MechanismConfig(bands=4)


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def interrupted(config, data_home, folder, reports=2):
    """Runs a trial up to some report, leaves it there, and returns its checkpoint."""
    running = trial_reports(
        config,
        data_home=data_home,
        checkpoint_dir=folder / "checkpoints",
        secrets_dir=folder / "secrets",
    )
    last = [next(running) for _ in range(reports)][-1]
    running.close()
    return checkpoint_path(folder / "checkpoints", last.step)


def branch_of(checkpoint):
    """The branch of a trial's first checkpoints."""
    branch = read_manifest(checkpoint).branch
    assert branch is not None
    assert branch.start_step == 0
    return branch


class Charges:
    """A ledger in memory."""

    def __init__(self):
        self.reached = {}

    def __call__(self, branch, step):
        before = self.reached.get(branch, branch.start_step)
        self.reached[branch] = max(before, step)
        return sum(step - branch.start_step for branch, step in self.reached.items())


def resumed(config, data_home, folder, checkpoint, charges, **more):
    return run_trial(
        config,
        data_home=data_home,
        checkpoint_dir=folder / "checkpoints",
        resume_from=checkpoint,
        secrets_dir=folder / "secrets",
        charge=charges,
        **more,
    )


def test_going_on_with_the_key_costs_nothing_twice(data_home, tmp_path):
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    charges = Charges()
    branch = branch_of(checkpoint)
    charges.reached[branch] = 17  # it had gone on, and lost what it had done since
    resumed(CONFIG, data_home, tmp_path, checkpoint, charges)
    assert charges.reached == {branch: STEPS}


def test_going_on_without_the_key_begins_a_branch_and_pays_for_it(data_home, tmp_path):
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    charges = Charges()
    old = branch_of(checkpoint)
    charges.reached[old] = 17
    for key in (tmp_path / "secrets").iterdir():
        key.unlink()
    result = resumed(CONFIG, data_home, tmp_path, checkpoint, charges)
    (new,) = charges.reached.keys() - {old}
    assert new.start_step == 10
    assert charges(new, STEPS) == 17 + STEPS - 10
    assert result.report.step == STEPS
    assert result.checkpoint is not None
    assert read_manifest(result.checkpoint).branch == new


@pytest.mark.parametrize(
    "change",
    [
        {"clipping": ClippingConfig(engine="vmap")},
        {"clipping": ClippingConfig(engine="book_keeping", microbatch_size=16)},
        {"data": DataConfig(name="digits", placement="streamed")},
        {"evaluation": EvaluationConfig(protection="dp", noise_multiplier=3.0)},
    ],
    ids=["engine", "microbatch", "placement", "evaluation"],
)
def test_noise_is_not_repeated_where_anything_differs(data_home, tmp_path, change):
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    charges = Charges()
    config = dataclasses.replace(CONFIG, **change)
    counts = lambda branch, step, counts: counts
    resumed(config, data_home, tmp_path, checkpoint, charges, charge_counts=counts)
    assert {branch.start_step for branch in charges.reached} == {10}


def test_what_a_configuration_leaves_open_is_the_branchs(data_home, tmp_path):
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    branch, charges = branch_of(checkpoint), Charges()
    config = dataclasses.replace(CONFIG, clipping=ClippingConfig())
    resumed(config, data_home, tmp_path, checkpoint, charges)
    assert charges.reached == {branch: STEPS}


def test_another_program_begins_a_branch(data_home, tmp_path, monkeypatch):
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    charges = Charges()
    resumed(CONFIG, data_home, tmp_path, checkpoint, charges)
    assert {branch.start_step for branch in charges.reached} == {10}


def test_correlated_noise_cannot_be_gone_on_with_without_its_key(data_home, tmp_path):
    config = dataclasses.replace(CONFIG, mechanism=BANDED)
    checkpoint = interrupted(config, data_home, tmp_path)
    with pytest.raises(CheckpointError, match="correlated"):
        resumed(config, data_home, tmp_path / "elsewhere", checkpoint, Charges())


def test_a_trial_that_ended_leaves_no_key(data_home, tmp_path):
    interrupted(CONFIG, data_home, tmp_path)
    (key,) = (tmp_path / "secrets").iterdir()
    assert key.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    resumed(CONFIG, data_home, tmp_path, tmp_path / "checkpoints" / "step-00000010", Charges())
    assert not list((tmp_path / "secrets").iterdir())


def test_a_damaged_key_is_refused(data_home, tmp_path):
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    (key,) = (tmp_path / "secrets").iterdir()
    key.write_bytes(bytes(32))
    with pytest.raises(SecretError, match="damaged"):
        resumed(CONFIG, data_home, tmp_path, checkpoint, Charges())


def test_no_secret_is_in_a_checkpoint(data_home, tmp_path, monkeypatch):
    root = bytes(range(32))
    monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(root))
    config = dataclasses.replace(CONFIG, mechanism=BANDED)
    checkpoint = interrupted(config, data_home, tmp_path)
    keys = BranchKeys(root)
    secrets = [root, *(keys.noise_keys([step])[0].tobytes() for step in range(1, STEPS + 1))]
    trial = Trial(config, data_home, devices.topology(1))
    at = trial.start(checkpoint, tmp_path / "secrets")
    remembered = [np.asarray(leaf) for leaf in jax.tree.leaves(at.state.noise)]
    assert all(np.any(leaf) for leaf in remembered)
    secrets += [leaf.tobytes()[:64] for leaf in remembered]
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    contents = b"".join(path.read_bytes() for path in files)
    assert not any(secret in contents or secret.hex().encode() in contents for secret in secrets)


def test_memory_too_short_for_a_branchs_microbatch_is_an_error(data_home, tmp_path, monkeypatch):
    # With another one rounding would differ, and the same noise hide something else.
    checkpoint = interrupted(CONFIG, data_home, tmp_path)
    trial = Trial(CONFIG, data_home, devices.topology(1))
    at = trial.start(checkpoint, tmp_path / "secrets")

    def full(*arguments, **more):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(trial.runner, "advance", full)
    with pytest.raises(OutOfMemory, match="another branch") as refused:
        trial.advance(at, STEPS, lambda step: None)
    assert refused.value.microbatch_size == trial.runner.capacity
