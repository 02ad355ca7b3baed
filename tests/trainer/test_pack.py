"""Trials that take their steps together come out as each would alone."""

import dataclasses
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.killed_trial import CONFIG, arrays, charges_of
from tests.trainer.packed_trials import CONFIGS, drive, going, train
from trainer.config import ClippingConfig, DataConfig, ModelConfig
from trainer.config_sections import (
    AugmentationConfig,
    AveragingConfig,
    EvaluationConfig,
    MechanismConfig,
)
from trainer.errors import PackTooLarge
from trainer.loop import run_trial
from trainer.mechanism import sampling
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.noise import add_noise
from trainer.pack import Pack
from trainer.reporting import TrialReport
from trainer.training import devices, packed
from trainer.training.resident import Draw
from trainer.weights.checkpoint_writer import checkpoints_in
from trainer.weights.checkpoints import first_readable
from trainer.weights.weight_files import read_arrays

pytestmark = pytest.mark.slow

ROOTS = [bytes([number]) * 32 for number in range(8)]
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def known_roots(monkeypatch):
    """Trials get the same keys again, in the order in which they begin."""

    def begin_again():
        roots = iter(ROOTS)
        monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(next(roots)))

    begin_again()
    return begin_again


def last_checkpoint(folder):
    found = first_readable(checkpoints_in(folder / "checkpoints")).path
    assert found is not None
    return found


def last_arrays(folder, number):
    return arrays(last_checkpoint(folder / str(number)))


# --- Equal to alone --------------------------------------------------------------------------


def test_draws_and_noise_are_those_of_a_trial_alone_to_the_bit():
    keys = np.concatenate([BranchKeys(root).draw_keys([1]) for root in ROOTS])
    step, largest_bits = jnp.int32(1), jnp.uint32(2**30)
    for draw in (Draw(101, 40), Draw(101, 40, truncated_batch_size=20)):
        chosen = jax.jit(lambda key, draw=draw: draw.chosen(key, step, None, largest_bits))
        together = jax.jit(jax.vmap(chosen))(keys)
        np.testing.assert_array_equal(together, [chosen(key) for key in keys])
        assert len({row.tobytes() for row in np.asarray(together)}) == len(keys)

    def noise(key, stddev):
        zeros = {"w": jnp.zeros((7, 3)), "b": jnp.zeros(3)}
        return add_noise(zeros, (), key_data=key, stddev=stddev)[0]

    stddevs = np.linspace(0.5, 2.0, len(keys), dtype=np.float32)
    together = jax.jit(jax.vmap(noise))(keys, stddevs)
    for number, (key, stddev) in enumerate(zip(keys, stddevs, strict=True)):
        alone = jax.jit(noise)(key, stddev)
        jax.tree.map(
            lambda all, one, n=number: np.testing.assert_array_equal(all[n], one), together, alone
        )


