"""Utility on held-out examples, which are treated as public."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.models import cross_entropy

_CHUNK = 1024


@functools.lru_cache(maxsize=64)
def _make_totals(model: nn.Module) -> Any:
    @jax.jit
    def totals(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, correct = cross_entropy(model, params, images, labels)
        return jnp.sum(losses), jnp.sum(correct)

    return totals


def evaluate(
    model: nn.Module, params: Any, images: jax.typing.ArrayLike, labels: jax.typing.ArrayLike
) -> tuple[float, float]:
    """Accuracy and mean loss.

    Args:
        model: From `trainer.models.make_model`.
        params: Its parameters.
        images: float32 ``[num_examples, height, width, channels]``.
        labels: int32 ``[num_examples]``, num_examples >= 1.

    Returns:
        ``(accuracy in [0, 1], mean cross-entropy in nats)``; the loss is NaN where parameters
        are.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    totals = _make_totals(model)
    loss, correct = 0.0, 0
    for start in range(0, len(labels), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        chunk_loss, chunk_correct = totals(params, images[chunk], labels[chunk])
        loss += float(chunk_loss)
        correct += int(chunk_correct)
    return correct / len(labels), loss / len(labels)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite, bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
