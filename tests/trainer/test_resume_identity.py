"""A trial that was interrupted and goes on equals one that never was, to the last bit.

Every optimizer is crossed with every mechanism, and each of either kind is interrupted 20 times
or more. What must come back is the state, the keys and what noise remembers, whatever program
they go into, and a pair's own takes seconds to compile. So the pairs share a program for the
gradients and two for the noise, and the rest of a step is taken operation by operation. Some
pairs go through the very programs that trials run.
"""

import dataclasses
import functools
import itertools
import random
from typing import get_args

import jax
import numpy as np
import pytest

from trainer.config import ClippingConfig, DataConfig, ModelConfig, OptimizerName, TrialConfig
from trainer.config_sections import AugmentationConfig, AveragingConfig, MechanismConfig
from trainer.errors import ConfigError
from trainer.mechanism import noise
from trainer.training import devices, runners, step, streamed
from trainer.trial import Trial
from trainer.weights.checkpoints import save_checkpoint

STEPS = 12
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
    # Of two that give other bits neither may be preferred because a machine is busy.
    clipping=ClippingConfig(engine="book_keeping"),
)
STREAMED = DataConfig(name="digits", placement="streamed")
BANDED = MechanismConfig(bands=4)
MECHANISMS = {
    "Poisson": {},
    "full batch": {"sampling_prob": 1.0},
    "truncated": {"mechanism": MechanismConfig(truncated_batch_size=110, num_units=1437)},
    "banded": {"mechanism": BANDED},
    "banded of unknown size": {"mechanism": BANDED, "neighboring_relation": "add_or_remove_one"},
    "quantile": {"clipping": ClippingConfig(mode="quantile", engine="book_keeping")},
    "views": {"augmentation": AugmentationConfig(views=2, crop_padding=1)},
}
OPTIMIZERS = get_args(OptimizerName)
REFUSED = {("dp_adam_bc", name) for name in MECHANISMS if "banded" in name}
PAIRS = [pair for pair in itertools.product(OPTIMIZERS, MECHANISMS) if pair not in REFUSED]
COMPILED = [
    ("sgd", "Poisson"),
    ("lars", "Poisson, streamed"),
    ("momentum", "truncated"),
    ("adam", "banded"),
    ("scale_then_privatize", "quantile"),
]


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def nothing(step):
    pass


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def check_interruptions(config, data_home, folder, count):
    """Interrupts a trial at random, and follows each that goes on up to the next interruption."""
    topology = devices.topology(1)
    trial = Trial(config, data_home, topology)
    at = trial.start(None, folder / "secrets")
    chosen = random.Random(repr(config))
    stops = sorted(chosen.sample(range(1, STEPS), count))
    want = {}
    for stop in (*stops, STEPS):
        at = trial.advance(at, stop, nothing)
        want[stop] = bits(at.state)
        if stop < STEPS:
            save_checkpoint(folder / str(stop), **trial.checkpoint(at))
    trial.close()

    for stop, following in itertools.pairwise((*stops, STEPS)):
        again = Trial(config, data_home, topology)
        resumed = again.start(folder / str(stop), folder / "secrets")
        assert (resumed.branch, resumed.step) == (at.branch, stop)
        assert bits(resumed.state) == want[stop]
        assert bits(again.advance(resumed, following, nothing).state) == want[following]
        again.close()


@functools.cache
def _gradients(recipe):
    return streamed.make_streamed_programs(recipe)[1]


def shared_programs(recipe, mesh):
    """As `make_streamed_programs`, compiled in parts that do not depend on all of a recipe."""
    assert mesh is None
    scaled = recipe.optimizer == "scale_then_privatize"  # which alone has a say in gradients
    shared = dataclasses.replace(
        recipe, optimizer=recipe.optimizer if scaled else "sgd", noise_strategy=()
    )

    def add_row(sums, state, *rest):
        opt_state = state.opt_state if scaled else ()
        return _gradients(shared)(sums, state._replace(opt_state=opt_state, noise=()), *rest)

    return recipe.no_sums, add_row, recipe.finish


_compiled_noise = jax.jit(noise.add_noise, static_argnames="strategy")
_make_replay = noise._make_replay


def replay_of_one_length(strategy):
    """As `noise._make_replay`, compiled for as many keys as any interruption leaves."""

    def program(like, keys, *rest):
        return _make_replay(strategy)(like, np.resize(keys, (16, 2)), *rest)

    return program


@pytest.fixture
def few_programs(monkeypatch):
    monkeypatch.setattr(runners, "make_streamed_programs", shared_programs)
    monkeypatch.setattr(step, "add_noise", _compiled_noise)
    monkeypatch.setattr(noise, "_make_replay", replay_of_one_length)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("optimizer", "mechanism"), PAIRS)
def test_every_pair(optimizer, mechanism, data_home, tmp_path):
    config = dataclasses.replace(
        CONFIG, optimizer=optimizer, data=STREAMED, **MECHANISMS[mechanism]
    )
    pairs_of_optimizer = [pair for pair in PAIRS if pair[0] == optimizer]
    check_interruptions(config, data_home, tmp_path, -(-20 // len(pairs_of_optimizer)))


@pytest.mark.parametrize(("optimizer", "mechanism"), sorted(REFUSED))
def test_pairs_that_do_not_go_together_are_refused_by_name(optimizer, mechanism):
    with pytest.raises(ConfigError, match=r"^optimizer='dp_adam_bc': .* mechanism.bands=4"):
        dataclasses.replace(CONFIG, optimizer=optimizer, **MECHANISMS[mechanism])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "case"), COMPILED)
def test_as_trials_are_compiled(optimizer, case, data_home, tmp_path):
    mechanism, _, placement = case.partition(", ")
    config = dataclasses.replace(
        CONFIG,
        optimizer=optimizer,
        data=STREAMED if placement else CONFIG.data,
        averaging=AveragingConfig(ema_decay=0.9, polyak=True),
        **MECHANISMS[mechanism],
    )
    check_interruptions(config, data_home, tmp_path, 2)
