"""Convolutions: a kernel in a ``conv_general_dilated``.

A kernel's gradient is a sum over output positions of the patch there times the cotangent. Neither
patches nor grouped convolutions are needed for one example's: it is one small matrix product for
each of the kernel's taps, between a shifted view of the input and the cotangent.

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

from trainer.clipping.uses.gram import MEASURING
from trainer.clipping.uses.kernel_norms import ByPixels, ByTaps, kernel_gradient
from trainer.clipping.uses.use import Use, widened

# Below this many numbers a patch is copied out, so that all taps are one matrix product.
_SMALL_PATCH = 128

FoldFn = Callable[[Any, jax.Array], tuple[Any, Any]]


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
        # On a CPU the transpose takes up to twice as long as the taps, and forty times as long
        # in a loop over steps or microbatches.
        return jax.lax.platform_dependent(
            widened(saved[0]), widened(delta), cpu=self._formed, default=self._transposed
        )

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """One multiply-add for each number of the output, tap and input channel of its group."""
        return delta.size * math.prod(self.taps) * self.channels_in

    def gram(
        self,
        saved: tuple[jax.Array, ...],
        delta: jax.Array,
        kept: tuple[bool, ...],
        axes: tuple[Any, ...],
        parameter: jax.Array,
    ) -> ByPixels | ByTaps | None:
        """By pixels or by taps, whichever is cheaper; inside loops it is formed."""
        return None if kept else kernel_gradient(self, saved[0], delta)

    @property
    def groups(self) -> int:
        """How many groups the channels are in."""
        return self.params["feature_group_count"]

    @property
    def taps(self) -> tuple[int, ...]:
        """The kernel's spatial sizes."""
        return tuple(self.kernel_shape[i] for i in self.params["dimension_numbers"].rhs_spec[2:])

    @property
    def channels_in(self) -> int:
        """Input channels of one group."""
        return self.kernel_shape[self.params["dimension_numbers"].rhs_spec[1]]

    def channels_last(self, data: jax.Array, lead: int) -> jax.Array:
        """An input as ``[*leading axes, batch, *spatial, channels]``."""
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
        _, by_tap = self.over_taps(data, delta, lambda _, product: (None, product), None)
        # [taps, groups, out of a group, in] -> [out, *taps, in] -> the equation's order.
        kernel = jnp.moveaxis(by_tap, 0, 2).reshape(-1, *self.taps, self.channels_in)
        out_axis, in_axis, *tap_axes = self.params["dimension_numbers"].rhs_spec
        order = [out_axis, *tap_axes, in_axis]
        return kernel.transpose([order.index(axis) for axis in range(kernel.ndim)])

    def over_taps(
        self, data: jax.Array, delta: jax.Array, fold: FoldFn, start: Any
    ) -> tuple[Any, Any]:
        """Folds the kernel's gradient, of which one tap at a time exists.

        Args:
            data: The input, summed over all of its leading axes.
            delta: The output's cotangent.
            fold: ``fold(carry, gradient of a tap [groups, out of a group, in])``; it gives
                the next carry and something to be stacked.
            start: The first carry.

        Returns:
            The last carry, and what was stacked.
        """
        lead = data.ndim - len(self.kernel_shape)
        pixels, delta = self.channels_last(data, lead), self.outputs_last(delta, lead)
        pixels, delta = (x.reshape(-1, *x.shape[lead + 1 :]) for x in (pixels, delta))
        positions = math.prod(delta.shape[:-1])
        groups, channels_in = self.groups, self.channels_in
        # Positions last on the left: a contraction over the first axis of both is slow.
        delta = delta.reshape(positions, groups, -1).transpose(1, 2, 0)
        axes = range(1, 1 + len(self.taps))

        def product(view: jax.Array) -> jax.Array:
            rows = view.reshape(positions, groups, -1)
            if groups == 1:
                return jnp.matmul(delta[0], rows[:, 0], precision=MEASURING)[None]
            return jnp.matmul(delta, rows.swapaxes(0, 1), precision=MEASURING)

        count = math.prod(self.taps)
        if count * channels_in <= _SMALL_PATCH:
            patches = [view.reshape(positions, groups, -1) for view in self.views(pixels, axes)]
            grads = product(jnp.concatenate(patches, axis=-1))
            by_tap = jnp.moveaxis(grads.reshape(groups, -1, count, channels_in), 2, 0)
            return jax.lax.scan(fold, start, by_tap)
        # One after another: a compiler that sees all taps at once copies all views. The input
        # is padded inside, where that is one copy with the view.
        view = lambda tap: self._dynamic_view(self._padded(pixels, axes), tap)
        step = lambda carry, tap: fold(carry, product(view(tap)))
        return jax.lax.scan(step, start, jnp.array(self._tap_places(), jnp.int32))

    def _tap_places(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*map(range, self.taps)))

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
            zip(self.taps, self.params["rhs_dilation"], self.params["window_strides"], strict=True)
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
        for tap in self._tap_places():
            start, stop, step = [0] * padded.ndim, list(padded.shape), [1] * padded.ndim
            for axes in spatial:
                for axis, at, size, dilation, stride in zip(
                    axes,
                    tap,
                    self.taps,
                    self.params["rhs_dilation"],
                    self.params["window_strides"],
                    strict=True,
                ):
                    start[axis] = at * dilation
                    stop[axis] = padded.shape[axis] - (size - 1 - at) * dilation
                    step[axis] = stride
            yield jax.lax.slice(padded, start, stop, step)


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
