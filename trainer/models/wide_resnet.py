"""Wide residual networks, as De et al. 2022 (arXiv 2204.13650) train them with DP-SGD.

Zagoruyko & Komodakis 2016: few, wide layers in three stages. The changes for privacy: group
normalisation with 16 groups, weight-standardised convolutions, and the normalisation after the
activation instead of before it. So a layer is ReLU, normalisation, convolution; the network
starts with a convolution alone and ends with ReLU and normalisation.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.models.precision import wide_type
from trainer.models.standardized_conv import StandardizedConv

_GROUPS = 16
_STEM_WIDTH = 16


def _activate(inputs: jax.Array, dtype: jax.typing.DTypeLike | None, name: str) -> jax.Array:
    """ReLU, then normalisation."""
    return nn.GroupNorm(num_groups=_GROUPS, dtype=dtype, name=name)(nn.relu(inputs))


class WideBlock(nn.Module):
    """Two layers beside a shortcut, which is a layer of its own where the shape changes.

    Attributes:
        features: Output channels, a multiple of 16.
        stride: Of the first convolution.
        project: Whether the shortcut is a 1x1 convolution instead of the identity.
        dtype: Type of the computation, by default that of inputs and parameters.
    """

    features: int
    stride: int
    project: bool
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, height', width', features]``."""
        strides = (self.stride, self.stride)
        shortcut = inputs
        if self.project:
            shortcut = StandardizedConv(
                self.features, (1, 1), strides, dtype=self.dtype, name="shortcut_conv"
            )(_activate(inputs, self.dtype, "shortcut_norm"))
        hidden = StandardizedConv(self.features, (3, 3), strides, dtype=self.dtype, name="conv1")(
            _activate(inputs, self.dtype, "norm1")
        )
        hidden = StandardizedConv(self.features, (3, 3), dtype=self.dtype, name="conv2")(
            _activate(hidden, self.dtype, "norm2")
        )
        return hidden + shortcut


class WideResNet(nn.Module):
    """WRN-``depth``-``widening``.

    Attributes:
        num_classes: Classes.
        depth: Layers, 6 n + 4 for n >= 1 blocks in each of the three stages.
        widening: How many times wider than 16, 32 and 64 channels the stages are.
        dtype: Type of the computation, by default that of inputs and parameters; pooled
            features and logits are at least float32.
    """

    num_classes: int
    depth: int = 16
    widening: int = 4
    dtype: jax.typing.DTypeLike | None = None

    def __post_init__(self) -> None:
        if self.depth < 10 or self.depth % 6 != 4:
            raise ValueError(f"depth={self.depth!r}: allowed is 6 n + 4 for n >= 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        hidden = StandardizedConv(_STEM_WIDTH, (3, 3), dtype=self.dtype, name="stem")(images)
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                first = block == 0
                hidden = WideBlock(
                    _STEM_WIDTH * self.widening * 2**stage,
                    stride=2 if stage > 0 and first else 1,
                    project=first,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(hidden)
        hidden = _activate(hidden, self.dtype, "final_norm")
        pooled = jnp.mean(hidden, axis=(1, 2), dtype=wide_type(hidden))
        return nn.Dense(self.num_classes, name="head")(pooled)
