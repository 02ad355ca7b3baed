"""Convolutions: a kernel in a ``conv_general_dilated``.

A kernel's gradient is a sum over output positions ``o`` of ``patch_o (x) delta_o``. Neither
patches nor grouped convolutions are needed for it:

* formed, it is one small matrix product for each of the kernel's taps, between a shifted view of
  the input and the cotangent;
* measured, the inner product of two patches is a sum over taps of inner products of *pixels*,
  ``<patch_o, patch_p> = sum_t <x_{o+t}, x_{p+t}>``. So one Gram matrix of pixels serves all taps,
  and its cost does not grow with the kernel's area as that of patches would.

Strides, dilation of the kernel (atrous) and of the input (transposed convolutions), any padding
and any number of spatial axes are all but another set of views.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping.uses.gram import MEASURING, Measured
from trainer.clipping.uses.use import Use, widened

# Below this many numbers a patch is copied out, so that all taps are one matrix product.
_SMALL_PATCH = 128

# A multiply-add outside of a matrix product takes about as long as this many inside.
_ELEMENTWISE_COST = 150


@dataclasses.dataclass(frozen=True)
class Convolution(Use):
    """A ``conv_general_dilated`` with the kernel as its right operand.

    Attributes:
        params: The equation's parameters.
        kernel_shape: As the equation has it.
    """

    params: Any
    kernel_shape: tuple[int, ...]

    @classmethod
    def of(cls, eqn: Any) -> "Convolution | None":
        """The convolution of an equation, or None where parts of the batch have own kernels."""
        if eqn.params["batch_group_count"] != 1:
            return None
        return cls(eqn.params, eqn.invars[1].aval.shape)

    def saved(self, operands: Sequence[jax.Array], output: jax.Array) -> tuple[jax.Array, ...]:
        """The input."""
        return (operands[0],)

    def operand_grad(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """A matrix product for each tap."""
        form = _mapped(self._formed, kept)
        return form(widened(saved[0]), widened(delta))

    def operand_grad_sum(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """The convolution's own transpose; inside loops as for one example."""
        if any(kept):
            return super().operand_grad_sum(saved, delta, kept)
        return self._transposed(widened(saved[0]), widened(delta))

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """One multiply-add for each number of the output, tap and input channel of its group."""
        return delta.size * math.prod(self._taps) * self._channels_in

    def gram(
        self,
        saved: tuple[jax.Array, ...],
        delta: jax.Array,
        kept: tuple[bool, ...],
        axes: tuple[Any, ...],
        parameter: jax.Array,
    ) -> "PixelGram | None":
        """How to measure it; grouped kernels, which are small, are formed instead."""
        (data,) = saved
        if self._groups != 1:
            return None
        lead = len(kept)
        order = sorted(range(lead), key=lambda axis: not kept[axis])
        data, delta = (x.transpose([*order, *range(lead, x.ndim)]) for x in (data, delta))
        pixels, delta = self._channels_last(data, lead), self.outputs_last(delta, lead)
        stack = math.prod(data.shape[: sum(kept)])
        pixels, delta = (x.reshape(stack, -1, *x.shape[lead + 1 :]) for x in (pixels, delta))
        return PixelGram(self, pixels, delta)

    @property
    def _groups(self) -> int:
        return self.params["feature_group_count"]

    @property
    def _taps(self) -> tuple[int, ...]:
        """The kernel's spatial sizes."""
        return tuple(self.kernel_shape[i] for i in self.params["dimension_numbers"].rhs_spec[2:])

    @property
    def _channels_in(self) -> int:
        """Input channels of one group."""
        return self.kernel_shape[self.params["dimension_numbers"].rhs_spec[1]]

    def _channels_last(self, data: jax.Array, lead: int) -> jax.Array:
        batch, channels, *spatial = self.params["dimension_numbers"].lhs_spec
        order = [lead + axis for axis in (batch, *spatial, channels)]
        return data.transpose([*range(lead), *order])

    def outputs_last(self, delta: jax.Array, lead: int) -> jax.Array:
        """An output as ``[*leading axes, batch, *spatial, channels]``."""
        batch, channels, *spatial = self.params["dimension_numbers"].out_spec
        order = [lead + axis for axis in (batch, *spatial, channels)]
        return delta.transpose([*range(lead), *order])

    def _transposed(self, data: jax.Array, delta: jax.Array) -> jax.Array:
        """Summed over all leading axes, which join the convolution's batch."""
        numbers = self.params["dimension_numbers"]
        data, delta = (
            _joined(x, x.ndim - len(self.kernel_shape), spec[0])
            for x, spec in ((data, numbers.lhs_spec), (delta, numbers.out_spec))
        )
        params = {**self.params, "preferred_element_type": None}
        convolve = lambda kernel: jax.lax.conv_general_dilated_p.bind(data, kernel, **params)
        zero = jnp.zeros(self.kernel_shape, data.dtype)
        _, transpose = jax.vjp(convolve, zero)
        return transpose(delta)[0]

    def _formed(self, data: jax.Array, delta: jax.Array) -> jax.Array:
        """The same, tap by tap."""
        lead = data.ndim - len(self.kernel_shape)
        pixels, delta = self._channels_last(data, lead), self.outputs_last(delta, lead)
        pixels, delta = (x.reshape(-1, *x.shape[lead + 1 :]) for x in (pixels, delta))
        groups, channels_in = self._groups, self._channels_in
        positions = math.prod(delta.shape[:-1])
        # Positions last on the left: a contraction over the first axis of both is slow.
        delta = delta.reshape(positions, groups, -1).transpose(1, 2, 0)
        axes = range(1, 1 + len(self._taps))

        def product(view: jax.Array) -> jax.Array:
            rows = view.reshape(positions, groups, -1)
            if groups == 1:
                return jnp.matmul(delta[0], rows[:, 0], precision=MEASURING)[None]
            return jnp.matmul(delta, rows.swapaxes(0, 1), precision=MEASURING)

        if math.prod(self._taps) * channels_in <= _SMALL_PATCH:
            patches = [view.reshape(positions, groups, -1) for view in self.views(pixels, axes)]
            grads = product(jnp.concatenate(patches, axis=-1))
            grads = grads.reshape(groups, -1, math.prod(self._taps), channels_in)
        else:
            # One tap after another: a compiler that sees them all at once copies all views.
            padded = self._padded(pixels, axes)
            step = lambda _, tap: (None, product(self._dynamic_view(padded, tap)))
            taps = jnp.array(list(itertools.product(*map(range, self._taps))), jnp.int32)
            _, by_tap = jax.lax.scan(step, None, taps)
            grads = jnp.moveaxis(by_tap, 0, 2)
        # [groups, out of a group, taps, in] -> [out, *taps, in] -> the equation's order.
        kernel = grads.reshape(-1, *self._taps, channels_in)
        out_axis, in_axis, *tap_axes = self.params["dimension_numbers"].rhs_spec
        order = [out_axis, *tap_axes, in_axis]
        return kernel.transpose([order.index(axis) for axis in range(kernel.ndim)])

    def _padded(self, pixels: jax.Array, *spatial: Sequence[int]) -> jax.Array:
        padding = [(0, 0, 0)] * pixels.ndim
        for axes in spatial:
            for axis, (low, high), dilation in zip(
                axes, self.params["padding"], self.params["lhs_dilation"], strict=True
            ):
                padding[axis] = (low, high, dilation - 1)
        return jax.lax.pad(pixels, jnp.zeros((), pixels.dtype), padding)

    def _dynamic_view(self, padded: jax.Array, tap: jax.Array) -> jax.Array:
        """What one tap sees, of ``[batch, *spatial, channels]``; the tap's place is data."""
        start, size, step = [jnp.int32(0)], [padded.shape[0]], [1]
        for axis, (length, dilation, stride) in enumerate(
            zip(
                self._taps, self.params["rhs_dilation"], self.params["window_strides"], strict=True
            )
        ):
            start.append(tap[axis] * dilation)
            size.append(padded.shape[1 + axis] - (length - 1) * dilation)
            step.append(stride)
        view = jax.lax.dynamic_slice(padded, [*start, jnp.int32(0)], [*size, padded.shape[-1]])
        return jax.lax.slice(view, [0] * view.ndim, view.shape, [*step, 1])

    def views(self, pixels: jax.Array, *spatial: Sequence[int]) -> Iterator[jax.Array]:
        """For each tap what it sees: an array with the output's positions for the pixels.

        Args:
            pixels: An array with one or several sets of the input's spatial axes.
            *spatial: The axes of each set; all are shifted alike.
        """
        padded = self._padded(pixels, *spatial)
        for tap in itertools.product(*map(range, self._taps)):
            start, stop, step = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
            for axes in spatial:
                for axis, at, size, dilation, stride in zip(
                    axes,
                    tap,
                    self._taps,
                    self.params["rhs_dilation"],
                    self.params["window_strides"],
                    strict=True,
                ):
                    start[axis] = at * dilation
                    stop[axis] = padded.shape[axis] - (size - 1 - at) * dilation
                    step[axis] = stride
            yield jax.lax.slice(padded, start, stop, step)


