"""Norms of gradients that are never formed.

Where a weight meets several rows of data, an example's gradient is a sum of rank-one terms,
``sum_r left_r (x) right_r``, and its squared norm ``sum_rs <left_r, left_s> <right_r, right_s>``:
two Gram matrices of the rows instead of a matrix of the weight's size (Goodfellow 2015 for one
row; Li et al. 2022, "ghost norm", for many). A weight that is used several times has the terms of
all its uses, and the inner products between them are the cross terms of the sum.

Terms may cancel. What is left of ``squared_terms``, the sum of their own squared norms, then has
a relative error larger by that ratio; the caller watches it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

# The clip is as good as the norm, so products that enter a norm are never rounded to TF32.
MEASURING = jax.lax.Precision.HIGHEST


class Measured(NamedTuple):
    """A squared norm and how far it can be trusted.

    Attributes:
        squared_norm: Of the gradient.
        squared_terms: Sum of the squared norms of its rank-one terms.
    """

    squared_norm: jax.Array
    squared_terms: jax.Array


class Gram(Protocol):
    """A gradient as a sum of terms of which the inner products can be had."""

    @property
    def cost(self) -> float:
        """Multiply-adds of `measure`."""
        ...

    def measure(self) -> Measured:
        """Measures the gradient; kept axes are summed over like any of its axes."""
        ...


@dataclasses.dataclass(frozen=True)
class Vectors:
    """One factor of each term: dense vectors ``[stack, rows, length]``."""

    values: jax.Array

    @property
    def rows(self) -> int:
        """How many terms there are."""
        return self.values.shape[1]

    @property
    def length(self) -> int:
        """Multiply-adds of one inner product."""
        return self.values.shape[2]

    def inner(self, other: "Vectors | OneHot") -> jax.Array:
        """Inner products ``[stack, rows, other's rows]``."""
        if isinstance(other, OneHot):
            return other.inner(self).swapaxes(1, 2)
        return jnp.einsum(
            "srn,sqn->srq",
            self.values,
            other.values,
            precision=MEASURING,
            preferred_element_type=jnp.promote_types(self.values.dtype, jnp.float32),
        )

    def squares(self) -> jax.Array:
        """Squared norms ``[stack, rows]``."""
        wide = jnp.promote_types(self.values.dtype, jnp.float32)
        return jnp.sum(jnp.square(self.values.astype(wide)), axis=2)


@dataclasses.dataclass(frozen=True)
class OneHot:
    """One factor of each term: unit vectors, by their index ``[stack, rows]``; -1 is zero."""

    indices: jax.Array

    @property
    def rows(self) -> int:
        """How many terms there are."""
        return self.indices.shape[1]

    @property
    def length(self) -> int:
        """Multiply-adds of one inner product."""
        return 1

    def inner(self, other: "Vectors | OneHot") -> jax.Array:
        """Inner products ``[stack, rows, other's rows]``."""
        present = (self.indices >= 0)[:, :, None]
        if isinstance(other, OneHot):
            same = self.indices[:, :, None] == other.indices[:, None, :]
            return (same & present).astype(jnp.float32)
        columns = jnp.take_along_axis(
            other.values.swapaxes(1, 2), jnp.maximum(self.indices, 0)[:, :, None], axis=1
        )
        wide = columns.astype(jnp.promote_types(columns.dtype, jnp.float32))
        return jnp.where(present, wide, 0)

    def squares(self) -> jax.Array:
        """Squared norms ``[stack, rows]``."""
        return (self.indices >= 0).astype(jnp.float32)


Factor = Vectors | OneHot


@dataclasses.dataclass(frozen=True)
class OuterProducts:
    """The terms of one use of a weight.

    Attributes:
        stack: What the leading axis of both factors runs over: parts of the weight that no
            term shares, so that squared norms add.
        left_axes: The weight's axes that ``left`` spans, ascending.
        left: ``[stack, rows, ...]``.
        right_axes: The weight's axes that ``right`` spans, ascending.
        right: ``[stack, rows, ...]``.
    """

    stack: tuple[Any, ...]
    left_axes: tuple[Any, ...]
    left: Factor
    right_axes: tuple[Any, ...]
    right: Factor

    @property
    def cost(self) -> float:
        """Multiply-adds of `measure`."""
        return TermsOfWeight((self,)).cost

    def measure(self) -> Measured:
        """Measures the weight as if this were its only use."""
        return TermsOfWeight((self,)).measure()

    def aligned(self, other: "OuterProducts") -> "OuterProducts | None":
        """This use with its factors in the other's order, None where they do not match."""
        if self.stack != other.stack:
            return None
        if (self.left_axes, self.right_axes) == (other.left_axes, other.right_axes):
            return self
        if (self.right_axes, self.left_axes) == (other.left_axes, other.right_axes):
            return OuterProducts(
                self.stack, self.right_axes, self.right, self.left_axes, self.left
            )
        return None


@dataclasses.dataclass(frozen=True)
class TermsOfWeight:
    """All terms of a weight, those of each use in one entry."""

    uses: tuple[OuterProducts, ...]

    @property
    def cost(self) -> float:
        """Multiply-adds of `measure`."""
        if self._single_rows:
            return sum(
                self._stacked(use) * (use.left.length + use.right.length) for use in self.uses
            )
        return sum(
            self._stacked(one)
            * one.left.rows
            * two.left.rows
            * (one.left.length + one.right.length)
            for one, two in itertools.combinations_with_replacement(self.uses, 2)
        )

    @property
    def _single_rows(self) -> bool:
        return len(self.uses) == 1 and self.uses[0].left.rows == 1

    @staticmethod
    def _stacked(use: OuterProducts) -> int:
        factor = use.left.indices if isinstance(use.left, OneHot) else use.left.values
        return factor.shape[0]

    def measure(self) -> Measured:
        """Sums the inner products of all pairs of terms."""
        terms = sum_of_terms(*((use.left.squares(), use.right.squares()) for use in self.uses))
        if self._single_rows:
            return Measured(terms, terms)
        total = jnp.zeros_like(terms)
        for i, one in enumerate(self.uses):
            for j, two in enumerate(self.uses[i:], i):
                inner = jnp.sum(one.left.inner(two.left) * one.right.inner(two.right))
                total += inner if i == j else 2 * inner
        return Measured(total, terms)


def sum_of_terms(*uses: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Sum of the squared norms of rank-one terms, from those of their factors.

    NaN only if a factor is: a square that overflowed times zero counts as zero.
    """
    products = [jnp.where((a == 0) | (b == 0), 0, a * b).sum() for a, b in uses]
    return jnp.asarray(sum(products))


def gram_of_weight(uses: Sequence[Gram | None]) -> Gram | None:
    """How to measure a weight's gradient from all its uses, or None where it must be formed."""
    if len(uses) == 1 and not isinstance(uses[0], OuterProducts):
        return uses[0]
    aligned: list[OuterProducts] = []
    for use in uses:
        if not isinstance(use, OuterProducts):
            return None
        matching = use.aligned(aligned[0]) if aligned else use
        if matching is None:
            return None
        aligned.append(matching)
    return TermsOfWeight(tuple(aligned))
