"""Table look-ups: a weight whose rows are picked by a ``gather``.

Each look-up is a rank-one term, the row's unit vector times the cotangent of what was read. So an
embedding's norm takes a comparison of tokens and a Gram matrix, and its clipped sum one scatter;
a gradient of the table's size never exists per example.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping.uses.gram import OneHot, OuterProducts, Vectors
from trainer.clipping.uses.use import Use, widened

_Mode = jax.lax.GatherScatterMode


@dataclasses.dataclass(frozen=True)
class Lookup(Use):
    """A ``gather`` of whole rows of its operand.

    Attributes:
        num_rows: Length of the operand's axis 0.
        row_shape: The operand's other axes.
        index_column: Where the row's number stands in the last axis of the indices.
        offset_axes: The output's axes that come from ``row_shape``.
        unit_axes: The output's axes of size one that come from the operand's axis 0.
        mode: What happens to indices out of bounds.
    """

    num_rows: int
    row_shape: tuple[int, ...]
    index_column: int
    offset_axes: tuple[int, ...]
    unit_axes: tuple[int, ...]
    mode: Any

    @classmethod
    def of(cls, eqn: Any) -> "Lookup | None":
        """The look-up of a ``gather`` whose operand is the weight, or None if it is another."""
        numbers, mode = eqn.params["dimension_numbers"], eqn.params["mode"]
        num_rows, *row_shape = eqn.invars[0].aval.shape
        others_read_whole = eqn.params["slice_sizes"] == (1, *row_shape)
        if (
            not others_read_whole
            or 0 not in numbers.start_index_map
            or numbers.operand_batching_dims
            or numbers.collapsed_slice_dims not in ((), (0,))
            or mode not in (_Mode.CLIP, _Mode.FILL_OR_DROP, _Mode.PROMISE_IN_BOUNDS)
            # Another start than 0 on an axis that is read whole is out of bounds.
            or (len(numbers.start_index_map) > 1 and mode == _Mode.FILL_OR_DROP)
        ):
            return None
        offset_axes = numbers.offset_dims
        collapsed = numbers.collapsed_slice_dims == (0,)
        return cls(
            num_rows=num_rows,
            row_shape=tuple(row_shape),
            index_column=numbers.start_index_map.index(0),
            offset_axes=offset_axes if collapsed else offset_axes[1:],
            unit_axes=() if collapsed else offset_axes[:1],
            mode=mode,
        )

    def saved(self, operands: Sequence[jax.Array], output: jax.Array) -> tuple[jax.Array, ...]:
        """The number of the row for each look-up, -1 where nothing was read."""
        index = operands[1][..., self.index_column]
        if self.mode == _Mode.FILL_OR_DROP:
            inside = (index >= 0) & (index < self.num_rows)
            return (jnp.where(inside, index, -1),)
        return (jnp.clip(index, 0, self.num_rows - 1),)

    def _terms(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Row numbers ``[kept.., look-ups]``, cotangents ``[kept.., look-ups, row shape..]``."""
        (index,) = saved
        lead = len(kept)
        stays = [axis for axis, stay in enumerate(kept) if stay]
        goes = [axis for axis, stay in enumerate(kept) if not stay]
        delta = jnp.squeeze(delta, [lead + axis for axis in self.unit_axes])
        lost = lambda axis: sum(unit < axis for unit in self.unit_axes)
        row = [lead + axis - lost(axis) for axis in self.offset_axes]
        lookups = [axis for axis in range(lead, delta.ndim) if axis not in row]
        delta = delta.transpose([*stays, *goes, *lookups, *row])
        index = index.transpose([*stays, *goes, *range(lead, index.ndim)])
        sizes = index.shape[: len(stays)]
        return index.reshape(*sizes, -1), delta.reshape(
            *sizes, index.size // max(1, math.prod(sizes)), *self.row_shape
        )

    def operand_grad(
        self, saved: tuple[jax.Array, ...], delta: jax.Array, kept: tuple[bool, ...]
    ) -> jax.Array:
        """A scatter of the cotangents into a table of zeros."""
        index, rows = self._terms(saved, widened(delta), kept)

        def scatter(index: jax.Array, rows: jax.Array) -> jax.Array:
            # -1 would count from the end; past the end is dropped.
            index = jnp.where(index < 0, self.num_rows, index)
            table = jnp.zeros((self.num_rows, *self.row_shape), rows.dtype)
            return table.at[index].add(rows, mode="drop")

        for _ in range(sum(kept)):
            scatter = jax.vmap(scatter)
        return scatter(index, rows)

    def cost(self, saved: tuple[jax.Array, ...], delta: jax.Array) -> float:
        """The table is written once, beside the cotangents."""
        return delta.size + self.num_rows * math.prod(self.row_shape)

    def gram(
        self,
        saved: tuple[jax.Array, ...],
        delta: jax.Array,
        kept: tuple[bool, ...],
        axes: tuple[Any, ...],
        parameter: jax.Array,
    ) -> OuterProducts | None:
        """The terms: one for each look-up."""
        if None in axes or list(axes[1:]) != sorted(axes[1:]):
            return None
        index, rows = self._terms(saved, delta, kept)
        kept_sizes = index.shape[:-1]
        stack = math.prod(kept_sizes)
        return OuterProducts(
            (tuple(kept_sizes), ()),
            (axes[0],),
            OneHot(index.reshape(stack, -1)),
            tuple(axes[1:]),
            Vectors(rows.reshape(stack, index.shape[-1], -1)),
        )
