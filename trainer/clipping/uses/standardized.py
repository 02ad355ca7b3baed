"""Convolutions whose kernel is weight-standardised.

The parameter's gradient is that of the kernel in use with two directions projected out of each
output channel (`trainer.standardization`). So its norm takes each channel's squared norm, its sum
and its inner product with the kernel, and the last two are sums over output positions: of what
the patch adds up to, and of what the convolution gave.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping.uses.convolution import Convolution, PixelGram
from trainer.clipping.uses.gram import Measured
from trainer.clipping.uses.use import Use, widened
from trainer.standardization import channel_squares, scales


@dataclasses.dataclass(frozen=True)
class StandardizedConvolution(Use):
    """A convolution that knows where its kernel is from.

    Attributes:
        convolution: Itself, with output channels as the kernel's last axis.
    """

    convolution: Convolution

    @classmethod
    def of(cls, convolution: Convolution) -> "StandardizedConvolution | None":
        """The same of a convolution, or None where channels are grouped or not the last axis."""
        out_axis = convolution.params["dimension_numbers"].rhs_spec[0]
        grouped = convolution.params["feature_group_count"] != 1
        if grouped or out_axis != len(convolution.kernel_shape) - 1:
            return None
        return cls(convolution)

    def saved(self, operands: Sequence[jax.Array], output: jax.Array) -> tuple[jax.Array, ...]:
        """The input and the output."""
        return (operands[0], output)

    def operand_grad(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """That of the standardised kernel."""
        return self.convolution.operand_grad(saved[:1], delta, kept)

    def operand_grad_sum(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """That of the standardised kernel."""
        return self.convolution.operand_grad_sum(saved[:1], delta, kept)

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """As of any convolution."""
        return self.convolution.cost(saved[:1], delta)

    def gram(
        self,
        saved: tuple[jax.Array, ...],
        delta: jax.Array,
        kept: tuple[bool, ...],
        axes: tuple[Any, ...],
        parameter: jax.Array,
    ) -> "ProjectedGradient | None":
        """Squared norms by channel; inside loops the gradient is formed."""
        if kept:
            return None
        pixels = self.convolution.gram(saved[:1], delta, (), axes, parameter)
        forming = self.cost(saved, delta)
        if pixels is not None and pixels.cost > forming:
            pixels = None
        return ProjectedGradient(self, saved, delta, pixels, parameter)


@dataclasses.dataclass(frozen=True)
class ProjectedGradient:
    """One example's gradient for its measurement.

    Attributes:
        use: Where it is from.
        saved: Its input and output.
        delta: Its output's cotangent.
        pixels: The way that forms no gradient, where that is cheaper.
        parameter: The kernel before standardisation.
    """

    use: StandardizedConvolution
    saved: tuple[jax.Array, ...]
    delta: jax.Array
    pixels: PixelGram | None
    parameter: jax.Array

    @property
    def cost(self) -> float:
        """Of the cheaper way."""
        forming = self.use.cost(self.saved, self.delta)
        return forming if self.pixels is None else self.pixels.cost

    def measure(self) -> Measured:
        """The squared norm of the parameter's gradient."""
        scaling = scales(self.parameter)
        delta, output = (
            self.use.convolution.outputs_last(widened(x), 0) for x in (self.delta, self.saved[1])
        )
        positions = tuple(range(delta.ndim - 1))
        inner = jnp.sum(delta * output, axis=positions)
        if self.pixels is None:
            grad = self.use.operand_grad(self.saved, self.delta, ())
            of_channel = tuple(range(grad.ndim - 1))
            squares = jnp.sum(jnp.square(grad), axis=of_channel)
            sums = jnp.sum(grad, axis=of_channel)
            parts = channel_squares(scaling, squares, sums, inner)
            return Measured(parts.sum(), jnp.sum(jnp.square(scaling.scale) * squares))
        # Scaled channels of the cotangent are scaled channels of the gradient.
        scaled = dataclasses.replace(self.pixels, delta=self.pixels.delta * scaling.scale)
        measured = scaled.measure()
        sums = jnp.tensordot(self.pixels.patch_sums(), self.pixels.delta[0], delta.ndim - 1)
        lost = -channel_squares(scaling, jnp.zeros_like(sums), sums, inner)
        return Measured(measured.squared_norm - lost.sum(), measured.squared_terms)
