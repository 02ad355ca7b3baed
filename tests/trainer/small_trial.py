"""A trial's parts on made-up data, small enough to be run many times."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from trainer.config import DataConfig, ModelConfig, OptimizerName, TrialConfig
from trainer.config_sections import AugmentationConfig, AveragingConfig
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.noise import start_noise
from trainer.models import make_model
from trainer.models.network import Network
from trainer.training.averages import start_averages
from trainer.training.objective import Data, Objective
from trainer.training.optimizers import make_optimizer
from trainer.training.step import QuantileTraced, Recipe, StepInputs, Traced, TrainState

NUM_EXAMPLES = 40
NUM_CLASSES = 3
SHAPE = (4, 4, 1)
ROOT = bytes(range(32))

CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="mlp", hidden_sizes=(5,)),
    optimizer="sgd",
    learning_rate=0.5,
    l2_clip_norm=1.0,
    noise_multiplier=1.0,
    sampling_prob=0.25,
    expected_batch_size=10.0,
    iterations=6,
    report_every_steps=3,
    target_delta=1e-5,
)


NO_VIEWS = AugmentationConfig()
NO_AVERAGES = AveragingConfig()


def made_up_data(num_examples=NUM_EXAMPLES, shape=SHAPE):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(num_examples, *shape)).astype(np.float32)
    labels = rng.integers(0, NUM_CLASSES, num_examples)
    return Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32))


def recipe_of(
    optimizer: OptimizerName = "sgd",
    *,
    views=NO_VIEWS,
    examples_per_user=None,
    **changes,
):
    network = Network(make_model(CONFIG.model, NUM_CLASSES))
    objective = Objective(network, views, examples_per_user)
    # The engine that compiles quickest; all give the same (tests/trainer/clipping).
    return Recipe(objective=objective, optimizer=optimizer, **{"engine": "vmap", **changes})


def state_of(recipe, l2_clip_norm=1.0, averaging=NO_AVERAGES):
    params = recipe.objective.network.init(SHAPE, 0).trainable
    return TrainState(
        params=params,
        opt_state=make_optimizer(recipe.optimizer, 1.0).init(params),
        l2_clip_norm=jnp.float32(l2_clip_norm),
        averages=start_averages(averaging, params),
        noise=start_noise(recipe.noise_strategy, params),
    )


def traced_of(**changes):
    values = {"learning_rate": 0.5, "noise_multiplier": 1.0, "expected_batch_size": 10.0}
    return jax.tree.map(np.float32, Traced(**{**values, **changes}))


QUANTILE = QuantileTraced(target_quantile=0.5, learning_rate=0.2, count_noise_stddev=1.0)


def inputs_of(step=1, factor=1.0, keys=None):
    keys = keys or BranchKeys(ROOT)
    return StepInputs(
        step=np.int32(step),
        noise_key=keys.noise_keys([step])[0],
        draw_key=keys.draw_keys([step])[0],
        view_key=keys.view_keys([step])[0],
        learning_rate_factor=np.float32(factor),
    )


@functools.lru_cache(maxsize=64)
def _step(recipe):
    @jax.jit
    def step(state, data, rows, traced, inputs):
        sums = recipe.no_sums(state)
        for row in rows:
            of_row = recipe.sums_of_row(state, {}, data, row, row < 0, inputs.view_key)
            sums = jax.tree.map(jnp.add, sums, of_row)
        return recipe.finish(state, sums, inputs, traced)

    return step


def take(recipe, state, data, rows, traced, inputs=None):
    """One step on given rows of units, each padded with -1."""
    rows = [jnp.asarray(row, jnp.int32) for row in rows]
    return _step(recipe)(state, data, rows, traced, inputs or inputs_of())


def assert_trees_close(ours, theirs, **tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


def distance(ours, theirs):
    """Euclidean distance of two pytrees."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return np.sqrt(sum(np.sum((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs))
