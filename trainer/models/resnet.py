"""ResNet-18 with group instead of batch normalisation.

He et al. 2016: stages of residual blocks, each stage half as large and twice as wide as the one
before. Group normalisation (Wu & He 2018) takes each batch normalisation's place, with as many
parameters.
"""

import functools
import math

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

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, height', width', features]``."""
        conv = functools.partial(_conv, dtype=self.dtype)
        norm = functools.partial(_norm, dtype=self.dtype)
        hidden = conv(self.features, 3, self.stride, name="conv1")(inputs)
        hidden = nn.relu(norm(self.features, name="norm1")(hidden))
        hidden = conv(self.features, 3, 1, name="conv2")(hidden)
        hidden = norm(self.features, name="norm2")(hidden)
        shortcut = inputs
        if self.stride != 1 or inputs.shape[-1] != self.features:
            shortcut = conv(self.features, 1, self.stride, name="shortcut_conv")(inputs)
            shortcut = norm(self.features, name="shortcut_norm")(shortcut)
        return nn.relu(hidden + shortcut)


class ResNet(nn.Module):
    """Residual network of basic blocks; the defaults are ResNet-18.

    Attributes:
        num_classes: Classes.
        stage_sizes: Blocks per stage.
        width: Channels of the first stage.
        small_images: Whether the stem is one 3x3 convolution, as He et al. use for CIFAR-10, or
            a 7x7 convolution and a pooling that shrink the image four times. None: the former
            where a side is below 64 pixels.
        dtype: Type of the computation, by default that of inputs and parameters; pooled
            features and logits are at least float32.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
    small_images: bool | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        small = self.small_images
        if small is None:
            small = min(images.shape[1:3]) < _SMALL_SIDE
        size, stride = (3, 1) if small else (7, 2)
        hidden = _conv(self.width, size, stride, self.dtype, "stem_conv")(images)
        hidden = nn.relu(_norm(self.width, self.dtype, "stem_norm")(hidden))
        if not small:
            hidden = nn.max_pool(
                hidden,
                (3, 3),
                strides=(2, 2),
                padding=((1, 1), (1, 1)),  # type: ignore[arg-type]  # Flax takes pairs, too
            )
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                hidden = BasicBlock(
                    self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(hidden)
        pooled = jnp.mean(hidden, axis=(1, 2), dtype=wide_type(hidden))
        return nn.Dense(self.num_classes, name="head")(pooled)
