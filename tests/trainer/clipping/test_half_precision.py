"""Computing in bfloat16 with float32 parameters: norms and sums stay float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.clipping.comparison import (
    ENGINES,
    QUICK,
    cross_entropy,
    distance,
    labels,
    length,
    normal,
    quick,
)
from trainer.clipping import clipped_grad
from trainer.models import TextTransformer, init_params
from trainer.models import cross_entropy as model_cross_entropy
from trainer.models.network import Network

SIZE = 6
HALF = jnp.bfloat16
DATA = normal(SIZE, 7, 24).astype(np.float32), labels(SIZE)
PARAMS = jax.tree.map(
    lambda x: x.astype(np.float32),
    {"w": normal(24, 20), "b": normal(20), "v": normal(20, 20), "c": normal(20, 3)},
)


def loss(p, x, y):
    p = jax.tree.map(lambda leaf: leaf.astype(HALF), p)
    hidden = jnp.tanh(x.astype(HALF) @ p["w"] + p["b"])
    hidden = jnp.tanh(hidden @ p["v"])
    return cross_entropy((hidden.mean(1) @ p["c"]).astype(jnp.float32), y)


def make(model, inputs):
    params = init_params(model, inputs.shape[1:], 0, input_dtype=inputs.dtype)
    fun = lambda p, x, y: jnp.mean(model_cross_entropy(Network(model).logits(p, {}, x), y)[0])
    return fun, params, inputs, labels(len(inputs))


CASES = {
    "mlp": lambda: (loss, PARAMS, *DATA),
    "text_transformer": lambda: make(
        TextTransformer(3, 31, 8, width=16, depth=1, dtype=HALF), labels(SIZE, 8, classes=31)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_norms_and_sums_are_those_of_per_example_gradients(case):
    fun, params, *data = case()
    options = {"l2_clip_norm": 0.5, "batch_argnums": (1, 2), "return_grad_norms": True}
    program = lambda *args: {
        engine: clipped_grad(fun, engine=engine, **options)(*args)
        for engine in ("vmap", "book_keeping")
    }
    results = quick(program, params, *data)
    want, want_outputs = results["vmap"]
    for engine, (sums, outputs) in results.items():
        assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}
        # bfloat16 has 8 bits, and rounds differently wherever sums are cut differently.
        np.testing.assert_allclose(outputs.grad_norms, want_outputs.grad_norms, rtol=1e-2)
        assert distance(sums, want) <= 2e-2 * length(want), engine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "half_parameters"),
    [*((engine, False) for engine in ENGINES), ("book_keeping", True)],
)
def test_the_sum_of_a_batch_is_not_rounded(engine, half_parameters):
    params = jax.tree.map(lambda x: x.astype(HALF), PARAMS) if half_parameters else PARAMS
    options = {"l2_clip_norm": 0.5, "batch_argnums": (1, 2), "engine": engine}
    clipped = jax.jit(clipped_grad(loss, dtype=jnp.float32, **options), compiler_options=QUICK)
    # One program for all sizes: another one may keep other intermediate results in float32.
    x, y = (np.repeat(data[:1], 257, axis=0) for data in DATA)
    sums = lambda count: jax.device_get(
        clipped(params, x, y, is_padding_example=np.arange(257) >= count)
    )
    one, many = sums(1), sums(256)
    scaled = jax.tree.map(lambda leaf: 256 * leaf, one)
    assert distance(many, scaled) <= 1e-5 * length(scaled)
    # And 257 is the first number of examples that bfloat16 cannot tell from 256.
    more = jax.tree.map(np.subtract, sums(257), many)
    assert distance(more, one) <= 256 * 1e-5 * length(one)


@pytest.mark.parametrize("engine", ENGINES)
def test_half_parameters_give_half_sums_unless_asked_otherwise(engine):
    fun = lambda p, x: jnp.sum(x.astype(HALF) @ p).astype(jnp.float32)
    clipped = clipped_grad(fun, l2_clip_norm=0.5, engine=engine)
    assert clipped(PARAMS["w"].astype(HALF), DATA[0]).dtype == HALF
