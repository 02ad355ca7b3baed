"""What is asked of a place where a parameter operand meets data.

All arrays of a use may have *leading axes*: the batch, and one axis for each enclosing loop. For
each of them the caller says whether it is *kept* in the result or summed over. So one formula
gives an example's gradient and, from scaled cotangents, a batch's clipped sum, and both inside a
loop, whether the parameter is the same in every iteration (summed) or not (kept).
"""

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping.uses.gram import Gram


class Use(abc.ABC):
    """A place where a parameter operand meets data."""

    @abc.abstractmethod
    def saved(self, operands: Sequence[jax.Array], output: jax.Array) -> tuple[jax.Array, ...]:
        """Of the equation's operands and output what the gradient is computed from."""

    @abc.abstractmethod
    def operand_grad(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """One example's gradient with respect to the parameter operand.

        Args:
            saved: From `saved`, with leading axes.
            delta: Cotangent of the tapped value, with leading axes.
            kept: For each leading axis whether it stays.

        Returns:
            Floating point, at least float32, ``[*kept axes, *operand's shape]``.
        """

    def operand_grad_sum(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """The same of a whole batch, whose axis comes before the others and is summed over."""
        return self.operand_grad(saved, delta, (False, *kept))

    @abc.abstractmethod
    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """Multiply-adds of `operand_grad`."""

    def gram(
        self,
        saved: tuple[jax.Array, ...],
        delta: jax.Array,
        kept: tuple[bool, ...],
        axes: tuple[Any, ...],
        parameter: jax.Array,
    ) -> Gram | None:
        """How to measure the gradient's norm without forming it, or None.

        Args:
            saved: From `saved`, with leading axes.
            delta: Cotangent of the tapped value, with leading axes.
            kept: For each leading axis whether it stays.
            axes: For each axis of the operand its axis in the parameter.
            parameter: The parameter itself, at least float32.
        """
        return None


class CopiedOperand(Use):
    """An operand that was copied per example: its cotangent is its gradient.

    For places that have no formula of their own, and elementwise ones, which need none.
    """

    def saved(self, operands: Sequence[jax.Array], output: jax.Array) -> tuple[jax.Array, ...]:
        """Nothing."""
        return ()

    def operand_grad(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """The cotangent, summed over the axes that are not kept."""
        return widened(delta).sum([axis for axis, stays in enumerate(kept) if not stays])

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """A sum over the cotangent."""
        return delta.size


def widened(x: jax.Array) -> jax.Array:
    """Half precision becomes float32; the rest stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
