"""Utility on held-out examples: exact where they are public, counted with noise where not."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from trainer.models import cross_entropy
from trainer.models.network import Network
from trainer.training.packed import stacked

_CHUNK = 1024
_LEAST_PACKED_CHUNK = 128


class Utility(NamedTuple):
    """How well parameters do.

    Attributes:
        accuracy: Fraction of examples classified correctly.
        loss: Mean cross-entropy in nats; NaN where parameters are, None where it is not told.
    """

    accuracy: float
    loss: float | None


@functools.lru_cache(maxsize=64)
def _make_totals(network: Network, *, packed: bool = False) -> Any:
    def totals(
        trainable: Any, frozen: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        losses, correct = cross_entropy(network.logits(trainable, frozen, images), labels)
        return jnp.sum(losses), jnp.sum(correct)

    return jax.jit(jax.vmap(totals, in_axes=(0, None, None, None)) if packed else totals)


def evaluate(
    network: Network,
    trainable: Any,
    frozen: Any,
    images: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
) -> Utility:
    """Accuracy and mean loss, exactly.

    Args:
        network: The model.
        trainable: Its trained parameters.
        frozen: The others.
        images: float32 ``[num_examples, height, width, channels]``.
        labels: int32 ``[num_examples]``, num_examples >= 1.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    totals = _make_totals(network)
    loss, correct = 0.0, 0
    for start in range(0, len(labels), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        chunk_loss, chunk_correct = totals(trainable, frozen, images[chunk], labels[chunk])
        loss += float(chunk_loss)
        correct += int(chunk_correct)
    return Utility(correct / len(labels), loss / len(labels))


def evaluate_packed(
    network: Network,
    trainables: Sequence[Any],
    frozen: Any,
    images: jax.typing.ArrayLike,
    labels: jax.typing.ArrayLike,
) -> list[Utility]:
    """As `evaluate`, of several trials' parameters in one program; up to rounding the same.

    Args:
        network: The model.
        trainables: Trained parameters of each lane (`trainer.training.packed.in_lanes`).
        frozen: The others, the same for all.
        images: As in `evaluate`.
        labels: As in `evaluate`.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    totals, together = _make_totals(network, packed=True), stacked(trainables)
    size = max(_LEAST_PACKED_CHUNK, _CHUNK // len(trainables))
    chunks = [slice(start, start + size) for start in range(0, len(labels), size)]
    found = [totals(together, frozen, images[chunk], labels[chunk]) for chunk in chunks]
    losses, correct = (np.asarray(part, np.float64).sum(0) for part in zip(*found, strict=True))
    return [
        Utility(int(right) / len(labels), float(loss) / len(labels))
        for loss, right in zip(losses, correct, strict=True)
    ]


def with_noise(
    utility: Utility, num_examples: int, noise_multiplier: float, rng: np.random.Generator
) -> Utility:
    """An exact utility made a DP output.

    Formal guarantees: one example more, less or other changes the number of right answers by at
    most 1; with noise of standard deviation ``noise_multiplier`` this is one run of the Gaussian
    mechanism (`trainer.training.plan.evaluation_mechanism`). The number of examples is public.

    Args:
        utility: Exact.
        num_examples: What it was measured on.
        noise_multiplier: Standard deviation of the noise on the count, > 0.
        rng: Secret, and used for this count alone.

    Returns:
        The noisy accuracy, which may lie outside [0, 1], and no loss: that has no bound.
    """
    correct = round(utility.accuracy * num_examples)
    noisy = correct + noise_multiplier * float(rng.standard_normal())
    return Utility(noisy / num_examples, None)


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Whether every number of a pytree is finite, bool scalar."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
