"""Weight standardisation, and what a gradient loses on its way back through it.

Every output channel of a kernel is shifted and scaled to mean 0 and variance 1 / fan-in before
it is used (Qiao et al. 2019; scaled as in Brock et al. 2021). That is a function of the
parameters alone, so unlike batch normalisation it couples no examples.

It stands in a module of its own because models use it and clipping knows it: the gradient of a
kernel is that of its standardised version with two directions projected out per channel, so its
norm follows from a few inner products (`squares_lost`).
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Keeps a constant kernel, which has no variance, finite.
_LEAST_VARIANCE = 1e-4


@jax.jit
def standardize(kernel: jax.Array) -> jax.Array:
    """A kernel whose output channels have mean 0 and variance 1 / fan-in each.

    Args:
        kernel: ``[..., channels out]``; the last axis is kept apart.

    Returns:
        At least float32, same shape: ``(w - mean) / sqrt(max(fan_in * variance, 1e-4))``.
    """
    weights = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    centred = _centred(weights)
    return centred * jax.lax.rsqrt(jnp.maximum(_squared_length(centred), _LEAST_VARIANCE))


def _centred(weights: jax.Array) -> jax.Array:
    over = tuple(range(weights.ndim - 1))
    return weights - jnp.mean(weights, axis=over, keepdims=True)


def _squared_length(centred: jax.Array) -> jax.Array:
    """Fan-in times variance of each output channel."""
    return jnp.sum(jnp.square(centred), axis=tuple(range(centred.ndim - 1)), keepdims=True)


class Scales(NamedTuple):
    """How a kernel's channels were scaled.

    Attributes:
        fan_in: Numbers of one output channel.
        scale: ``[channels out]``, what the centred channel was multiplied with.
        projected: ``[channels out]``, 1 where its direction carries no gradient, 0 where the
            channel is so nearly constant that it was scaled by a constant.
    """

    fan_in: int
    scale: jax.Array
    projected: jax.Array


def scales(kernel: jax.Array) -> Scales:
    """The scales of a kernel ``[..., channels out]``."""
    length = _squared_length(_centred(kernel)).reshape(-1)
    return Scales(
        fan_in=math.prod(kernel.shape[:-1]),
        scale=jax.lax.rsqrt(jnp.maximum(length, _LEAST_VARIANCE)),
        projected=(length > _LEAST_VARIANCE).astype(length.dtype),
    )


def squares_lost(scales: Scales, sums: jax.Array, inner: jax.Array) -> jax.Array:
    """By how much standardisation shortens a gradient that is scaled channel by channel.

    With w the standardised channel, of unit length and mean zero, the transposed Jacobian maps
    g to ``scale (g - mean(g) - w <w, g>)``: a projection, so squared lengths subtract.

    Args:
        scales: Of the kernel.
        sums: ``[channels out]``, sum of each channel's g.
        inner: ``[channels out]``, ``<w, g>`` of each channel.

    Returns:
        A scalar: squared norm of ``scale g`` less that of the parameter's gradient.
    """
    lost = jnp.square(sums) / scales.fan_in + scales.projected * jnp.square(inner)
    return jnp.sum(jnp.square(scales.scale) * lost)


@functools.lru_cache(maxsize=1024)
def _program(shape: tuple[int, ...], dtype: Any) -> str:
    jaxpr = jax.make_jaxpr(standardize)(jax.ShapeDtypeStruct(shape, dtype))
    return str(jaxpr.jaxpr.eqns[0].params["jaxpr"])


def is_standardize(eqn: Any) -> bool:
    """Whether an equation of a jaxpr is `standardize`, by what it computes and not by its name."""
    aval = eqn.invars[0].aval
    return (
        eqn.params.get("name") == "standardize"
        and jnp.issubdtype(aval.dtype, jnp.floating)
        and str(eqn.params["jaxpr"]) == _program(aval.shape, aval.dtype)
    )
