"""Signals keep their size through a network without normalisation (Brock et al. 2021)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models import NfResNet, init_params
from trainer.models.nf_resnet import ALPHA, NfBlock, scaled_relu

STAGES = (3, 4, 6, 3)
MODEL = NfResNet(10, stage_sizes=STAGES)
SHAPE = (32, 32, 3)
BLOCKS = [f"stage{s + 1}_block{b + 1}" for s, blocks in enumerate(STAGES) for b in range(blocks)]


@pytest.fixture(scope="module")
def params():
    """First parameters. Kernels are drawn here: drawing them in JAX takes long to compile."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(MODEL, SHAPE, 0))

    def first(path, leaf):
        match path[-1].key:
            case "kernel":
                return rng.normal(size=leaf.shape).astype(np.float32)
            case "gain":
                return np.ones(leaf.shape, np.float32)
        return np.zeros(leaf.shape, np.float32)

    return jax.tree_util.tree_map_with_path(first, shapes)


@pytest.fixture(scope="module")
def block_variances(params):
    """``variances(skip_gain)``: mean over channels of their variances, after every block."""

    @jax.jit
    def variances(params, images):
        _, captured = MODEL.apply(
            {"params": params},
            images,
            capture_intermediates=lambda module, _: isinstance(module, NfBlock),
            mutable=["intermediates"],
        )
        outputs: Any = captured["intermediates"]
        return jnp.stack(
            [jnp.mean(jnp.var(outputs[name]["__call__"][0], axis=(0, 1, 2))) for name in BLOCKS]
        )

    images = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)

    def with_gain(skip_gain):
        gains = jax.tree_util.tree_map_with_path(
            lambda path, leaf: np.float32(skip_gain) if path[-1].key == "skip_gain" else leaf,
            params,
        )
        return np.asarray(variances(gains, images))

    return with_gain


def test_scaled_relu_keeps_a_variance_of_one():
    numbers = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    outputs = np.asarray(scaled_relu(jnp.asarray(numbers)), np.float64)
    assert outputs.var() == pytest.approx(1, rel=5e-3)
    # The reference rounds what it found by drawing numbers, 1.71396.
    assert float(scaled_relu(jnp.float32(1))) == pytest.approx(1.7139588594436646, rel=1e-3)


@pytest.mark.slow
def test_variances_stay_near_one_where_training_starts(block_variances):
    # Closed branches add nothing, and projections divide by what open ones would have added.
    found = block_variances(0.0)
    gone = np.cumprod([1, *(1 + ALPHA**2 * blocks for blocks in STAGES[:-1])])
    np.testing.assert_allclose(found, np.repeat(1 / gone, STAGES), rtol=0.25)


@pytest.mark.slow
def test_with_open_branches_variances_grow_as_the_blocks_expect(block_variances):
    found = block_variances(1.0)
    expected = [1 + ALPHA**2 * (block + 1) for blocks in STAGES for block in range(blocks)]
    np.testing.assert_allclose(found, expected, rtol=0.25)


def test_what_blocks_expect_begins_anew_after_each_projection():
    """A block is told what the one before it gives, and the first block of a stage gives 1."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        original = NfBlock.__call__
        patch.setattr(
            NfBlock,
            "__call__",
            lambda self, inputs: seen.append(self.expected_stddev) or original(self, inputs),
        )
        jax.eval_shape(lambda: init_params(NfResNet(10, (2, 3), width=8), (8, 8, 1), 0))
    one, two = math.sqrt(1 + ALPHA**2), math.sqrt(1 + 2 * ALPHA**2)
    np.testing.assert_allclose(seen, [1, one, two, one, two], rtol=1e-6)


def test_nothing_but_parameters_is_kept_and_branches_start_closed():
    model = NfResNet(10, (1, 1), width=8)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1))))
    assert set(variables) == {"params"}
    assert variables["params"]["stage1_block1"]["skip_gain"].shape == ()