@dataclasses.dataclass(frozen=True)
class PixelGram:
    """A kernel's gradient for its measurement.

    Attributes:
        convolution: Where it is from.
        pixels: The input ``[stack, batch, *spatial, channels]``.
        delta: The output's cotangent ``[stack, batch, *spatial, channels]``.
    """

    convolution: Convolution
    pixels: jax.Array
    delta: jax.Array

    @property
    def cost(self) -> float:
        """Two Gram matrices, and a pass over the second for each tap."""
        taps = math.prod(self.convolution._taps)
        stack, *places, channels_in = self.pixels.shape
        _, *positions, channels_out = self.delta.shape
        squared = math.prod(positions) ** 2
        return stack * (
            math.prod(places) ** 2 * channels_in
            + squared * (channels_out + taps * _ELEMENTWISE_COST)
        )

    def measure(self) -> Measured:
        """Sums the products of both Gram matrices over all pairs of output positions."""
        parts = jax.vmap(self._measure_one)(self.pixels, self.delta)
        return Measured(parts.squared_norm.sum(), parts.squared_terms.sum())

    def patch_sums(self) -> jax.Array:
        """What each patch adds up to, ``[batch, *spatial]`` of the output; without a stack."""
        sums = jnp.sum(widened(self.pixels[0]), axis=-1)
        return sum(self.convolution.views(sums, range(1, sums.ndim)), start=jnp.zeros(()))

    def _measure_one(self, pixels: jax.Array, delta: jax.Array) -> Measured:
        rank = pixels.ndim - 2
        pixel_gram, delta_gram = _gram(pixels), _gram(delta)
        here, there = range(1, 1 + rank), range(2 + rank, 2 + 2 * rank)
        patch_gram = sum(self.convolution.views(pixel_gram, here, there))
        squares = jnp.sum(jnp.square(widened(pixels)), axis=-1)
        patch_squares = sum(self.convolution.views(squares, here))
        delta_squares = jnp.sum(jnp.square(widened(delta)), axis=-1)
        return Measured(jnp.sum(patch_gram * delta_gram), jnp.sum(patch_squares * delta_squares))


def _gram(values: jax.Array) -> jax.Array:
    """Inner products over the last axis, of all pairs of places."""
    return jax.lax.dot_general(
        values,
        values,
        (((values.ndim - 1,), (values.ndim - 1,)), ((), ())),
        precision=MEASURING,
        preferred_element_type=jnp.promote_types(values.dtype, jnp.float32),
    )


def _mapped(fn: Callable[..., jax.Array], kept: tuple[bool, ...]) -> Callable[..., jax.Array]:
    """The function with the kept ones of its arguments' leading axes mapped over."""
    for axis, stays in reversed(list(enumerate(kept))):
        if stays:
            fn = jax.vmap(fn, in_axes=axis - sum(kept[:axis]))
    return fn


def _joined(x: jax.Array, lead: int, batch: int) -> jax.Array:
    """Leading axes merged into the batch axis."""
    moved = jnp.moveaxis(x, lead + batch, lead)
    merged = moved.reshape(-1, *moved.shape[lead + 1 :])
    return jnp.moveaxis(merged, 0, batch)
