"""Norms of a convolution's kernel gradient, without holding it.

Two ways. *Pixels*: the inner product of two patches is a sum over the kernel's taps of inner
products of pixels, ``<patch_o, patch_p> = sum_t <x_{o+t}, x_{p+t}>``; so one Gram matrix of pixels
serves all taps, and its cost does not grow with the kernel's area as that of patches would.
*Taps*: the gradient is computed one tap after another, each reduced as soon as it exists. Pixels
win where an image is small and a kernel large, in the late layers of a network; taps elsewhere.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from trainer.clipping.uses.gram import MEASURING, Measured, sum_of_terms
from trainer.clipping.uses.use import widened

# A multiply-add outside of a matrix product takes about as long as this many inside.
_ELEMENTWISE_COST = 150


class Kernel(Protocol):
    """What is asked of a convolution here; see `trainer.clipping.uses.convolution`."""

    @property
    def groups(self) -> int:
        """How many groups the channels are in."""
        ...

    @property
    def taps(self) -> tuple[int, ...]:
        """The kernel's spatial sizes."""
        ...

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """Multiply-adds of the gradient."""
        ...

    def channels_last(self, data: jax.Array, lead: int) -> jax.Array:
        """An input with its channels as the last axis."""
        ...

    def outputs_last(self, delta: jax.Array, lead: int) -> jax.Array:
        """An output with its channels as the last axis."""
        ...

    def views(self, pixels: jax.Array, *spatial: Sequence[int]) -> Iterator[jax.Array]:
        """For each tap what it sees."""
        ...

    def over_taps(
        self, data: jax.Array, delta: jax.Array, fold: Any, start: Any
    ) -> tuple[Any, Any]:
        """Folds the gradient tap by tap."""
        ...


class ByPixels(NamedTuple):
    """A kernel's gradient for its measurement by pixels; one group only.

    Attributes:
        kernel: The convolution.
        pixels: The input ``[batch, *spatial, channels]``.
        delta: The output's cotangent ``[batch, *spatial, channels]``.
    """

    kernel: Kernel
    pixels: jax.Array
    delta: jax.Array

    @property
    def cost(self) -> float:
        """Two Gram matrices, and a pass over the second for each tap."""
        *places, channels_in = self.pixels.shape
        *positions, channels_out = self.delta.shape
        passes = math.prod(self.kernel.taps) * _ELEMENTWISE_COST
        return math.prod(places) ** 2 * channels_in + math.prod(positions) ** 2 * (
            channels_out + passes
        )

    def measure(self) -> Measured:
        """Sums the products of both Gram matrices over all pairs of output positions."""
        return self._measure(self.delta)

    def measure_channels(self, scale: jax.Array) -> tuple[Measured, jax.Array]:
        """With the gradient's output channels scaled, and the sum of each before that.

        Args:
            scale: ``[channels out]``.
        """
        patch_sums = self._over_taps(jnp.sum(widened(self.pixels), axis=-1))
        channels = self.delta.shape[-1]
        sums = patch_sums.reshape(-1) @ widened(self.delta).reshape(-1, channels)
        # Scaled channels of the cotangent are scaled channels of the gradient.
        return self._measure(self.delta * scale), sums

    def _measure(self, delta: jax.Array) -> Measured:
        rank = delta.ndim - 2
        here, there = range(1, 1 + rank), range(2 + rank, 2 + 2 * rank)
        patch_gram = self._over_taps(_gram(self.pixels), here, there)
        patch_squares = self._over_taps(jnp.sum(jnp.square(widened(self.pixels)), axis=-1))
        delta_squares = jnp.sum(jnp.square(widened(delta)), axis=-1)
        terms = sum_of_terms((patch_squares, delta_squares))
        return Measured(jnp.sum(patch_gram * _gram(delta)), terms)

    def _over_taps(self, pixels: jax.Array, *spatial: Sequence[int]) -> jax.Array:
        """The sum of what all taps see."""
        views = list(self.kernel.views(pixels, *(spatial or [range(1, pixels.ndim)])))
        return functools.reduce(jnp.add, views)


class ByTaps(NamedTuple):
    """A kernel's gradient for its measurement tap by tap.

    Attributes:
        kernel: The convolution.
        data: The input, as the convolution has it.
        delta: The output's cotangent, likewise.
    """

    kernel: Kernel
    data: jax.Array
    delta: jax.Array

    @property
    def cost(self) -> float:
        """That of the gradient."""
        return self.kernel.cost((self.data,), self.delta)

    def measure(self) -> Measured:
        """Adds up the squares of each tap."""
        squares, _ = self._moments()
        return Measured(squares.sum(), squares.sum())

    def measure_channels(self, scale: jax.Array) -> tuple[Measured, jax.Array]:
        """As `ByPixels.measure_channels`."""
        squares, sums = self._moments()
        scaled = jnp.sum(jnp.square(scale) * squares)
        return Measured(scaled, scaled), sums

    def _moments(self) -> tuple[jax.Array, jax.Array]:
        """Of each output channel the squared norm and the sum."""

        def fold(carry: tuple[jax.Array, jax.Array], tap: jax.Array) -> tuple[Any, None]:
            squares, sums = carry
            added = jnp.sum(jnp.square(tap), axis=-1).reshape(-1)
            return (squares + added, sums + jnp.sum(tap, axis=-1).reshape(-1)), None

        data, delta = widened(self.data), widened(self.delta)
        zeros = jnp.zeros(self.kernel.outputs_last(delta, 0).shape[-1], delta.dtype)
        return self.kernel.over_taps(data, delta, fold, (zeros, zeros))[0]


def kernel_gradient(kernel: Kernel, data: jax.Array, delta: jax.Array) -> ByPixels | ByTaps:
    """The cheaper way to measure a kernel's gradient.

    Args:
        kernel: The convolution.
        data: One example's input.
        delta: Its output's cotangent.
    """
    taps = ByTaps(kernel, data, delta)
    if kernel.groups != 1:
        return taps
    pixels = ByPixels(kernel, kernel.channels_last(data, 0), kernel.outputs_last(delta, 0))
    return pixels if pixels.cost < taps.cost else taps


def _gram(values: jax.Array) -> jax.Array:
    """Inner products over the last axis, of all pairs of places."""
    last = values.ndim - 1
    return jax.lax.dot_general(
        values,
        values,
        (((last,), (last,)), ((), ())),
        precision=MEASURING,
        preferred_element_type=jnp.promote_types(values.dtype, jnp.float32),
    )
