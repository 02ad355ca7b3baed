"""Networks for small images and quick trials: linear, fully connected, convolutional.

The convolutional network uses group normalisation (Wu & He 2018), as De et al. 2022 do.
"""

import math

import flax.linen as nn
import jax

from trainer.models.precision import wide_type

_MAX_GROUPS = 8


class LogisticRegression(nn.Module):
    """One linear layer, started at zero.

    It is the head, which no model computes in less than float32: there is no ``dtype`` to choose.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        flat = images.reshape(images.shape[0], -1)
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.zeros, name="head")(flat)


class Mlp(nn.Module):
    """Fully connected layers with ReLU.

    Attributes:
        hidden_sizes: Widths of the layers before the head.
        num_classes: Classes.
        dtype: Type of the computation, by default that of inputs and parameters; the head's
            inputs and logits are at least float32.
    """

    hidden_sizes: tuple[int, ...]
    num_classes: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        hidden = images.reshape(images.shape[0], -1)
        for size in self.hidden_sizes:
            hidden = nn.relu(nn.Dense(size, dtype=self.dtype)(hidden))
        return nn.Dense(self.num_classes, name="head")(hidden.astype(wide_type(hidden)))


class Cnn(nn.Module):
    """3x3 convolutions, each with group normalisation, ReLU and 2x2 pooling.

    Attributes:
        channels: Widths of the convolutions.
        num_classes: Classes.
        dtype: As in `Mlp`.
    """

    channels: tuple[int, ...]
    num_classes: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        hidden = images
        for size in self.channels:
            hidden = nn.Conv(size, (3, 3), dtype=self.dtype)(hidden)
            groups = math.gcd(_MAX_GROUPS, size)
            hidden = nn.GroupNorm(num_groups=groups, dtype=self.dtype)(hidden)
            hidden = nn.max_pool(nn.relu(hidden), (2, 2), strides=(2, 2), padding="SAME")
        flat = hidden.reshape(hidden.shape[0], -1)
        return nn.Dense(self.num_classes, name="head")(flat.astype(wide_type(flat)))
