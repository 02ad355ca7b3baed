"""No example's logits depend on another example: what per-example clipping rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

SHAPE = (8, 8, 2)
IMAGE_MODELS = [
    LogisticRegression(3),
    Mlp((4,), 3),
    Cnn((4,), 3),
    ResNet(3, stage_sizes=(1, 1), width=4),
    ResNet(3, stage_sizes=(1,), width=4, small_images=False),
    WideResNet(3, depth=10, widening=1),
    VisionTransformer(3, width=8, heads=2, depth=2),
]


def random_params(model, shape, dtype=jnp.float32):
    """Parameters that are away from their special starting values, zeros among them."""
    shapes = jax.eval_shape(lambda: init_params(model, shape, 0, input_dtype=dtype))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.3, size=leaf.shape).astype(np.float32), shapes
    )


def make_logits(model, shape, dtype=jnp.float32):
    params = random_params(model, shape, dtype)
    return jax.jit(lambda batch: model.apply({"params": params}, batch))


def check_independence(logits, inputs, others):
    """Compares logits while all examples but one are exchanged, for each example in turn."""
    before = np.asarray(logits(inputs))
    assert np.all(np.isfinite(before))
    changes = np.abs(before - np.asarray(logits(others)))
    assert np.all(changes.max(axis=1) > 1e-3)  # what an example holds matters to itself
    for kept in range(len(inputs)):
        mixed = others.copy()
        mixed[kept] = inputs[kept]
        np.testing.assert_allclose(logits(mixed)[kept], before[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("model", IMAGE_MODELS, ids=lambda model: type(model).__name__)
def test_images_do_not_touch_each_other(model):
    logits = make_logits(model, SHAPE)
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, *SHAPE)).astype(np.float32)
    check_independence(logits, first, second)
    # NaN would spread along any path there is, however small its weight.
    first[1] = np.nan
    finite = np.isfinite(logits(first)).any(axis=1)
    assert finite.tolist() == [True, False, True]


@pytest.mark.slow
def test_token_sequences_do_not_touch_each_other_but_their_positions_do():
    model = TextTransformer(3, vocab_size=11, max_length=6, width=8)
    logits = make_logits(model, (6,), jnp.int32)
    first = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 1]], np.int32)
    check_independence(logits, first, first[:, ::-1])
