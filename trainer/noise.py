"""Gaussian noise: one independent draw per parameter, and one for a count."""

from typing import Any

import jax
import jax.numpy as jnp

KEY_IMPL = "threefry2x32"

# What is folded into a step's key for its count. `jax.random.split` gives a tree's leaves the
# keys that folding in 0, 1, 2, ... would, so it must exceed any number of leaves.
_COUNT = 2**32 - 1


def gaussian_noise_like(
    key_data: jax.typing.ArrayLike, tree: Any, stddev: float | jax.Array
) -> Any:
    """Independent Gaussian noise in the form of ``tree``.

    Args:
        key_data: uint32 ``[2]``, secret and used once (`trainer.keys`).
        tree: A pytree of float arrays; only shapes and dtypes are read.
        stddev: Standard deviation of every coordinate, >= 0; may be traced. Callers set it to
            noise_multiplier x sensitivity.

    Returns:
        A pytree of noise with the shapes and dtypes of ``tree``; each leaf has its own key.
    """
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(
        jax.random.wrap_key_data(jnp.asarray(key_data), impl=KEY_IMPL), len(leaves)
    )
    noise = [
        jnp.asarray(stddev, leaf.dtype) * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noise)


def count_noise(key_data: jax.typing.ArrayLike, stddev: float | jax.Array) -> jax.Array:
    """Gaussian noise for one count, independent of the noise that the same key gives a tree.

    Args:
        key_data: As in `gaussian_noise_like`; the same step's.
        stddev: Standard deviation, >= 0; may be traced.

    Returns:
        A float32 scalar.
    """
    key = jax.random.wrap_key_data(jnp.asarray(key_data), impl=KEY_IMPL)
    return jnp.float32(stddev) * jax.random.normal(jax.random.fold_in(key, _COUNT))
