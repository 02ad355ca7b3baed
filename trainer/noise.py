"""Gaussian noise, one independent draw per parameter."""

from typing import Any

import jax
import jax.numpy as jnp

KEY_IMPL = "threefry2x32"


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
