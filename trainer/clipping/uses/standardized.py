"""Convolutions whose kernel is weight-standardised.

The parameter's gradient is that of the kernel in use with two directions projected out of each
output channel (`trainer.models.standardization`). So its norm takes each channel's squared norm,
its sum and its inner product with the kernel, and the last two are sums over output positions: of
what the patch adds up to, and of what the convolution gave.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer.clipping.uses.convolution import Convolution
from trainer.clipping.uses.gram import Measured
from trainer.clipping.uses.kernel_norms import ByPixels, ByTaps
from trainer.clipping.uses.use import Use, widened
from trainer.models.standardization import scales, squares_lost


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
        gradient = self.convolution.gram(saved[:1], delta, kept, axes, parameter)
        if gradient is None:
            return None
        return ProjectedGradient(self.convolution, gradient, saved[1], delta, parameter)


class ProjectedGradient(NamedTuple):
    """One example's gradient for its measurement.

    Attributes:
        convolution: Where it is from.
        gradient: That of the standardised kernel.
        output: What the convolution gave.
        delta: The output's cotangent.
        parameter: The kernel before standardisation.
    """

    convolution: Convolution
    gradient: ByPixels | ByTaps
    output: jax.Array
    delta: jax.Array
    parameter: jax.Array

    @property
    def cost(self) -> float:
        """As without standardisation."""
        return self.gradient.cost

    def measure(self) -> Measured:
        """The squared norm of the parameter's gradient."""
        scaling = scales(self.parameter)
        measured, sums = self.gradient.measure_channels(scaling.scale)
        delta, output = (
            self.convolution.outputs_last(widened(x), 0) for x in (self.delta, self.output)
        )
        inner = jnp.sum(delta * output, axis=tuple(range(delta.ndim - 1)))
        lost = squares_lost(scaling, sums, inner)
        return Measured(measured.squared_norm - lost, measured.squared_terms)
