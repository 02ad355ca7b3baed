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
        stays = tuple(axis for axis, stay in enumerate(kept) if stay)
        goes = tuple(axis for axis, stay in enumerate(kept) if not stay)
        delta_batch, delta_rows, _ = self._delta_axes()
        shift = lambda axes: tuple(lead + axis for axis in axes)
        wide = jnp.promote_types(jnp.result_type(data, delta), jnp.float32)
        if data.dtype != delta.dtype:
            data, delta = widened(data), widened(delta)
        result = jax.lax.dot_general(
            data,
            delta,
            (
                (goes + shift(self.data_free), goes + shift(delta_rows)),
                (stays + shift(self.data_batch), stays + shift(delta_batch)),
            ),
            precision=self.precision,
            preferred_element_type=wide,
        )
        # The result's axes are those kept, batch, contracted (as the data has them), free.
        paired = sorted(zip(self.data_contract, self.weight_contract, strict=True))
        order = (*self.weight_batch, *(weight for _, weight in paired), *self.weight_free)
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
        lead = len(kept)
        stays = tuple(axis for axis, stay in enumerate(kept) if stay)
        goes = tuple(axis for axis, stay in enumerate(kept) if not stay)
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

        def arranged(
            array: jax.Array, stack: Sequence[int], rows: Sequence[int], vector: Sequence[int]
        ) -> jax.Array:
            order = [
                *stays,
                *(lead + a for a in stack),
                *goes,
                *(lead + a for a in rows),
                *(lead + a for a in vector),
            ]
            moved = array.transpose(order)
            stacked = len(stays) + len(stack)
            middle = stacked + len(goes) + len(rows)
            sizes = [moved.shape[:stacked], moved.shape[stacked:middle], moved.shape[middle:]]
            return moved.reshape([math.prod(part) for part in sizes])

        left = arranged(data, [self.data_batch[i] for i in batch], self.data_free, contract)
        right = arranged(delta, [delta_batch[i] for i in batch], delta_rows, free)
        stack = (tuple(data.shape[axis] for axis in stays), batch_axes)
        return OuterProducts(stack, left_axes, Vectors(left), right_axes, Vectors(right))
