"""The loss of one unit: of an example in all its views, or of a user's examples.

Units name their examples by position. So a microbatch gathers, and augments, its own examples
alone, and memory is that of a microbatch however large the batch is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from trainer.config_sections import AugmentationConfig
from trainer.mechanism.noise import KEY_IMPL
from trainer.models import cross_entropy
from trainer.models.network import Network
from trainer.training.augmentation import views_of

_NO_VIEWS = AugmentationConfig()


class Data(NamedTuple):
    """Examples, and whose they are.

    Attributes:
        images: float32 ``[num_examples, height, width, channels]``.
        labels: int32 ``[num_examples]``.
        positions: int32 ``[num_users, most]``, each user's examples, padded with -1; None where
            each example is a unit by itself.
        first: int32 scalar, number of the first unit here, where others have those before it.
    """

    images: Any
    labels: Any
    positions: Any = None
    first: Any = 0


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is differentiated; compared by value, so that equal ones share a program.

    Attributes:
        network: The model.
        augmentation: Views of an example.
        examples_per_user: Where a unit is a user, examples of a user in a step.
    """

    network: Network
    augmentation: AugmentationConfig = _NO_VIEWS
    examples_per_user: int | None = None

    @property
    def is_random(self) -> bool:
        """Whether the loss of a unit draws random numbers."""
        return self.augmentation.is_random or self.examples_per_user is not None

    def loss(
        self, trainable: Any, frozen: Any, data: Data, unit: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Mean cross-entropy of one unit's examples and their views.

        Args:
            trainable: What is differentiated.
            frozen: The rest of the parameters.
            data: All examples.
            unit: int32 scalar, position of the example or of the user.
            key: uint32 ``[2]``, of the step; read where the loss `is_random`.

        Returns:
            A float32 scalar, in nats.
        """
        if data.positions is None or self.examples_per_user is None:
            images, labels = data.images[unit][None], data.labels[unit][None]
            present = jnp.ones(1, bool)
        else:
            chosen = _some(
                data.positions[unit], self._key(key, data.first + unit, 0), self.examples_per_user
            )
            present = chosen >= 0
            examples = jnp.maximum(chosen, 0)
            images, labels = data.images[examples], data.labels[examples]
        views = self.augmentation.views
        keys = (
            jax.random.split(self._key(key, data.first + unit, 1), len(labels))
            if self.is_random
            else None
        )
        if keys is None:
            batch = images
        else:
            batch = jax.vmap(lambda image, key: views_of(image, key, self.augmentation))(
                images, keys
            ).reshape(-1, *images.shape[1:])
        logits = self.network.logits(trainable, frozen, batch)
        losses, _ = cross_entropy(logits, jnp.repeat(labels, views))
        weights = jnp.repeat(present, views)
        total = jnp.sum(jnp.where(weights, losses, 0))
        return total / jnp.maximum(1, jnp.sum(weights))

    @staticmethod
    def _key(key: jax.Array, unit: jax.Array, purpose: int) -> jax.Array:
        of_step = jax.random.wrap_key_data(key, impl=KEY_IMPL)
        return jax.random.fold_in(jax.random.fold_in(of_step, purpose), unit)


def _some(positions: jax.Array, key: jax.Array, count: int) -> jax.Array:
    """``count`` of the positions that are >= 0, each as likely as any other; padded with -1."""
    missing = max(0, count - positions.shape[0])
    positions = jnp.pad(positions, (0, missing), constant_values=-1)
    order = jnp.where(positions >= 0, jax.random.uniform(key, positions.shape), 2.0)
    return positions[jnp.argsort(order)[:count]]
