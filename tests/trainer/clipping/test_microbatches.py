"""Parts of a batch: how many are run, and that sizes never compile anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.clipping.comparison import ENGINES, distance, length, normal
from trainer.clipping import clipped_grad
from trainer.clipping.microbatches import accumulate

CAPACITY = 12
X = normal(CAPACITY, 6, scale=1.0).astype(np.float32)
PARAMS = {"a": normal(6, 5).astype(np.float32), "c": normal(5, 1).astype(np.float32)}


def loss(p, x):
    return jnp.sum(jnp.tanh(x @ p["a"]) @ p["c"])


@pytest.fixture(scope="module")
def bounded():
    """Each example's clipped gradient."""
    clipped = clipped_grad(loss, l2_clip_norm=0.5, engine="vmap")
    return jax.device_get(jax.jit(jax.vmap(lambda x: clipped(PARAMS, x[None])))(X))


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 5])
@pytest.mark.parametrize("engine", ENGINES)
def test_poisson_batches_share_one_program(engine, size, bounded):
    clipped = clipped_grad(
        loss, l2_clip_norm=0.5, engine=engine, microbatch_size=size, return_values=True
    )
    traces = []

    @jax.jit
    def step(p, x, padding):
        traces.append(engine)
        return clipped(p, x, is_padding_example=padding)

    rng = np.random.default_rng(0)
    for rate in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        padding = rng.random(CAPACITY) >= rate
        got, outputs = step(PARAMS, X, padding)
        want = jax.tree.map(lambda g, keep=~padding: g[keep].sum(0), bounded)
        assert distance(got, want) <= 1e-5 * max(1e-3, length(want))
        assert outputs.values.shape == (CAPACITY,)
    assert len(traces) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_of_padding_alone_are_not_run(engine):
    clipped = clipped_grad(
        lambda p, x: jnp.sum(p * x) + 1, l2_clip_norm=1.0, microbatch_size=3, engine=engine,
        return_values=True,
    )  # fmt: skip
    step = jax.jit(lambda p, x, padding: clipped(p, x, is_padding_example=padding))
    for real in range(CAPACITY + 1):
        padding = np.random.default_rng(real).permutation(np.arange(CAPACITY) >= real)
        _, outputs = step(jnp.zeros(6), X, padding)
        # Values are 1 where the loss was computed: whole parts of three, padding at their end.
        assert outputs.values.sum() == min(CAPACITY, -(-real // 3) * 3)
        assert (outputs.values[~padding] == 1).all()


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("padded", [0, 3, 7])
def test_accumulate_runs_each_example_once(size, padded):
    runs = []

    def part(examples, is_padding):
        jax.debug.callback(lambda padding: runs.append(int((~padding).sum())), is_padding)
        (x,) = examples
        return {"sum": jnp.sum(jnp.where(is_padding, 0, x))}, 10 * x

    x = jnp.arange(1.0, 8.0)
    padding = np.random.default_rng(padded).permutation(np.arange(7) < padded)
    sums, outputs = jax.jit(lambda x, padding: accumulate(part, [x], padding, size))(x, padding)
    jax.effects_barrier()
    assert sums["sum"] == x[~padding].sum()
    np.testing.assert_array_equal(outputs[~padding], 10 * x[~padding])
    real = 7 - padded
    full, rest = divmod(real, size)
    assert runs == [size] * full + [rest] * (rest > 0)
