"""What training minimises and evaluation reports: cross-entropy, example by example."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per-example loss in nats and whether the prediction is right.

    Args:
        logits: ``[batch, classes]``.
        labels: int32 ``[batch]``.

    Returns:
        ``(losses [batch], correct bool [batch])``; the losses have the type of the logits.
    """
    log_probs = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    return losses, jnp.argmax(logits, axis=1) == labels
