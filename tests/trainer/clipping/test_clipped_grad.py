"""`clipped_grad` against a plain loop over examples, which knows nothing of any engine."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.clipping.comparison import ENGINES, QUICK, distance, length
from trainer.clipping import clipped_grad
from trainer.config import ModelConfig
from trainer.models import cross_entropy, init_params, make_model
from trainer.models.network import Network

SHAPE = (8, 8, 1)
NUM_CLASSES = 4

MODELS = [
    ModelConfig(name="logistic_regression"),
    ModelConfig(name="mlp", hidden_sizes=(16, 8)),
    ModelConfig(name="cnn", channels=(4, 8)),
]


def make_loss(config):
    model = make_model(config, NUM_CLASSES)
    params = init_params(model, SHAPE, seed=1)

    def loss(params, images, labels):
        return jnp.mean(cross_entropy(Network(model).logits(params, {}, images), labels)[0])

    return loss, params


def make_batch(size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, *SHAPE)).astype(np.float32)
    return images, rng.integers(0, NUM_CLASSES, size).astype(np.int32)


def loop_over_examples(loss, params, images, labels, clip_norm, keep):
    """Algorithm 1 of Abadi et al. 2016, one example at a time, in float64."""
    total = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float64), params)
    gradient = jax.jit(jax.grad(loss))
    for image, label, wanted in zip(images, labels, keep, strict=True):
        if not wanted:
            continue
        grads = gradient(params, image[None], label[None])
        grads = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), grads)
        norm = length(grads)
        factor = min(1.0, clip_norm / norm) if norm > 0 else 1.0
        total = jax.tree.map(lambda t, g, f=factor: t + f * g, total, grads)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.name)
def test_equals_a_plain_loop_over_examples(config):
    loss, params = make_loss(config)
    images, labels = make_batch(12)
    is_padding = np.arange(12) % 5 == 4

    def program(bound):
        return [
            clipped_grad(loss, batch_argnums=(1, 2), l2_clip_norm=bound, engine=engine)(
                params, images, labels, is_padding_example=is_padding
            )
            for engine in ENGINES
        ]

    compiled = jax.jit(program, compiler_options=QUICK)
    for bound in (0.1, 1.0, 1e6):
        want = loop_over_examples(loss, params, images, labels, bound, ~is_padding)
        for engine, got in zip(ENGINES, compiled(bound), strict=True):
            # float32 sums of 10 terms: relative rounding of a few 1e-7, more in convolutions.
            assert distance(got, want) <= 1e-5 * length(want), engine


@functools.cache
def linear(engine, clip_norm):
    clipped = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=clip_norm, engine=engine)
    return jax.jit(clipped)


@pytest.mark.parametrize("engine", ENGINES)
@given(
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e10, 1e30, np.inf, np.nan]),
    clip_norm=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_one_example_never_exceeds_the_clip_norm(engine, scale, clip_norm):
    example = np.full((1, 3), scale, np.float32)
    norm = float(jnp.linalg.norm(linear(engine, clip_norm)(jnp.zeros(3), example)))
    # The bound holds up to float32 rounding of the norm, the factor and the product.
    assert norm <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_all_padding_batch_gives_zero(engine):
    grad_fn = clipped_grad(lambda w, x: jnp.sum(w * x), l2_clip_norm=1.0, engine=engine)
    got = grad_fn(jnp.ones(3), np.ones((4, 3), np.float32), is_padding_example=np.ones(4, bool))
    assert not np.any(got)
