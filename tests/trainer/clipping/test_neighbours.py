"""Two batches that differ in one example: their sums differ by at most the sensitivity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.clipping.comparison import ENGINES, QUICK, distance, normal
from trainer.clipping import clipped_grad

SIZE = 5
MODES = ("flat", "per_layer", "automatic")
PARAMS = {
    "embed": {"table": normal(7, 4)},
    "layer": {"w": normal(4, 4), "b": normal(4)},
    "kernel": normal(3, 4, 4),
    "scale": np.array(1.3),
}
PARAMS = jax.tree.map(lambda leaf: leaf.astype(np.float32), PARAMS)


def loss(p, x, tokens, scales):
    """Of everything a little, with a scale for each example's gradient."""
    h = x + p["embed"]["table"][tokens]
    h = jnp.tanh(h @ p["layer"]["w"] + p["layer"]["b"])
    h = jax.lax.conv_general_dilated(
        h, p["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.sum(jnp.sin(h @ p["layer"]["w"].T) * p["scale"]) * scales.sum()


@functools.cache
def program(mode, rescale, size):
    """One program for all engines, batches, bounds and divisors."""

    def run(params, batch, padding, bound, divisor):
        return {
            engine: clipped_grad(
                loss,
                l2_clip_norm=bound,
                normalize_by=divisor,
                rescale_to_unit_norm=rescale,
                batch_argnums=(1, 2, 3),
                engine=engine,
                mode=mode,
                microbatch_size=size,
            )(params, *batch, is_padding_example=padding)
            for engine in ENGINES
        }

    return jax.jit(run, compiler_options=QUICK)


EXTREMES = st.sampled_from(
    [0.0, 1e-38, 1e-30, 1e-20, 1e-8, 1e-3, 1.0, 1e3, 1e8, 1e18, 1e25, 1e35, np.inf, np.nan]
)


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [False, True], ids=["as_is", "rescaled"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [None, 2], ids=["whole", "in_parts"])
@settings(max_examples=30)
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    scales=st.lists(EXTREMES, min_size=SIZE, max_size=SIZE),
    change=st.sampled_from(["remove", "zero"]),
    bound=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 50.0]),
    divisor=st.sampled_from([1.0, 0.5, 64.0]),
    weights=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_neighbouring_sums(
    size, mode, rescale, data, seed, scales, change, bound, divisor, weights
):
    rng = np.random.default_rng(seed)
    batch = (
        rng.normal(size=(SIZE, 6, 4)).astype(np.float32),
        rng.integers(0, 7, (SIZE, 6)).astype(np.int32),
        np.array(scales, np.float32)[:, None],
    )
    params = jax.tree.map(lambda leaf: np.float32(weights) * leaf, PARAMS)
    padding = rng.random(SIZE) < 0.3
    one = data.draw(st.integers(0, SIZE - 1))
    padding[one] = False
    # Without it, or with zeros in its place, which then stand for nothing as well.
    other, absent = batch, padding.copy()
    absent[one] = True
    if change == "zero":
        other = jax.tree.map(np.copy, batch)
        for x in other:
            x[one] = 0
    run = program(mode, rescale, size)
    first = jax.device_get(run(params, batch, padding, bound, divisor))
    second = jax.device_get(run(params, other, absent, bound, divisor))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((first, second)))
    sensitivity = (1.0 if rescale else bound) / divisor
    # Sums of others round, too: by an ulp of the sum for each of the terms.
    rounding = SIZE * np.finfo(np.float32).eps * SIZE * sensitivity
    for engine in ENGINES:
        moved = distance(first[engine], second[engine])
        assert moved <= sensitivity * (1 + 1e-6) + rounding, engine
