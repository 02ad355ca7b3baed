"""Equality with jax-privacy on whole models: Flax Linen, Flax NNX, Equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.trainer.clipping.comparison import BATCH, Case, check, cross_entropy, labels, normal
from trainer.models import (
    Cnn,
    LogisticRegression,
    Mlp,
    ResNet,
    TextTransformer,
    VisionTransformer,
    WideResNet,
    init_params,
)
from trainer.models import cross_entropy as model_cross_entropy
from trainer.models.network import Network as Trained

SHAPE = (8, 8, 2)
RUNS: list = [("two_pass", None), ("book_keeping", None)]

IMAGE_MODELS = [
    LogisticRegression(3),
    Mlp((5, 4), 3),
    Cnn((4, 6), 3),
    ResNet(3, stage_sizes=(1, 1), width=4),
    WideResNet(3, depth=10, widening=1),
    VisionTransformer(3, width=8, heads=2, depth=1),
]


def linen_case(model, inputs):
    """Parameters away from their starting values, zeros among them."""
    shapes = jax.eval_shape(
        lambda: init_params(model, inputs.shape[1:], 0, input_dtype=inputs.dtype)
    )
    params = jax.tree.map(lambda leaf: 0.1 + normal(*leaf.shape, scale=0.3), shapes)
    loss = lambda p, x, y: jnp.mean(model_cross_entropy(Trained(model).logits(p, {}, x), y)[0])
    return Case(loss, (params, inputs, labels(BATCH)))


@pytest.mark.slow
@pytest.mark.parametrize("model", IMAGE_MODELS, ids=lambda model: type(model).__name__)
def test_image_models(model):
    images = normal(BATCH, *SHAPE, scale=1.0).astype(np.float32)
    # The deepest takes longest to compile; a second pass is the same for every model.
    runs = RUNS[1:] if isinstance(model, WideResNet) else RUNS
    # Deep networks of tiny groups: a few rounding errors more.
    check(linen_case(model, images), "float32", runs, tolerance=3e-5)


@pytest.mark.slow
def test_text_transformer():
    model = TextTransformer(3, vocab_size=11, max_length=6, width=8, depth=1)
    check(linen_case(model, labels(BATCH, 5, classes=11)), "float32", RUNS)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


@pytest.mark.slow
def test_nnx_modules():
    graph, state = nnx.split(Block(nnx.Rngs(0)), nnx.Param)

    def loss(state, x, y):
        return cross_entropy(nnx.merge(graph, state)(x), y)

    args = (state, normal(BATCH, *SHAPE), labels(BATCH))
    check(Case(loss, args), "float32", RUNS)


class Network(eqx.Module):
    """Arrays, functions and numbers in one pytree, as Equinox has it."""

    conv: eqx.nn.Conv2d
    norm: eqx.nn.LayerNorm
    cell: eqx.nn.GRUCell
    head: eqx.nn.MLP
    scale: float

    def __init__(self, key):
        first, second, third = jax.random.split(key, 3)
        self.conv = eqx.nn.Conv2d(2, 3, 3, key=first)
        self.norm = eqx.nn.LayerNorm((3, 6, 6))
        self.cell = eqx.nn.GRUCell(18, 4, key=second)
        self.head = eqx.nn.MLP(4, 3, 5, 1, key=third)
        self.scale = 2.0

    def __call__(self, x):
        rows = jnp.moveaxis(self.norm(self.conv(x)), 1, 0).reshape(6, 18)
        step = lambda state, row: (self.cell(self.scale * row, state), None)
        state, _ = jax.lax.scan(step, jnp.zeros(4), rows)
        return self.head(state)


@pytest.mark.slow
def test_equinox_modules():
    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)

    def loss(params, x, y):
        return cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    args = (params, normal(BATCH, 2, 8, 8), labels(BATCH))
    check(Case(loss, args), "float32", RUNS)
