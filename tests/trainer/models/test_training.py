"""Every model takes steps on real digits, with the engine that most models train with."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from trainer.clipping import clipped_grad
from trainer.config import ModelConfig, ModelName
from trainer.models import (
    BottleneckBlock,
    Cnn,
    LogisticRegression,
    Mlp,
    NfResNet,
    ResNet,
    VisionTransformer,
    WideResNet,
    cross_entropy,
    init_params,
    make_model,
)
from trainer.models.network import Network

# A model and the registry's names that it is a small one of.
SMALL = [
    (LogisticRegression(10), ["logistic_regression"]),
    (Mlp((8,), 10), ["mlp"]),
    (Cnn((4,), 10), ["cnn"]),
    (ResNet(10, (1,), width=4), ["resnet18"]),
    (ResNet(10, (1,), BottleneckBlock, width=4), ["resnet50"]),
    (WideResNet(10, depth=10, widening=1), ["wrn_16_4", "wrn_28_10", "wrn_40_4"]),
    (NfResNet(10, (1,), width=8), ["nf_resnet50"]),
    (VisionTransformer(10, width=8, heads=2, depth=1), ["vit_tiny", "vit_small", "vit_base"]),
]
BATCH, STEPS = 4, 3


@pytest.fixture(scope="module")
def digits():
    found: Any = load_digits()
    images = (found.images[:BATCH, ..., None] / 16).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(found.target[:BATCH], jnp.int32)


def random_params(model, shape):
    """As large as first parameters are; drawing those in JAX takes long to compile."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return rng.normal(0, np.sqrt(leaf.shape[-1] / leaf.size), leaf.shape)
        return np.full(leaf.shape, path[-1].key in ("scale", "gain", "skip_gain"))

    shapes = jax.eval_shape(lambda: init_params(model, shape, 0))
    drawn = jax.tree_util.tree_map_with_path(draw, shapes)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), drawn)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [pytest.param(model, id=f"{names[0]}") for model, names in SMALL]
)
def test_steps_lower_the_loss_of_the_batch(model, digits):
    images, labels = digits
    params = random_params(model, images.shape[1:])

    def loss(params, images, labels):
        return jnp.mean(cross_entropy(Network(model).logits(params, {}, images), labels)[0])

    clipped = clipped_grad(
        loss, l2_clip_norm=1.0, batch_argnums=(1, 2), engine="book_keeping", return_values=True
    )

    # A few steps on four images: compiling takes longer than they do, however quick they become.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def step(params):
        gradient, aux = clipped(params, images, labels)
        return jax.tree.map(lambda p, g: p - 0.1 / BATCH * g, params, gradient), aux.values

    losses = []
    for _ in range(STEPS + 1):
        params, values = step(params)
        losses.append(float(jnp.mean(values)))
    assert losses == sorted(losses, reverse=True), losses


def test_there_is_a_small_one_of_every_model():
    for model, names in SMALL:
        for name in names:
            large = make_model(ModelConfig(name=name), 10)
            assert type(large) is type(model)
            assert getattr(large, "block", None) == getattr(model, "block", None)
    assert {name for _, names in SMALL for name in names} == set(get_args(ModelName))
