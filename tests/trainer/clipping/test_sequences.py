"""Equality with jax-privacy: loops over time and layers, embeddings, attention, normalisation."""

import jax
import jax.numpy as jnp
import pytest

from tests.trainer.clipping.comparison import BATCH, Case, check_in, cross_entropy, labels, normal

X, ROWS, Y = normal(BATCH, 6), normal(BATCH, 7, 6), labels(BATCH)
TOKENS = labels(BATCH, 9, classes=11)


def recurrent(p, x, y):
    """Constant weights and a learned initial state."""

    def cell(h, at):
        h = jnp.tanh(at @ p["wx"] + h @ p["wh"] + p["b"])
        return h, h

    start = jnp.broadcast_to(p["start"], (x.shape[0], 5))
    h, hs = jax.lax.scan(cell, start, x.swapaxes(0, 1))
    return cross_entropy(h @ p["c"] + hs.mean(0) @ p["c"], y)


def reversed_time(p, x, y):
    def cell(h, at):
        return jnp.tanh(at @ p["wx"] + h * p["b"]), None

    start = jnp.zeros((x.shape[0], 5), x.dtype)
    h, _ = jax.lax.scan(cell, start, x.swapaxes(0, 1), reverse=True, unroll=2)
    return cross_entropy(h @ p["c"], y)


def layer(h, w):
    return jnp.tanh(h @ w["w"] + w["b"]), None


def layers(p, x, y):
    h, _ = jax.lax.scan(layer, x, p["layers"])
    return cross_entropy(h.mean(1) @ p["c"], y)


def rematerialised(p, x, y):
    h, _ = jax.lax.scan(jax.checkpoint(layer), x, p["layers"])
    return cross_entropy(h.mean(1) @ p["c"], y)


def loop_in_a_loop(p, x, y):
    """For each layer a loop over time: one weight varies with the outer loop only."""

    def outer(xs, w):
        def inner(h, at):
            h = jnp.tanh(at @ w + h @ p["wh"])
            return h, h

        _, hs = jax.lax.scan(inner, jnp.zeros((xs.shape[1], 6), xs.dtype), xs)
        return hs, None

    hs, _ = jax.lax.scan(outer, x.swapaxes(0, 1), p["ws"])
    return cross_entropy(hs.mean(0) @ p["c"], y)


def weights_made_in_the_loop(p, x, y):
    """A carry of parameters alone: each iteration has the weight of the one before, doubled."""

    def step(carry, _):
        h, w = carry
        return (jnp.tanh(h @ w), w * 1.1 + p["b"]), None

    (h, _), _ = jax.lax.scan(step, (x, p["w"]), None, length=3)
    return cross_entropy(h.mean(1) @ p["c"], y)


def weights_chosen_by_number(p, x, y):
    """Layers picked out of a stack by the loop's counter."""
    step = lambda i, h: jnp.tanh(h @ p["layers"]["w"][i] + p["layers"]["b"][i])
    return cross_entropy(jax.lax.fori_loop(0, 4, step, x).mean(1) @ p["c"], y)


def tied(p, tokens):
    """The table is looked up at the bottom and is the weight at the top."""
    h = jnp.tanh((p["E"][tokens] + p["pos"]) @ p["w"])
    logits = jax.nn.log_softmax(h @ p["E"].T)
    return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], 2))


def looked_up_in_a_loop(p, tokens):
    def cell(h, token):
        return jnp.tanh(h @ p["w"] + p["E"][token]), None

    start = jnp.zeros((tokens.shape[0], 4), p["w"].dtype)
    h, _ = jax.lax.scan(cell, start, tokens.swapaxes(0, 1))
    return jnp.mean(h**2) + jnp.mean(h @ p["c"])


def taken(p, tokens):
    # Out of bounds: filled with NaN by `take`, clipped by indexing; here wrapped or dropped.
    rows = jnp.take(p, tokens - 4, axis=0, mode="fill", fill_value=0)
    return jnp.mean(jnp.tanh(rows + p.at[tokens + 3].get(mode="clip")) ** 2)


