"""Clipping modes: from norms to the factors that bound an example's gradient.

All modes bound the norm of what one example adds to the sum by ``l2_clip_norm``, so all have the
same sensitivity and are accounted alike.

* ``flat``: one factor, ``min(1, C / norm)`` (Abadi et al. 2016).
* ``per_layer``: each of K layers is clipped by itself to ``C / sqrt(K)`` (McMahan et al. 2018).
* ``automatic``: ``C / (norm + 0.01)``, which needs no tuning of C apart from the learning rate
  (AUTO-S; Bu et al. 2023, "Automatic clipping", equation 3.2).
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

ClippingMode = Literal["flat", "per_layer", "automatic"]

AUTOMATIC_STABILITY = 0.01
"""The constant that keeps zero gradients at zero, called gamma by Bu et al. 2023."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which leaves share a factor.

    Attributes:
        of_leaves: For each leaf, in flattened order, the number of its group.
        count: How many groups there are, at least 1.
    """

    of_leaves: tuple[int, ...]
    count: int


def groups_of(tree: Any, mode: ClippingMode) -> Groups:
    """Groups the leaves of a gradient.

    A layer is what shares a container in the tree: the kernel and the bias of one module, say.
    Leaves at the top of the tree are a layer each.
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    if mode != "per_layer":
        return Groups((0,) * len(paths), 1)
    names = [path[:-1] if len(path) > 1 else path for path in paths]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return Groups(tuple(numbers[name] for name in names), max(1, len(numbers)))


def clip_factors(
    norms: jax.Array, mode: ClippingMode, l2_clip_norm: Any, rescale_to_unit_norm: bool
) -> jax.Array:
    """What to multiply gradients with.

    Args:
        norms: ``[..., groups]``.
        mode: See above.
        l2_clip_norm: C; below zero counts as zero.
        rescale_to_unit_norm: Divide the result by C.

    Returns:
        ``[..., groups]``, zero where a norm is not finite. The factors of zero norms are
        finite.

    Guarantees:
        ``sum_g (factor_g norm_g)^2 <= C^2``, or 1 where rescaled.
    """
    dtype = norms.dtype
    clip = jnp.maximum(jnp.asarray(l2_clip_norm, dtype), 0)
    # Norms below this may be those of gradients whose squares vanished.
    norms = jnp.maximum(norms, jnp.sqrt(jnp.finfo(dtype).tiny))
    if mode == "automatic":
        unit = 1 / (norms + AUTOMATIC_STABILITY)
        factors = unit if rescale_to_unit_norm else clip * unit
    else:
        parts = norms.shape[-1] ** 0.5
        factors = jnp.minimum(1, clip / parts / norms)
        if rescale_to_unit_norm:
            factors = jnp.where(clip > 0, factors / clip, 1 / (parts * norms))
    return jnp.where(jnp.isfinite(norms) & jnp.isfinite(factors), factors, 0)
