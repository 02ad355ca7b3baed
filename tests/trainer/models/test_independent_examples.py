"""No example's logits depend on another example: what per-example clipping rests on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models import (
    BottleneckBlock,
    Cnn,
    LogisticRegression,
    Mlp,
    NfResNet,
    ResNet,
    TextTransformer,
    VisionTransformer,
    WideResNet,
    check_examples_are_apart,
    init_params,
)

SHAPE = (8, 8, 2)
# Every network and every kind of block and stem that a model of the registry is made of.
IMAGE_MODELS = {
    "logistic regression": LogisticRegression(3),
    "mlp": Mlp((4,), 3),
    "cnn": Cnn((4,), 3),
    "resnet": ResNet(3, stage_sizes=(1, 1), width=4),
    "resnet with pooling": ResNet(3, stage_sizes=(1,), width=4, small_images=False),
    "resnet of bottlenecks": ResNet(3, (1,), BottleneckBlock, width=4),
    "wide resnet": WideResNet(3, depth=10, widening=1),
    "nf resnet": NfResNet(3, stage_sizes=(1,), width=4),
    "vision transformer": VisionTransformer(3, width=8, heads=2, depth=1),
    "cnn in bfloat16": Cnn((4,), 3, dtype=jnp.bfloat16),
    "vision transformer in bfloat16": VisionTransformer(
        3, width=8, heads=2, depth=1, dtype=jnp.bfloat16
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [pytest.param(model, id=name) for name, model in IMAGE_MODELS.items()]
)
def test_images_do_not_touch_each_other(model):
    check_examples_are_apart(model, SHAPE, 3)


@pytest.mark.slow
def test_token_sequences_do_not_touch_each_other_but_their_positions_do():
    model = TextTransformer(3, vocab_size=11, max_length=6, width=8)
    shapes = jax.eval_shape(lambda: init_params(model, (6,), 0, input_dtype=jnp.int32))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.3, size=leaf.shape).astype(np.float32), shapes
    )
    logits = jax.jit(lambda batch: model.apply({"params": params}, batch))
    inputs = np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 1]], np.int32)
    others = inputs[:, ::-1]
    before = np.asarray(logits(inputs))
    assert np.all(np.isfinite(before))
    changes = np.abs(before - np.asarray(logits(others)))
    assert np.all(changes.max(axis=1) > 1e-3)  # what an example holds matters to itself
    for kept in range(len(inputs)):
        mixed = others.copy()
        mixed[kept] = inputs[kept]
        np.testing.assert_allclose(logits(mixed)[kept], before[kept], rtol=1e-5, atol=1e-6)
