"""Equality with jax-privacy: weights in contractions, odd uses of parameters, own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.clipping.comparison import (
    BATCH,
    ENGINES,
    MICROBATCH,
    Case,
    check,
    check_in,
    cross_entropy,
    labels,
    normal,
)

X, ROWS, Y = normal(BATCH, 6), normal(BATCH, 7, 6), labels(BATCH)


def mlp(p, x, y):
    return cross_entropy(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"], y)


MLP = {"a": normal(6, 5), "b": normal(5), "c": normal(5, 3)}


def tanh_mlp(p, x, y):
    return cross_entropy(jnp.tanh(x @ p["a"]) @ p["c"], y)


def shared(p, x, y):
    hidden = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["a"].T @ p["a"])
    return cross_entropy(hidden @ p["c"], y)


def shared_over_rows(p, x, y):
    hidden = jnp.tanh(jnp.tanh(x @ p["a"]) @ p["a"].T @ p["a"])
    return cross_entropy(hidden.mean(1) @ p["c"], y)


def shared_in_another_shape(p, x, y):
    # Once as [6, 6], once cut into heads: two views that no common order of axes has.
    hidden = jnp.tanh(x @ p["a"]).reshape(-1, 7, 2, 3)
    hidden = jnp.einsum("btgd,dgm->btm", hidden, p["a"].reshape(3, 2, 6))
    return cross_entropy(hidden.mean(1) @ p["c"], y)


def heads(p, x, y):
    hidden = jnp.tanh(jnp.einsum("btd,dhk->bthk", x, p["q"]))
    return cross_entropy(jnp.einsum("bthk,hkm->btm", hidden, p["o"]).mean(1), y)


def grouped_linear(p, x, y):
    groups = x.reshape(-1, 7, 2, 3)
    return cross_entropy(jnp.einsum("btgd,gdm->btm", groups, p["g"]).mean(1), y)


def lora(p, x, y):
    return cross_entropy(x @ (p["w"] + p["a"] @ p["b"]), y)


def weight_first(p, x, y):
    return cross_entropy((p["w"] @ x.swapaxes(1, 2)).mean(2), y)


def weight_decay(p, x, y):
    return cross_entropy(x @ p["a"], y) + 0.1 * jnp.sum(p["a"] ** 2) + 0 * p["unused"].sum()


def conditional(p, x):
    return jax.lax.cond(
        x.sum() > 0, lambda: jnp.sum(jnp.tanh(x @ p)), lambda: jnp.sum(p**2 * x.mean())
    )


def iterated(p, x):
    # `while` has no reverse mode; `fori_loop` of known length becomes a scan, which has.
    step = lambda _, h: jnp.tanh(h @ p)
    return jnp.sum(jax.lax.fori_loop(0, 3, step, x) ** 2)


@jax.custom_jvp
def odd_tangent(w, x):
    return jnp.tanh(x @ w)


@odd_tangent.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return odd_tangent(w, x), 2 * (dx @ w) + 3 * x @ dw


@jax.custom_vjp
def odd_cotangent(w, x):
    return jnp.tanh(x @ w)


odd_cotangent.defvjp(
    lambda w, x: (odd_cotangent(w, x), (w, x)),
    lambda saved, g: (saved[1].T @ g * 2, g @ saved[0].T),
)


def frozen(p, x, y):
    return cross_entropy(jnp.tanh(x @ jax.lax.stop_gradient(p["a"]) + p["b"]) @ p["c"], y)


def of_own_gradient(p, x):
    # A penalty on the gradient by the input: derivatives of derivatives.
    slope = jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["c"]))(x)
    return jnp.sum(slope**2) + jnp.sum(x @ p["a"])


def gated(p, x, y):
    # A weight whose use depends on data: it varies per example and yet meets no contraction.
    gate = jax.nn.sigmoid(x @ p["gate"])
    return cross_entropy(gate * (x @ p["a"]) * p["scale"] / (1 + p["scale"] ** 2), y)


AC = {"a": normal(6, 5), "c": normal(5, 3)}
SQUARE = {"a": normal(6, 6), "c": normal(6, 3)}
CASES = {
    "mlp": Case(mlp, (MLP, X, Y)),
    "shared": Case(shared, (SQUARE, X, Y)),
    "shared_over_rows": Case(shared_over_rows, (AC, ROWS, Y)),
    "shared_in_another_shape": Case(shared_in_another_shape, (SQUARE, ROWS, Y)),
    "heads": Case(heads, ({"q": normal(6, 2, 5), "o": normal(2, 5, 3)}, ROWS, Y)),
    "grouped_linear": Case(grouped_linear, ({"g": normal(2, 3, 3)}, ROWS, Y)),
    "lora": Case(lora, ({"w": normal(6, 3), "a": normal(6, 2), "b": normal(2, 3)}, X, Y)),
    "weight_first": Case(weight_first, ({"w": normal(3, 6)}, ROWS, Y)),
    "weight_decay": Case(weight_decay, ({"a": normal(6, 3), "unused": normal(2)}, X, Y)),
    "scalar": Case(lambda p, x: jnp.mean((p * x - 1) ** 2), (np.array(0.7), X)),
    "parameters_only": Case(lambda p, x: jnp.sum(p**2), (normal(3), X)),
    "cond": Case(conditional, (normal(6, 2), X)),
    "fori_loop": Case(iterated, (normal(6, 6), X)),
    "custom_jvp": Case(
        lambda p, x, y: cross_entropy(odd_tangent(p["a"], x) @ p["c"], y), (AC, X, Y)
    ),
    "custom_vjp": Case(
        lambda p, x, y: cross_entropy(odd_cotangent(p["a"], x) @ p["c"], y), (AC, X, Y)
    ),
    "stop_gradient": Case(frozen, (MLP, X, Y)),
    "own_gradient": Case(of_own_gradient, (AC, X)),
    "gated": Case(
        gated, ({"a": normal(6, 3), "gate": normal(6, 3, seed=1), "scale": np.ones(3)}, X, Y)
    ),
    "several_examples": Case(
        tanh_mlp, (AC, normal(BATCH, 4, 6), labels(BATCH, 4)), {"keep_batch_dim": False}
    ),
    "rescaled": Case(tanh_mlp, (AC, X, Y), {"rescale_to_unit_norm": True, "normalize_by": 3.0}),
    "clip_norm_zero": Case(tanh_mlp, (AC, X, Y), {"l2_clip_norm": 0.0}),
    "clip_norm_infinite": Case(tanh_mlp, (AC, X, Y), {"l2_clip_norm": np.inf}),
}


# Formulas are the same in both types; these are the ones that round most.
IN_FLOAT32 = ("mlp", "heads", "weight_decay", "rescaled")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_jax_privacy(case):
    check_in(case, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_equals_jax_privacy_in_float32(name):
    check_in(CASES[name], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_engine_whole_and_in_parts(dtype):
    runs = [(engine, size) for engine in ENGINES for size in (None, MICROBATCH)]
    check(CASES["shared_over_rows"], dtype, runs)
