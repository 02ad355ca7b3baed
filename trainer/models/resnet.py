"""ResNet-18 and ResNet-50 with group instead of batch normalisation.

He et al. 2016: stages of residual blocks, each stage half as large and twice as wide as the one
before. Group normalisation (Wu & He 2018) takes each batch normalisation's place, with as many
parameters.
"""

import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.models.precision import wide_type

_MAX_GROUPS = 32

# Images smaller than this are not shrunk before the first stage.
_SMALL_SIDE = 64


def _conv(
    features: int, size: int, stride: int, dtype: jax.typing.DTypeLike | None, name: str
) -> nn.Conv:
    return nn.Conv(
        features,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,  # the normalisation that follows has one
        kernel_init=nn.initializers.he_normal(),
        dtype=dtype,
        name=name,
    )


def _norm(features: int, dtype: jax.typing.DTypeLike | None, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=math.gcd(_MAX_GROUPS, features), dtype=dtype, name=name)


def _shortcut(
    inputs: jax.Array, features: int, stride: int, dtype: jax.typing.DTypeLike | None
) -> jax.Array:
    """The inputs, through a 1x1 convolution where the block changes their shape."""
    if stride == 1 and inputs.shape[-1] == features:
        return inputs
    return _norm(features, dtype, "shortcut_norm")(
        _conv(features, 1, stride, dtype, "shortcut_conv")(inputs)
    )


def shrinks_first(images: jax.Array, small_images: bool | None) -> bool:
    """Whether a stem shrinks images four times before the first stage.

    Args:
        images: ``[batch, height, width, channels]``.
        small_images: What was chosen; None: no where a side is below 64 pixels.
    """
    small = min(images.shape[1:3]) < _SMALL_SIDE if small_images is None else small_images
    return not small


def stem_pool(hidden: jax.Array) -> jax.Array:
    """The 3x3 pooling after a 7x7 convolution: halves height and width."""
    return nn.max_pool(
        hidden,
        (3, 3),
        strides=(2, 2),
        padding=((1, 1), (1, 1)),  # type: ignore[arg-type]  # Flax takes pairs, too
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016, figure 5 left).

    Attributes:
        features: Output channels.
        stride: Of the first convolution.
        dtype: Type of the computation, by default that of inputs and parameters.
    """

    features: int
    stride: int = 1
    dtype: jax.typing.DTypeLike | None = None

    expansion: ClassVar[int] = 1

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, height', width', features]``."""
        conv = functools.partial(_conv, dtype=self.dtype)
        norm = functools.partial(_norm, dtype=self.dtype)
        hidden = conv(self.features, 3, self.stride, name="conv1")(inputs)
        hidden = nn.relu(norm(self.features, name="norm1")(hidden))
        hidden = conv(self.features, 3, 1, name="conv2")(hidden)
        hidden = norm(self.features, name="norm2")(hidden)
        return nn.relu(hidden + _shortcut(inputs, self.features, self.stride, self.dtype))


class BottleneckBlock(nn.Module):
    """A 3x3 convolution between two 1x1 ones (He et al. 2016, figure 5 right).

    The 3x3 convolution has the stride, as in Goyal et al. 2017 and in torchvision.

    Attributes:
        features: Channels of the 3x3 convolution; the output has four times as many.
        stride: Of the 3x3 convolution.
        dtype: Type of the computation, by default that of inputs and parameters.
    """

    features: int
    stride: int = 1
    dtype: jax.typing.DTypeLike | None = None

    expansion: ClassVar[int] = 4

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, h', w', 4 features]``."""
        conv = functools.partial(_conv, dtype=self.dtype)
        norm = functools.partial(_norm, dtype=self.dtype)
        outside = self.expansion * self.features
        hidden = conv(self.features, 1, 1, name="conv1")(inputs)
        hidden = nn.relu(norm(self.features, name="norm1")(hidden))
        hidden = conv(self.features, 3, self.stride, name="conv2")(hidden)
        hidden = nn.relu(norm(self.features, name="norm2")(hidden))
        hidden = norm(outside, name="norm3")(conv(outside, 1, 1, name="conv3")(hidden))
        return nn.relu(hidden + _shortcut(inputs, outside, self.stride, self.dtype))


class ResNet(nn.Module):
    """Residual network; the defaults are ResNet-18.

    Attributes:
        num_classes: Classes.
        stage_sizes: Blocks per stage.
        block: Kind of the blocks.
        width: Features of the first stage's blocks.
        small_images: Whether the stem is one 3x3 convolution, as He et al. use for CIFAR-10, or
            a 7x7 convolution and a pooling that shrink the image four times. None: the former
            where a side is below 64 pixels.
        dtype: Type of the computation, by default that of inputs and parameters; pooled
            features and logits are at least float32.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    block: type[BasicBlock] | type[BottleneckBlock] = BasicBlock
    width: int = 64
    small_images: bool | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        shrinks = shrinks_first(images, self.small_images)
        size, stride = (7, 2) if shrinks else (3, 1)
        hidden = _conv(self.width, size, stride, self.dtype, "stem_conv")(images)
        hidden = nn.relu(_norm(self.width, self.dtype, "stem_norm")(hidden))
        if shrinks:
            hidden = stem_pool(hidden)
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                hidden = self.block(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(hidden)
        pooled = jnp.mean(hidden, axis=(1, 2), dtype=wide_type(hidden))
        return nn.Dense(self.num_classes, name="head")(pooled)
