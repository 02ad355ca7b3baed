"""All engines agree with jax-privacy on networks composed at random."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from jax_privacy import clipping as jax_privacy_clipping

from tests.trainer.clipping.comparison import assert_same, length, quick
from tests.trainer.clipping.random_networks import networks
from trainer.clipping import clipped_grad

SIZE = 5


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(
    network=networks(),
    size=st.integers(0, SIZE),
    seed=st.integers(0, 100),
    bound=st.sampled_from([0.0, 0.05, 0.3, 1.0, 100.0]),
    part=st.integers(1, SIZE + 1),
)
def test_random_networks(network, size, seed, bound, part):
    note(network.name)
    x = network.inputs(size)
    padding = np.random.default_rng(seed).random(size) < 0.3
    runs = [("book_keeping", None), ("two_pass", part)]
    if seed % 2:
        runs = [("book_keeping", part), ("two_pass", None), ("vmap", part)]
    options = {"l2_clip_norm": bound, "return_values": True, "return_grad_norms": True}
    ours = [
        clipped_grad(network.loss, engine=engine, microbatch_size=size, **options)
        for engine, size in runs
    ]
    theirs = jax_privacy_clipping.clipped_grad(network.loss, **options)
    # jax-privacy takes no batch of nothing.
    grad_fns = [theirs, *ours] if size > 0 else ours
    program = lambda p, *data: [fn(p, *data[:-1], is_padding_example=data[-1]) for fn in grad_fns]
    with jax.enable_x64(True):
        results = quick(program, network.params, x, padding)
    if size > 0:
        assert_same(results[0], results[1:], runs, ~padding, 1e-9)
    else:
        for sums, outputs in results:
            assert jax.tree.map(np.shape, sums) == jax.tree.map(np.shape, network.params)
            assert length(sums) == 0
            assert outputs.values.shape == outputs.grad_norms.shape == (0,)
