"""Networks composed at random, for Hypothesis."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests.trainer.clipping.comparison import labels, normal

WIDTH = 4
LENGTH = 6
VOCABULARY = 9

# A layer maps [batch, LENGTH, WIDTH] to the same shape: ``layer(params, x)``.
Layer = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A loss with its parameters.

    Attributes:
        name: What it is made of.
        loss: Of a batch.
        params: float64.
        tokens: Whether inputs are tokens, and not numbers.
    """

    name: str
    loss: Callable[..., Any]
    params: Any
    tokens: bool

    def inputs(self, size: int) -> np.ndarray:
        if self.tokens:
            return labels(size, LENGTH, classes=VOCABULARY)
        return normal(size, LENGTH, WIDTH, scale=1.0)


def _normalised(x: Any, axis: Any) -> Any:
    x = x - x.mean(axis, keepdims=True)
    return x * jax.lax.rsqrt((x**2).mean(axis, keepdims=True) + 1e-2)


def _dense(name: str) -> Layer:
    return lambda p, x: jnp.tanh(x @ p[name] + p["b"])


def _transposed(name: str) -> Layer:
    return lambda p, x: jnp.tanh(x @ p[name].T)


def _time_mixed(name: str) -> Layer:
    return lambda p, x: x + jnp.einsum("btd,ts->bsd", x, p[name])


def _convolution(name: str, options: dict[str, Any]) -> Layer:
    def layer(p: Any, x: Any) -> Any:
        h = jax.lax.conv_general_dilated(
            x, p[name], dimension_numbers=("NWC", "WIO", "NWC"), **options
        )
        # Back to the length, by repeating what is missing.
        return x + jnp.tanh(jnp.take(h, np.arange(LENGTH) % h.shape[1], axis=1))

    return layer


def _over_time(name: str) -> Layer:
    def layer(p: Any, x: Any) -> Any:
        def cell(h: Any, at: Any) -> Any:
            h = jnp.tanh(at @ p[name] + h * p["s"] + h @ p["w0"])
            return h, h

        start = jnp.zeros((x.shape[0], WIDTH), x.dtype)
        return jax.lax.scan(cell, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return layer


def _stacked(name: str, rematerialise: bool) -> Layer:
    step = lambda h, w: (h + jnp.tanh(h @ w), None)
    step = jax.checkpoint(step) if rematerialise else step
    return lambda p, x: jax.lax.scan(step, x, p[name])[0]


def _attention(name: str) -> Layer:
    def layer(p: Any, x: Any) -> Any:
        q, k, v = (x @ p[name][i] for i in range(3))
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2))
        return x + weights @ v @ p["w0"]

    return layer


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Up to four layers; weights may be shared with any that came before."""
    params: dict[str, Any] = {
        "w0": normal(WIDTH, WIDTH),
        "b": normal(WIDTH),
        "s": np.array(0.7),
        "c": normal(WIDTH, 3),
    }
    layers: list[Layer] = []
    names: list[str] = []

    def new(*shape: int, scale: float = 0.5) -> str:
        name = f"p{len(params)}"
        params[name] = normal(*shape, scale=scale, seed=len(params))
        return name

    def square() -> str:
        """A square weight, new or used before."""
        known = [name for name, leaf in params.items() if leaf.shape == (WIDTH, WIDTH)]
        return draw(st.sampled_from([*known, "new"]).map(str)) if draw(st.booleans()) else "new"

    kinds = ["dense", "transposed", "mixed", "conv", "scale", "norm", "time", "stack", "attention"]
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4)):
        names.append(kind)
        if kind in ("dense", "transposed", "time"):
            name = square()
            name = new(WIDTH, WIDTH) if name == "new" else name
            make = {"dense": _dense, "transposed": _transposed, "time": _over_time}[kind]
            layers.append(make(name))
        elif kind == "mixed":
            layers.append(_time_mixed(new(LENGTH, LENGTH)))
        elif kind == "conv":
            groups = draw(st.sampled_from([1, 2, 4]))
            taps = draw(st.integers(1, 3))
            low, high = draw(st.integers(-1, 2)), draw(st.integers(0, 2))
            options = {
                "window_strides": (draw(st.integers(1, 3)),),
                "padding": [(low, high)],
                "lhs_dilation": (draw(st.integers(1, 2)),),
                "rhs_dilation": (draw(st.integers(1, 2)),),
                "feature_group_count": groups,
            }
            layers.append(_convolution(new(taps, WIDTH // groups, WIDTH), options))
        elif kind == "scale":
            layers.append(lambda p, x: x * p["s"])
        elif kind == "norm":
            axis = draw(st.sampled_from([-1, (1, 2)]))
            layers.append(lambda p, x, axis=axis: _normalised(x, axis) * (1 + p["b"]))
        elif kind == "stack":
            layers.append(_stacked(new(3, WIDTH, WIDTH), draw(st.booleans())))
        else:
            layers.append(_attention(new(3, WIDTH, WIDTH)))
    tokens = draw(st.booleans())
    tied = tokens and draw(st.booleans())
    decay = draw(st.sampled_from([0.0, 0.1]))
    if tokens:
        params["table"] = normal(VOCABULARY, WIDTH)

    def loss(p: Any, x: Any) -> Any:
        h = p["table"][x] if tokens else x
        for layer in layers:
            h = layer(p, h)
        out = h @ (p["table"].T if tied else p["c"])
        # Another target for each column, so that no sum over columns is constant.
        value = jnp.mean(jax.nn.logsumexp(out, -1) - out[..., 0])
        return value + decay * jnp.sum(p["w0"] ** 2) if decay else value

    name = "-".join([*(["tokens"] if tokens else []), *names, *(["tied"] if tied else [])])
    return Network(name, loss, params, tokens)
