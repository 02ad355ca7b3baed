"""What training minimises and evaluation reports: cross-entropy, example by example."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def cross_entropy(model: nn.Module, params: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Per-example loss in nats and whether the prediction is right.

    Args:
        model: From `make_model`.
        params: Its parameters.
        images: float32 ``[batch, height, width, channels]``.
        labels: int32 ``[batch]``.

    Returns:
        ``(losses [batch], correct bool [batch])``; the losses have the type of the logits.
    """
    logits: Any = model.apply({"params": params}, images)
    log_probs = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    return losses, jnp.argmax(logits, axis=1) == labels
