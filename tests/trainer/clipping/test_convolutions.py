"""Equality with jax-privacy: convolutions of every sort, and weight standardisation."""

import jax
import jax.numpy as jnp
import pytest

from tests.trainer.clipping.comparison import (
    BATCH,
    Case,
    check,
    check_in,
    cross_entropy,
    labels,
    normal,
)
from trainer.models.standardization import standardize

Y = labels(BATCH)
IMAGES = normal(BATCH, 7, 7, 4)
NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(x, kernel, strides=(1, 1), padding="SAME", numbers=NHWC, **options):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=numbers, **options
    )


def network(kernel_shape, images=IMAGES, features=6, **options):
    def loss(p, x, y):
        hidden = jnp.tanh(convolve(x, p["k"], **options) + p["b"])
        return cross_entropy(hidden.mean(tuple(range(1, hidden.ndim - 1))) @ p["c"], y)

    params = {"k": normal(*kernel_shape), "b": normal(features), "c": normal(features, 3)}
    return Case(loss, (params, images, Y))


def channels_first(p, x, y):
    numbers = ("NCHW", "OIHW", "NCHW")
    hidden = jnp.tanh(convolve(x, p["k"], numbers=numbers))
    return cross_entropy(hidden.mean((2, 3)) @ p["c"], y)


def kernel_used_twice(p, x, y):
    hidden = convolve(jnp.tanh(convolve(x, p["k"])), p["k"], (2, 2))
    return cross_entropy(jnp.tanh(hidden).mean((1, 2)) @ p["c"], y)


def kernel_flipped(p, x, y):
    hidden = convolve(x, p["k"][::-1, ::-1]).reshape(x.shape[0], -1, 6)
    return cross_entropy(jnp.tanh(hidden).mean(1) @ p["c"], y)


def layers_in_a_loop(p, x, y):
    step = lambda h, k: (jnp.tanh(convolve(h, k)), None)
    hidden, _ = jax.lax.scan(step, x, p["k"])
    return cross_entropy(hidden.mean((1, 2)) @ p["c"], y)


def one_kernel_in_a_loop(p, x, y):
    step = lambda h, _: (jnp.tanh(convolve(h, p["k"])), None)
    hidden, _ = jax.lax.scan(step, x, None, length=3)
    return cross_entropy(hidden.mean((1, 2)) @ p["c"], y)


def wide(p, x, y):
    """More channels than positions squared: measured by its pixels."""
    hidden = convolve(convolve(x, p["k"]), p["l"], (2, 2))
    return cross_entropy(jnp.tanh(hidden).mean((1, 2)) @ p["c"], y)


def standardised(p, x, y):
    hidden = jnp.tanh(convolve(x, standardize(p["k"])))
    return cross_entropy(hidden.mean((1, 2)) @ p["c"], y)


def wide_standardised(p, x, y):
    hidden = convolve(convolve(x, standardize(p["k"])), standardize(p["l"]), (2, 2))
    return cross_entropy(jnp.tanh(hidden).mean((1, 2)) @ p["c"], y)


def standardised_twice(p, x, y):
    kernel = standardize(p["k"])
    hidden = convolve(jnp.tanh(convolve(x, kernel)), kernel)
    return cross_entropy(jnp.tanh(hidden).mean((1, 2)) @ p["c"], y)


def standardised_otherwise(p, x, y):
    """Another formula than the one that is known."""
    k = (p["k"] - p["k"].mean((0, 1, 2))) / jnp.sqrt(p["k"].var((0, 1, 2)) + 1e-4)
    return cross_entropy(jnp.tanh(convolve(x, k)).mean((1, 2)) @ p["c"], y)


KERNEL = normal(3, 3, 4, 6)
ONE = {"k": KERNEL, "c": normal(6, 3)}
SAME = {"k": normal(3, 3, 4, 4), "c": normal(4, 3)}
WIDE = {"k": normal(3, 3, 24, 32, scale=0.1), "l": normal(3, 3, 32, 32, scale=0.1)}
WIDE["c"] = normal(32, 3)
# A constant channel has no variance to scale by, and a nearly constant one too little.
FLAT = {"k": KERNEL.copy(), "c": normal(6, 3)}
FLAT["k"][..., 0] = 0.3
FLAT["k"][..., 1] = 0.3 + 1e-4 * KERNEL[..., 1]

CASES = {
    "same": network((3, 3, 4, 6)),
    "strided": network((3, 3, 4, 6), strides=(2, 2)),
    "valid": network((3, 3, 4, 6), strides=(2, 1), padding="VALID"),
    "dilated": network((3, 3, 4, 6), rhs_dilation=(2, 2)),
    "transposed": network((3, 3, 4, 6), padding=[(2, 2), (2, 1)], lhs_dilation=(2, 2)),
    "grouped": network((3, 3, 2, 6), feature_group_count=2),
    "depthwise": network((3, 3, 1, 8), features=8, feature_group_count=4),
    "negative_padding": network((3, 3, 4, 6), padding=[(-1, 2), (0, -1)]),
    "one_by_one": network((1, 1, 4, 6)),
    "patches": network((3, 3, 4, 6), strides=(3, 3), padding="VALID"),
    "large_kernel": network((7, 7, 4, 6), padding="VALID"),
    "all_at_once": network(
        (3, 2, 2, 6),
        strides=(2, 1),
        padding=[(1, 3), (-1, 2)],
        lhs_dilation=(1, 2),
        rhs_dilation=(2, 1),
        feature_group_count=2,
    ),
    "one_axis": network(
        (3, 4, 6), normal(BATCH, 9, 4), strides=(2,), numbers=("NWC", "WIO", "NWC")
    ),
    "three_axes": network(
        (2, 2, 3, 2, 6),
        normal(BATCH, 4, 3, 4, 2),
        strides=(1, 2, 1),
        numbers=("NDHWC", "DHWIO", "NDHWC"),
    ),
    "channels_first": Case(
        channels_first, ({"k": normal(6, 4, 3, 3), "c": normal(6, 3)}, normal(BATCH, 4, 7, 7), Y)
    ),
    "kernel_used_twice": Case(kernel_used_twice, (SAME, IMAGES, Y)),
    "kernel_flipped": Case(kernel_flipped, (ONE, IMAGES, Y)),
    "layers_in_a_loop": Case(
        layers_in_a_loop, ({"k": normal(2, 3, 3, 4, 4), "c": normal(4, 3)}, IMAGES, Y)
    ),
    "one_kernel_in_a_loop": Case(one_kernel_in_a_loop, (SAME, IMAGES, Y)),
    "wide": Case(wide, (WIDE, normal(BATCH, 3, 3, 24), Y)),
    "standardised": Case(standardised, (ONE, IMAGES, Y)),
    "standardised_constant": Case(standardised, (FLAT, IMAGES, Y)),
    "standardised_twice": Case(standardised_twice, (SAME, IMAGES, Y)),
    "standardised_otherwise": Case(standardised_otherwise, (ONE, IMAGES, Y)),
    "wide_standardised": Case(wide_standardised, (WIDE, normal(BATCH, 3, 3, 24), Y)),
}


# Formulas are the same in both types; these are the ones that round most.
IN_FLOAT32 = ("strided", "layers_in_a_loop", "wide_standardised")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_jax_privacy(case):
    # A second pass, which is `jax.grad` of the loss, knows nothing of convolutions.
    check(case, "float64", [("book_keeping", None)])


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_equals_jax_privacy_in_float32(name):
    check_in(CASES[name], "float32")
