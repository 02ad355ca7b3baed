"""A batch in parts that fit the device.

The parts are taken by one loop whose count is data: examples that are padding are moved to the
end and the loop stops before them, so a Poisson batch costs what it holds and one compiled program
serves every size. Memory is that of one part; the mechanism does not know of it.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")

PartFn = Callable[[list[jax.Array], jax.Array], tuple[T, Any]]
"""``part(examples, is_padding) -> (sums, per_example)``."""


def accumulate(
    part: PartFn[T], examples: list[jax.Array], is_padding: jax.Array, microbatch_size: int
) -> tuple[T, Any]:
    """Applies ``part`` to microbatches and adds up.

    Args:
        part: Its sums are added, its per-example outputs put together.
        examples: Arrays with a batch axis.
        is_padding: bool ``[batch]``.
        microbatch_size: Examples in a part, >= 1; a last part that is not full is padded.

    Returns:
        Sums, and outputs ``[batch, ...]``; zeros for padding in parts that were not run.
    """
    size = is_padding.shape[0]
    order = jnp.argsort(is_padding, stable=True)
    # Positions past the end read the last example, as padding, and are dropped when written.
    order = jnp.concatenate([order, jnp.full(-size % microbatch_size, size, order.dtype)])

    def run(i: jax.Array | int) -> tuple[jax.Array, T, Any]:
        at = jax.lax.dynamic_slice_in_dim(order, i * microbatch_size, microbatch_size)
        inside = jnp.minimum(at, size - 1)
        return at, *part([x[inside] for x in examples], is_padding[inside] | (at == size))

    _, sums, outputs = jax.eval_shape(run, 0)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    blank = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), outputs)

    def add(i: jax.Array, carry: tuple[T, Any]) -> tuple[T, Any]:
        at, sums, outputs = run(i)
        return (
            jax.tree.map(jnp.add, carry[0], sums),
            jax.tree.map(lambda all, new: all.at[at].set(new, mode="drop"), carry[1], outputs),
        )

    count = -(-jnp.sum(~is_padding) // microbatch_size)
    return jax.lax.fori_loop(0, count, add, (start, blank))
