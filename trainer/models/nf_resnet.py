"""NF-ResNet-50: a residual network that keeps its signals' scale without any normalisation.

Brock et al. 2021 ("Characterizing signal propagation to close the performance gap in
unnormalized ResNets"), which De et al. 2022 train on ImageNet with DP-SGD. Three things stand in
for normalisation:

- Convolutions are weight-standardised, and ReLU is scaled so that a standard normal input comes
  out with variance 1: a branch hands on the variance that it gets.
- A block adds ``alpha`` times its branch, so variance grows by ``alpha ** 2`` from block to block.
  What the branch gets is divided by the standard deviation expected there, a constant known
  before there are any data; a projected shortcut begins anew at 1.
- Each branch has a gain that starts at zero (SkipInit, De & Smith 2020).

The reference also drops features and whole branches at random; nothing here is random. Its stem
has no bias, here every convolution has one.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from trainer.models.precision import wide_type
from trainer.models.resnet import shrinks_first, stem_pool
from trainer.models.standardized_conv import StandardizedConv

ALPHA = 0.2
_EXPANSION = 4
# 1 / standard deviation of ReLU of a standard normal number, 1.7129.
_RELU_GAIN = math.sqrt(2 / (1 - 1 / math.pi))
_HEAD_STDDEV = 0.01


def scaled_relu(inputs: jax.Array) -> jax.Array:
    """ReLU, times the gain that turns standard normal inputs into outputs of variance 1."""
    return nn.relu(inputs) * _RELU_GAIN


class NfBlock(nn.Module):
    """Activation before each of three convolutions, beside a shortcut.

    Attributes:
        features: Output channels, a multiple of 4; a quarter of them inside.
        expected_stddev: Of the inputs where training starts, > 0: the paper's 1 / beta.
        stride: Of the 3x3 convolution.
        project: Whether the shortcut is a 1x1 convolution instead of the identity.
        dtype: Type of the computation, by default that of inputs and parameters.

    Parameters, beside those of its convolutions: the scalar ``skip_gain``, 0 at first.
    """

    features: int
    expected_stddev: float
    stride: int
    project: bool
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, height', width', features]``."""
        conv = functools.partial(StandardizedConv, dtype=self.dtype)
        strides, inside = (self.stride, self.stride), self.features // _EXPANSION
        activated = scaled_relu(inputs) * (1 / self.expected_stddev)
        shortcut = inputs
        if self.project:
            shortcut = conv(self.features, (1, 1), strides, name="shortcut_conv")(activated)
        hidden = conv(inside, (1, 1), name="conv1")(activated)
        hidden = conv(inside, (3, 3), strides, name="conv2")(scaled_relu(hidden))
        hidden = conv(self.features, (1, 1), name="conv3")(scaled_relu(hidden))
        gain = self.param("skip_gain", nn.initializers.zeros, (), jnp.float32)
        hidden, gain, shortcut = promote_dtype(hidden, gain, shortcut, dtype=self.dtype)
        return hidden * (ALPHA * gain) + shortcut


class NfResNet(nn.Module):
    """Residual network without normalisation; the defaults are NF-ResNet-50.

    Attributes:
        num_classes: Classes.
        stage_sizes: Blocks per stage.
        width: Channels of the stem and inside the first stage's blocks.
        small_images: As in `trainer.models.ResNet`.
        dtype: Type of the computation, by default that of inputs and parameters; pooled
            features and logits are at least float32.
    """

    num_classes: int
    stage_sizes: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    small_images: bool | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        shrinks = shrinks_first(images, self.small_images)
        size, stride = (7, 2) if shrinks else (3, 1)
        hidden = StandardizedConv(
            self.width, (size, size), (stride, stride), dtype=self.dtype, name="stem"
        )(images)
        if shrinks:
            hidden = stem_pool(hidden)
        variance = 1.0
        for stage, blocks in enumerate(self.stage_sizes):
            for block in range(blocks):
                first = block == 0
                hidden = NfBlock(
                    _EXPANSION * self.width * 2**stage,
                    expected_stddev=math.sqrt(variance),
                    stride=2 if stage > 0 and first else 1,
                    project=first,
                    dtype=self.dtype,
                    name=f"stage{stage + 1}_block{block + 1}",
                )(hidden)
                variance = (1.0 if first else variance) + ALPHA**2
        pooled = jnp.mean(scaled_relu(hidden), axis=(1, 2), dtype=wide_type(hidden))
        init = nn.initializers.normal(_HEAD_STDDEV)
        return nn.Dense(self.num_classes, kernel_init=init, name="head")(pooled)
