"""The models, small and free of anything that mixes examples.

Batch normalisation would make one example's gradient depend on the others and void the
guarantee; the convolutional network uses group normalisation (Wu & He 2018), as De et al. 2022
do.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.config import ModelConfig

_MAX_GROUPS = 8


class LogisticRegression(nn.Module):
    """One linear layer, started at zero."""

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        flat = images.reshape(images.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros)(flat)


class Mlp(nn.Module):
    """Fully connected layers with ReLU."""

    hidden_sizes: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        hidden = images.reshape(images.shape[0], -1)
        for size in self.hidden_sizes:
            hidden = nn.relu(nn.Dense(size)(hidden))
        return nn.Dense(self.num_classes)(hidden)


class Cnn(nn.Module):
    """3x3 convolutions, each with group normalisation, ReLU and 2x2 pooling."""

    channels: tuple[int, ...]
    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        hidden = images
        for size in self.channels:
            hidden = nn.Conv(size, (3, 3))(hidden)
            hidden = nn.GroupNorm(num_groups=math.gcd(_MAX_GROUPS, size))(hidden)
            hidden = nn.max_pool(nn.relu(hidden), (2, 2), strides=(2, 2), padding="SAME")
        return nn.Dense(self.num_classes)(hidden.reshape(hidden.shape[0], -1))


def make_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The module that a configuration names."""
    match config.name:
        case "logistic_regression":
            return LogisticRegression(num_classes)
        case "mlp":
            return Mlp(config.hidden_sizes, num_classes)
        case "cnn":
            return Cnn(config.channels, num_classes)


def init_params(model: nn.Module, image_shape: tuple[int, ...], seed: int) -> Any:
    """Fresh parameters, a float32 pytree that depends on ``seed`` and shapes alone."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    return model.init(jax.random.key(seed), images)["params"]


def cross_entropy(model: nn.Module, params: Any, images: jax.Array, labels: jax.Array) -> Any:
    """Per-example loss in nats and whether the prediction is right.

    Args:
        model: From `make_model`.
        params: Its parameters.
        images: float32 ``[batch, height, width, channels]``.
        labels: int32 ``[batch]``.

    Returns:
        ``(losses float32 [batch], correct bool [batch])``.
    """
    logits: Any = model.apply({"params": params}, images)
    log_probs = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    return losses, jnp.argmax(logits, axis=1) == labels
