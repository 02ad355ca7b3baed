"""Book-keeping forms no per-example gradient of a weight that it measures."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.clipping.comparison import cross_entropy, labels, normal
from tests.trainer.clipping.jaxprs import intermediates
from trainer.clipping import clipped_grad
from trainer.models import TextTransformer, VisionTransformer, init_params
from trainer.models import cross_entropy as model_cross_entropy
from trainer.models.network import Network

# A prime that divides none of the widths, so that a batch axis of a weight's size stands out.
BATCH = 7


def mlp():
    def loss(p, x, y):
        for w in p:
            x = jnp.tanh(x @ w["w"] + w["b"])
        return cross_entropy(x, y)

    sizes = (38, 51, 46, 39)
    params = [{"w": normal(m, n), "b": normal(n)} for m, n in itertools.pairwise(sizes)]
    return loss, params, normal(BATCH, 38), labels(BATCH)


def layers_in_a_loop():
    def loss(p, x, y):
        step = lambda h, w: (jnp.tanh(h @ w["w"] + w["b"]), None)
        return cross_entropy(jax.lax.scan(step, x, p)[0], y)

    return loss, {"w": normal(3, 46, 46), "b": normal(3, 46)}, normal(BATCH, 46), labels(BATCH)


def of_model(model, inputs):
    params = jax.eval_shape(
        lambda: init_params(model, inputs.shape[1:], 0, input_dtype=inputs.dtype)
    )
    loss = lambda p, x, y: jnp.mean(model_cross_entropy(Network(model).logits(p, {}, x), y)[0])
    return loss, params, inputs, labels(BATCH)


def vision_transformer():
    model = VisionTransformer(3, width=44, heads=2, depth=1, patch_size=4)
    return of_model(model, normal(BATCH, 8, 8, 3).astype(np.float32))


def text_transformer():
    model = TextTransformer(3, vocab_size=211, max_length=5, width=44, depth=1)
    return of_model(model, labels(BATCH, 5, classes=211))


def convolutions():
    """Few positions, many channels."""

    def loss(p, x, y):
        convolve = lambda x, k: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(convolve(jnp.tanh(convolve(x, p["k"])), p["l"]))
        return cross_entropy(x.mean((1, 2)) @ p["c"], y)

    params = {"k": normal(3, 3, 58, 62), "l": normal(3, 3, 62, 66), "c": normal(66, 3)}
    return loss, params, normal(BATCH, 2, 2, 58), labels(BATCH)


MODELS = [mlp, layers_in_a_loop, vision_transformer, text_transformer, convolutions]


def per_example_leaves(engine, loss, params, *batch):
    """Sizes of large leaves of which something has the size times the batch's, and all such."""
    clipped = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), engine=engine)
    jaxpr = jax.make_jaxpr(clipped)(params, *batch).jaxpr
    sizes = {math.prod(shape) for _, shape in intermediates(jaxpr)}
    # Non-overlapping patches are cheaper to form than to measure, so that kernel is left out.
    large = {
        leaf.size
        for leaf in jax.tree.leaves(params)
        if leaf.size > 1000 and leaf.shape[:1] != (4,)
    }
    assert large
    return {size for size in large if BATCH * size in sizes}, large


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_no_per_example_gradient_of_a_measured_weight(model):
    for engine in ("book_keeping", "two_pass"):
        found, _ = per_example_leaves(engine, *model())
        assert not found, engine
    # The same look does find them where they are.
    found, large = per_example_leaves("vmap", *model())
    assert found == large


def wide_mlp():
    sizes = (256, 512, 512, 10)
    params = [
        {"w": jax.ShapeDtypeStruct((m, n), jnp.float32), "b": jax.ShapeDtypeStruct((n,), float)}
        for m, n in itertools.pairwise(sizes)
    ]
    shapes = jax.ShapeDtypeStruct((64, 256), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
    return mlp()[0], params, *shapes


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_compiled_memory_is_a_fraction_of_that_of_per_example_gradients(engine):
    def temporary(engine):
        loss, *args = wide_mlp()
        clipped = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(1, 2), engine=engine)
        analysis = jax.jit(clipped).lower(*args).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(engine) < 0.05 * temporary("vmap")
