from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models import StandardizedConv, init_params
from trainer.models.standardized_conv import standardize

SHAPE = (3, 3, 5, 4)


@pytest.fixture
def kernel():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(3.0, 2.0, SHAPE), jnp.float32)


def test_a_standardised_kernel_has_mean_zero_and_fan_in_variance_one(kernel):
    got = np.asarray(standardize(kernel), np.float64).reshape(-1, 4)
    np.testing.assert_allclose(got.mean(axis=0), 0, atol=1e-7)
    np.testing.assert_allclose(got.var(axis=0) * 45, 1, rtol=1e-5)


def test_it_is_the_formula(kernel):
    weights = np.asarray(kernel, np.float64)
    mean = weights.mean(axis=(0, 1, 2))
    want = (weights - mean) / np.sqrt(np.maximum(weights.var(axis=(0, 1, 2)) * 45, 1e-4))
    np.testing.assert_allclose(standardize(kernel), want, rtol=1e-5, atol=1e-6)


def test_shift_and_scale_of_a_kernel_do_not_matter(kernel):
    np.testing.assert_allclose(standardize(5 * kernel - 2), standardize(kernel), atol=1e-5)


def test_a_constant_kernel_becomes_zero_with_finite_gradients():
    constant = jnp.full(SHAPE, 0.5)
    assert not np.any(standardize(constant))
    gradient = jax.grad(lambda kernel: jnp.sum(standardize(kernel)[0, 0, 0]))(constant)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_the_gain_on_the_output_is_a_gain_on_the_kernel(kernel, strides, padding):
    keys = jax.random.split(jax.random.key(1), 3)
    gain, bias = (jax.random.normal(key, (4,)) for key in keys[:2])
    images = jax.random.normal(keys[2], (2, 7, 6, 5))
    conv = StandardizedConv(4, (3, 3), strides, padding)
    got: Any = conv.apply({"params": {"kernel": kernel, "gain": gain, "bias": bias}}, images)
    want = jax.lax.conv_general_dilated(
        images,
        standardize(kernel) * gain,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(got, want + bias, rtol=1e-4, atol=1e-5)


def test_it_starts_with_gain_one_and_bias_zero():
    params = jax.jit(lambda: init_params(StandardizedConv(4, (3, 3)), (6, 6, 5), 0))()
    assert jax.tree.map(jnp.shape, params) == {"kernel": SHAPE, "gain": (4,), "bias": (4,)}
    assert np.all(params["gain"] == 1)
    assert not np.any(params["bias"])
