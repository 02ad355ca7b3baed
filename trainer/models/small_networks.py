"""Networks for small images and quick trials: linear, fully connected, convolutional.

The convolutional network uses group normalisation (Wu & He 2018), as De et al. 2022 do.
"""

import math

import flax.linen as nn
import jax

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
