"""Contractions: a weight in a ``dot_general``, whatever its axes.

Covers linear layers, einsum heads, attention projections, grouped linear layers and recurrent
weights. The axes that the weight shares with the data as *batch* axes of the contraction are
parts that no term shares; all other axes of the data that are not contracted are rows.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping.uses.gram import Gram, OuterProducts, Vectors
from trainer.clipping.uses.use import Use, widened


@dataclasses.dataclass(frozen=True)
class Contraction(Use):
    """The axes of a ``dot_general`` between data and a weight.

    Attributes:
        data_batch: The data's batch axes.
        data_contract: The data's contracted axes.
        data_free: The data's other axes: rows.
        weight_batch: The weight's axes, each paired with one of ``data_batch``.
        weight_contract: The weight's axes, each paired with one of ``data_contract``.
        weight_free: The weight's other axes.
        data_first: Whether the data is the left operand, so that its free axes come first in
            the output.
        precision: As the equation has it.
    """

    data_batch: tuple[int, ...]
    data_contract: tuple[int, ...]
    data_free: tuple[int, ...]
    weight_batch: tuple[int, ...]
    weight_contract: tuple[int, ...]
    weight_free: tuple[int, ...]
    data_first: bool
    precision: Any

    @classmethod
    def of(cls, eqn: Any, position: int) -> "Contraction":
        """The contraction of an equation whose operand ``position`` is the weight."""
        (contract, batch) = eqn.params["dimension_numbers"]
        data, weight = 1 - position, position
        free = [
            tuple(
                axis
                for axis in range(len(eqn.invars[side].aval.shape))
                if axis not in contract[side] and axis not in batch[side]
            )
            for side in (0, 1)
        ]
        return cls(
            data_batch=tuple(batch[data]),
            data_contract=tuple(contract[data]),
            data_free=free[data],
            weight_batch=tuple(batch[weight]),
            weight_contract=tuple(contract[weight]),
            weight_free=free[weight],
            data_first=position == 1,
            precision=eqn.params["precision"],
        )

    def saved(self, operands: Sequence[jax.Array], output: jax.Array) -> tuple[jax.Array, ...]:
        """The data."""
        return (operands[0 if self.data_first else 1],)

    def rows_of(self, saved: tuple[jax.Array, ...]) -> int:
        """How many rows of one example's data meet the weight, given that of a batch."""
        (data,) = saved
        lead = data.ndim - len(self.data_batch + self.data_contract + self.data_free)
        return math.prod(data.shape[lead + axis] for axis in self.data_free)

    def _delta_axes(self) -> tuple[range, range, range]:
        """The output's batch axes, those of the data's rows, and those of the weight."""
        batch, rows, free = map(len, (self.data_batch, self.data_free, self.weight_free))
        first, second = (rows, free) if self.data_first else (free, rows)
        front = range(batch, batch + first)
        back = range(batch + first, batch + first + second)
        return (range(batch), front, back) if self.data_first else (range(batch), back, front)

    def operand_grad(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """``data^T delta``, over the rows and the leading axes that are not kept."""
        (data,) = saved
        lead = len(kept)
        delta_batch, delta_rows, delta_free = self._delta_axes()
        wide = jnp.promote_types(jnp.result_type(data, delta), jnp.float32)
        if data.dtype != delta.dtype:
            data, delta = widened(data), widened(delta)
        left = _arranged(data, kept, self.data_batch, self.data_free, self.data_contract)
        right = _arranged(delta, kept, delta_batch, delta_rows, delta_free)
        # Rows are one axis: XLA:CPU (jaxlib 0.10.2) may contract several axes wrongly where
        # the product is squared and added up in the same fusion.
        stacked = left.shape[0] != 1
        if not stacked:
            left, right = left[0], right[0]
        axes = (((1,), (1,)), ((0,), (0,))) if stacked else (((0,), (0,)), ((), ()))
        result = jax.lax.dot_general(
            left, right, axes, precision=self.precision, preferred_element_type=wide
        )
        stays = [size for size, stay in zip(data.shape, kept, strict=False) if stay]
        parts = [
            (self.data_batch, data),
            (self.data_contract, data),
            (tuple(delta_free), delta),
        ]
        sizes = [array.shape[lead + axis] for axes, array in parts for axis in axes]
        # The result's axes are those kept, batch, contracted, free.
        result = result.reshape(*stays, *sizes)
        order = (*self.weight_batch, *self.weight_contract, *self.weight_free)
        place = {axis: len(stays) + i for i, axis in enumerate(order)}
        axes = [*range(len(stays)), *(place[axis] for axis in range(len(order)))]
        return result.transpose(axes)

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """One multiply-add for each number of the output and each contracted one."""
        (data,) = saved
        lead = data.ndim - len(self.data_batch + self.data_contract + self.data_free)
        return delta.size * math.prod(data.shape[lead + axis] for axis in self.data_contract)

    def gram(
        self,
        saved: tuple[jax.Array, ...],
        delta: jax.Array,
        kept: tuple[bool, ...],
        axes: tuple[Any, ...],
        parameter: jax.Array,
    ) -> Gram:
        """The terms: one for each row."""
        (data,) = saved
        delta_batch, delta_rows, delta_free = self._delta_axes()

        def by_axis(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], tuple[Any, ...]]:
            """Positions in an array, ascending by the parameter's axis that they stand for."""
            named = [(axes[weight], at) for at, weight in pairs if axes[weight] is not None]
            unit = [at for at, weight in pairs if axes[weight] is None]
            named.sort()
            return [at for _, at in named] + unit, tuple(axis for axis, _ in named)

        contract, left_axes = by_axis(
            list(zip(self.data_contract, self.weight_contract, strict=True))
        )
        free, right_axes = by_axis(list(zip(delta_free, self.weight_free, strict=True)))
        batch, batch_axes = by_axis(
            list(zip(range(len(self.data_batch)), self.weight_batch, strict=True))
        )

        stacked = [self.data_batch[i] for i in batch], [delta_batch[i] for i in batch]
        left = _arranged(data, kept, stacked[0], self.data_free, contract)
        right = _arranged(delta, kept, stacked[1], delta_rows, free)
        stays = tuple(size for size, stay in zip(data.shape, kept, strict=False) if stay)
        stack = (stays, batch_axes)
        return OuterProducts(stack, left_axes, Vectors(left), right_axes, Vectors(right))


def _arranged(
    array: jax.Array,
    kept: tuple[bool, ...],
    stack: Sequence[int],
    rows: Sequence[int],
    vector: Sequence[int],
) -> jax.Array:
    """An array as ``[stack, rows, vector]``, with the leading axes first among stack or rows."""
    lead = len(kept)
    stays = [axis for axis, stay in enumerate(kept) if stay]
    goes = [axis for axis, stay in enumerate(kept) if not stay]
    parts = [
        [*stays, *(lead + axis for axis in stack)],
        [*goes, *(lead + axis for axis in rows)],
        [lead + axis for axis in vector],
    ]
    moved = array.transpose([axis for part in parts for axis in part])
    return moved.reshape([math.prod(array.shape[axis] for axis in part) for part in parts])