SHAPES = {
    "nesterov with an average, book-keeping": {
        "optimizer": "nesterov",
        "averaging": AveragingConfig(ema_decay=0.9),
        "clipping": ClippingConfig(engine="book_keeping"),
    },
    "adam, quantile clipping, noisy counts": {
        "optimizer": "adam",
        "clipping": ClippingConfig(engine="book_keeping", mode="quantile"),
        "evaluation": EvaluationConfig(protection="dp", noise_multiplier=5.0),
    },
    "microbatches in two passes": {
        "optimizer": "dp_adam_bc",
        "clipping": ClippingConfig(engine="two_pass", microbatch_size=32),
    },
    "a convolutional network, two views of an example": {
        "model": ModelConfig(name="cnn", channels=(2,)),
        "augmentation": AugmentationConfig(views=2, crop_padding=1),
        "averaging": AveragingConfig(),
        "iterations": 4,
        "report_every_steps": 4,
    },
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_each_ends_as_it_would_alone(tmp_path, data_home, known_roots, changes):
    configs = [dataclasses.replace(config, **changes) for config in CONFIGS]
    found = train(tmp_path, data_home, configs, width=3)
    known_roots()
    assert_as_alone(tmp_path, data_home, configs, found)


def assert_as_alone(folder, data_home, configs, found):
    """Runs some trials one after another and compares."""
    for number, config in enumerate(configs):
        alone, reports = folder / f"alone-{number}", []
        run_trial(
            config,
            data_home=data_home,
            checkpoint_dir=alone / "checkpoints",
            on_report=reports.append,
        )
        assert_alike(found[number], reports)
        assert_close(folder / str(number), alone)


def assert_alike(found, wanted):
    assert [report.step for report in found] == [report.step for report in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.epsilon, ours.eval_epsilon) == (theirs.epsilon, theirs.eval_epsilon)
        assert ours.outcome == theirs.outcome
        assert ours.l2_clip_norm == pytest.approx(theirs.l2_clip_norm, rel=64 * EPS)
        for name in ("eval_accuracy", "polyak_eval_accuracy", "ema_eval_accuracy"):
            assert getattr(ours, name) == getattr(theirs, name)  # no example is near a tie


def assert_close(ours, theirs):
    """A dozen steps sum a hundred numbers of order 1 each, in any order.

    An error of a few eps of the largest parameter goes on from step to step.
    """
    for part in ("params", "opt_state"):
        pair = [dict(read_arrays(last_checkpoint(f) / part, "orbax")) for f in (ours, theirs)]
        assert pair[0].keys() == pair[1].keys()
        for name, value in pair[0].items():
            scale = max(1.0, float(np.abs(pair[1][name]).max()))
            np.testing.assert_allclose(
                value, pair[1][name], rtol=0, atol=128 * EPS * scale, err_msg=name
            )


def test_a_batch_beyond_a_row_takes_another_as_it_does_alone(
    tmp_path, data_home, known_roots, monkeypatch
):
    monkeypatch.setattr(sampling, "_OVERFLOW_PROB", 0.9)  # most batches want two
    found = train(tmp_path, data_home, CONFIGS[:2])
    known_roots()
    assert_as_alone(tmp_path, data_home, CONFIGS[:2], found)


# --- Apart -------------------------------------------------------------------------------------


class Refused(Exception):
    pass


def test_what_becomes_of_one_changes_no_bit_of_the_others(tmp_path, data_home, known_roots):
    reported = train(tmp_path / "calm", data_home)
    want = {number: last_arrays(tmp_path / "calm", number) for number in (0, 2)}

    def refuse(step):
        if step == 6:
            raise Refused

    def stop(step):
        if step > 6:
            raise Refused

    diverging = dataclasses.replace(CONFIGS[1], learning_rate=3e38)
    cases: Any = (
        ("refused", CONFIGS, {"on_charge": refuse}),
        ("stopped", CONFIGS, {"on_step": stop}),
        ("diverged", (CONFIGS[0], diverging, CONFIGS[2]), {}),
    )
    for name, configs, of_second in cases:
        known_roots()
        found = train(tmp_path / name, data_home, configs, **of_second)
        if name == "diverged":
            assert found[1][-1].outcome == "diverged"
        else:
            assert isinstance(found[1][-1], Refused)
            assert [report.step for report in found[1][:-1]] == (
                [3] if name == "refused" else [3, 6]
            )
        for number in want:
            assert found[number] == reported[number]
            assert last_arrays(tmp_path / name, number) == want[number]


def test_each_charges_by_itself_before_it_reports(tmp_path, data_home):
    told = []
    pack = Pack(2)
    running = {
        number: going(
            pack,
            tmp_path / str(number),
            data_home,
            config,
            on_charge=lambda step, number=number: told.append(("charged", number, step)),
        )
        for number, config in enumerate(CONFIGS[:2])
    }
    for number, report in drive(pack, running):
        assert isinstance(report, TrialReport)
        assert told[-2:].count(("charged", number, report.step)) == 1
        told.append(("reported", number, report.step))
    for number, config in enumerate(CONFIGS[:2]):
        assert charges_of(tmp_path / str(number), config).iterations == config.iterations
        mine = [(what, step) for what, of, step in told if of == number]
        assert mine[::2] == [("charged", step) for _, step in mine[1::2]]


def test_one_may_join_when_others_are_under_way(tmp_path, data_home, known_roots):
    pack = Pack(2)
    first = going(pack, tmp_path / "0", data_home, CONFIGS[0])
    _, begun = next(drive(pack, {0: first}))
    second = going(pack, tmp_path / "1", data_home, CONFIGS[1])
    found = {0: [begun], 1: []}
    for number, report in drive(pack, {0: first, 1: second}):
        found[number].append(report)
    known_roots()
    assert_as_alone(tmp_path, data_home, CONFIGS[:2], found)


def test_shapes_that_differ_take_their_steps_by_programs_of_their_own(tmp_path, data_home):
    configs = [CONFIG, dataclasses.replace(CONFIG, optimizer="adam"), CONFIGS[1]]
    found = train(tmp_path, data_home, configs)
    assert [reports[-1].outcome for reports in found.values()] == ["completed"] * 3


def test_what_cannot_be_packed_runs_alone(tmp_path, data_home, known_roots, monkeypatch):
    configs = (
        dataclasses.replace(CONFIG, data=DataConfig(name="digits", placement="streamed")),
        dataclasses.replace(CONFIG, mechanism=MechanismConfig(bands=2)),
        CONFIG,
    )

    def refuse(*_):
        raise AssertionError("nobody waits")

    monkeypatch.setattr(Pack, "run", refuse)
    # For the last there is no lane.
    for config, width in zip(configs, (2, 2, 0), strict=True):
        known_roots()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(folder, data_home, [config], width)
        known_roots()
        run_trial(config, data_home=data_home, checkpoint_dir=folder / "alone" / "checkpoints")
        assert last_arrays(folder, 0) == arrays(last_checkpoint(folder / "alone"))


def test_too_little_memory_is_told_to_all_and_costs_nothing(tmp_path, data_home, monkeypatch):
    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: made up")

    with monkeypatch.context() as patch:
        patch.setattr(packed, "make_resident_program", lambda *_, **__: too_large)
        found = train(tmp_path, data_home)
    for number, reports in found.items():
        assert [type(each) for each in reports] == [PackTooLarge]
        assert charges_of(tmp_path / str(number), CONFIGS[number]).iterations == 0
    assert [each[-1].outcome for each in train(tmp_path, data_home, width=0).values()] == [
        "completed"
    ] * 3


# --- Taken up again ----------------------------------------------------------------------------


def test_a_killed_pack_goes_on_bit_for_bit_and_costs_nothing(tmp_path, data_home, monkeypatch):
    folder = tmp_path / "killed"
    command = ["-m", "tests.trainer.packed_trials", str(folder), str(data_home), "6"]
    done = subprocess.run([sys.executable, *command], check=False)
    assert done.returncode == -signal.SIGKILL
    # Charged for 6 and never reported; the others stand at 4 with a checkpoint, or on the way.
    assert charges_of(folder / "1", CONFIGS[1]).iterations == 6
    roots = []
    for number in range(3):
        (key,) = (folder / str(number) / "secrets").iterdir()
        roots.append(key.read_bytes())
    train(folder, data_home)
    each = iter(roots)
    monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(next(each)))
    train(tmp_path / "calm", data_home)
    for number, config in enumerate(CONFIGS):
        charges = charges_of(folder / str(number), config)
        assert (charges.iterations, len(charges.branches)) == (config.iterations, 1)
        assert last_arrays(folder, number) == last_arrays(tmp_path / "calm", number)


@pytest.mark.parametrize("width", [0, 2, 3], ids=["alone", "narrower", "as wide, other lane"])
def test_another_lane_is_another_branch_and_pays_for_what_it_repeats(tmp_path, data_home, width):
    def refuse(step):
        if step == 9:
            raise Refused

    first = CONFIGS[:2]
    train(tmp_path, data_home, first, width=3, on_charge=refuse)
    assert charges_of(tmp_path / "1", CONFIGS[1]).iterations == 9
    # 7 to 9 were charged, and 6 is the last checkpoint.
    pack = Pack(width)
    if width == 3:
        beside = going(pack, tmp_path / "2", data_home, CONFIGS[2])
        next(beside)
        third = going(pack, tmp_path / "3", data_home, CONFIGS[2])
        next(third)  # which has the second lane now
    else:
        beside = third = None
    list(drive(pack, {1: going(pack, tmp_path / "1", data_home, CONFIGS[1])}))
    charges = charges_of(tmp_path / "1", CONFIGS[1])
    assert [branch.start_step for branch in charges.branches] == [0, 6]
    assert charges.iterations == 9 + 6
    for reports in (beside, third):
        if reports is not None:
            reports.close()
