"""Clipping modes: groups, factors, and what they do to a sum, under every engine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.clipping.comparison import ENGINES, distance, length, normal, quick
from trainer.clipping import AUTOMATIC_STABILITY, clipped_grad
from trainer.clipping.modes import clip_factors, groups_of

MODES = ("flat", "per_layer", "automatic")
TREE = {
    "dense": {"kernel": normal(6, 5), "bias": normal(5)},
    "head": {"inner": {"kernel": normal(5, 3)}},
    "scale": np.array(1.5),
}


def loss(p, x):
    hidden = jnp.tanh(x @ p["dense"]["kernel"] + p["dense"]["bias"])
    return jnp.sum(hidden @ p["head"]["inner"]["kernel"] * p["scale"])


@given(
    norms=st.lists(
        st.one_of(
            st.sampled_from([0.0, 1e-38, 1e-30, 1e30, 3e38, np.inf, np.nan]),
            st.floats(0, 1e4, width=32),
        ),
        min_size=1,
        max_size=6,
    ),
    bound=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 7.3, 1e30]),
    mode=st.sampled_from(MODES),
    rescale=st.booleans(),
)
def test_factors_bound_the_whole(norms, bound, mode, rescale):
    groups = norms if mode == "per_layer" else norms[:1]
    factors = clip_factors(jnp.array(groups, jnp.float32), mode, bound, rescale)
    assert np.isfinite(factors).all()
    finite = np.isfinite(groups)
    assert not np.asarray(factors)[~finite].any()
    parts = np.asarray(factors, np.float64)[finite] * np.array(groups, np.float32)[finite]
    limit = 1.0 if rescale else bound
    # Each part has a relative rounding error of a few 6e-8.
    assert np.linalg.norm(parts) <= limit * (1 + 1e-6)


@given(st.floats(2**-30, 2**30, width=32), st.floats(2**-20, 2**20))
def test_formulas(norm, bound):
    factor = lambda mode, rescale: float(clip_factors(jnp.array([norm]), mode, bound, rescale)[0])
    assert factor("flat", False) == pytest.approx(min(1, bound / norm), rel=1e-6)
    assert factor("flat", True) == pytest.approx(min(1 / bound, 1 / norm), rel=1e-6)
    automatic = 1 / (norm + AUTOMATIC_STABILITY)
    assert factor("automatic", True) == pytest.approx(automatic, rel=1e-6)
    assert factor("automatic", False) == pytest.approx(bound * automatic, rel=1e-6)


def test_a_negative_bound_counts_as_zero():
    for mode in MODES:
        assert not clip_factors(jnp.ones(2), mode, jnp.float32(-1), False).any()


@pytest.mark.parametrize(
    ("tree", "groups"),
    [
        # Leaves in flattened order: dense/bias, dense/kernel, head/inner/kernel, scale.
        (TREE, (0, 0, 1, 2)),
        (np.zeros(3), (0,)),
        ([np.zeros(3), np.zeros(2)], (0, 1)),
        ({"a": {"x": np.zeros(1), "y": {"z": np.zeros(1)}}}, (0, 1)),
        (({"w": np.zeros(1)}, {"w": np.zeros(1)}), (0, 1)),
        ({}, ()),
    ],
)
def test_groups_are_what_shares_a_container(tree, groups):
    assert groups_of(tree, "per_layer").of_leaves == groups
    assert groups_of(tree, "per_layer").count == max(1, len(set(groups)))
    for mode in ("flat", "automatic"):
        assert groups_of(tree, mode).of_leaves == (0,) * len(groups)
        assert groups_of(tree, mode).count == 1


def by_hand(params, data, mode, bound):
    """One example at a time, in float64."""
    total = jax.tree.map(np.zeros_like, params)
    gradient = jax.jit(jax.grad(loss))
    for x in data:
        grads = jax.device_get(gradient(params, x[None]))
        # The leaves of a layer stand below one name each.
        parts = grads if mode == "per_layer" else {"all": grads}
        for name, part in parts.items():
            share, norm = bound / np.sqrt(len(parts)), length(part)
            factor = bound / (norm + 0.01) if mode == "automatic" else min(1, share / norm)
            parts[name] = jax.tree.map(lambda g, c=factor: c * g, part)
        bounded = parts if mode == "per_layer" else parts["all"]
        total = jax.tree.map(np.add, total, bounded)
    return total


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_sums_are_those_of_one_example_at_a_time(mode):
    data = normal(4, 6, scale=1.0)
    runs: list[Any] = [(engine, None, False) for engine in ENGINES]
    runs += [("book_keeping", 3, True), ("vmap", 3, True)]
    program = lambda p, x: [
        clipped_grad(
            loss,
            l2_clip_norm=1.7,
            mode=mode,
            engine=engine,
            rescale_to_unit_norm=rescale,
            microbatch_size=size,
        )(p, x)
        for engine, size, rescale in runs
    ]
    with jax.enable_x64(True):
        want = by_hand(TREE, data, mode, 1.7)
        gots = quick(program, TREE, data)
    for (*run, rescale), got in zip(runs, gots, strict=True):
        bounded = jax.tree.map(lambda t, r=rescale: t / 1.7 if r else t, want)
        assert distance(got, bounded) <= 1e-10 * length(bounded), run


@pytest.mark.slow
def test_norms_are_of_whole_gradients_in_every_mode():
    options: dict[str, Any] = {"l2_clip_norm": 0.1, "return_grad_norms": True}
    program = lambda p, x: [
        clipped_grad(loss, mode=mode, engine=engine, **options)(p, x)[1].grad_norms
        for mode in MODES
        for engine in ENGINES
    ]
    flat, *others = quick(program, TREE, normal(4, 6).astype(np.float32))
    for other in others:
        np.testing.assert_allclose(other, flat, rtol=1e-6)