def attention(p, x, y):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
    mixed = jnp.einsum("bhqs,bshk->bqhk", weights, v)
    return cross_entropy(jnp.einsum("bqhk,hkd->bqd", mixed, p["o"]).mean(1) @ p["c"], y)


def normalised(x, p, axis):
    x = x - x.mean(axis, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axis, keepdims=True) + 1e-5) * p["scale"] + p["shift"]


def layer_norm(p, x, y):
    return cross_entropy(normalised(jnp.tanh(x @ p["a"]), p, -1).mean(1) @ p["c"], y)


def group_norm(p, x, y):
    groups = (x @ p["a"]).reshape(-1, 7, 2, 3)
    hidden = normalised(groups, {"scale": 1, "shift": 0}, (1, 3)).reshape(-1, 7, 6)
    return cross_entropy(jnp.tanh(hidden * p["scale"] + p["shift"]).mean(1) @ p["c"], y)


LAYERS = {"layers": {"w": normal(4, 6, 6), "b": normal(4, 6)}, "c": normal(6, 3)}
NORM = {"a": normal(6, 6), "scale": 1 + normal(6), "shift": normal(6, seed=1), "c": normal(6, 3)}
WX = {"wx": normal(6, 5), "b": normal(5), "c": normal(5, 3)}
ATTENTION = {name: normal(6, 2, 4, seed=i) for i, name in enumerate("qkv")}
TABLE = normal(11, 4)
CASES = {
    "recurrent": Case(recurrent, ({**WX, "wh": normal(5, 5), "start": normal(5)}, ROWS, Y)),
    "reversed_time": Case(reversed_time, (WX, ROWS, Y)),
    "layers": Case(layers, (LAYERS, ROWS, Y)),
    "rematerialised": Case(rematerialised, (LAYERS, ROWS, Y)),
    "loop_in_a_loop": Case(
        loop_in_a_loop, ({"ws": normal(2, 6, 6), "wh": normal(6, 6), "c": normal(6, 3)}, ROWS, Y)
    ),
    "weights_made_in_the_loop": Case(
        weights_made_in_the_loop,
        ({"w": normal(6, 6), "b": normal(6, 6, seed=1), "c": normal(6, 3)}, ROWS, Y),
    ),
    "weights_chosen_by_number": Case(weights_chosen_by_number, (LAYERS, ROWS, Y)),
    "tied": Case(tied, ({"E": TABLE, "pos": normal(9, 4), "w": normal(4, 4)}, TOKENS)),
    "take": Case(lambda p, t: jnp.mean(jnp.tanh(jnp.take(p, t, axis=0)) ** 2), (TABLE, TOKENS)),
    "take_columns": Case(
        lambda p, t: jnp.mean(jnp.tanh(jnp.take(p, t, axis=1)) ** 2), (normal(4, 11), TOKENS)
    ),
    "mapped_look_up": Case(
        lambda p, t: jnp.mean(jnp.tanh(jax.vmap(jax.vmap(lambda i: p[i]))(t)) ** 2),
        (TABLE, TOKENS),
    ),
    "look_up_of_blocks": Case(
        lambda p, t: jnp.mean(jnp.tanh(p[t]) ** 2), (normal(11, 2, 3), TOKENS)
    ),
    "look_up_in_a_loop": Case(
        looked_up_in_a_loop, ({"E": TABLE, "w": normal(4, 4), "c": normal(4, 2)}, TOKENS)
    ),
    "out_of_bounds": Case(taken, (TABLE, TOKENS)),
    "attention": Case(
        attention, ({**ATTENTION, "o": normal(2, 4, 6), "c": normal(6, 3)}, ROWS, Y)
    ),
    "layer_norm": Case(layer_norm, (NORM, ROWS, Y)),
    "group_norm": Case(group_norm, (NORM, ROWS, Y)),
}


# Formulas are the same in both types; these are the ones that round most.
IN_FLOAT32 = ("recurrent", "layers", "tied", "attention")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_jax_privacy(case):
    check_in(case, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FLOAT32)
def test_equals_jax_privacy_in_float32(name):
    check_in(CASES[name], "float32")
