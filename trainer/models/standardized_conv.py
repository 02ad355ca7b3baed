"""Weight-standardised convolution: signals keep their scale without batch statistics."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from trainer.models.standardization import standardize


class StandardizedConv(nn.Module):
    """Convolution with a standardised kernel, a learned gain and a bias per output channel.

    Attributes:
        features: Output channels.
        kernel_size: Height and width of the kernel.
        strides: Steps in height and width.
        padding: As in `jax.lax.conv_general_dilated`.
        dtype: Type of the computation, by default that of inputs and parameters; kernels are
            standardised in at least float32.

    Parameters: ``kernel`` ``[*kernel_size, channels, features]``, ``gain`` and ``bias``
    ``[features]``.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Literal["SAME", "VALID"] = "SAME"
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, height', width', features]``."""
        shape = (*self.kernel_size, inputs.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        gain = self.param("gain", nn.initializers.ones, (self.features,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        dtype = canonicalize_dtype(inputs, kernel, gain, bias, dtype=self.dtype)
        outputs = jax.lax.conv_general_dilated(
            inputs.astype(dtype),
            standardize(kernel).astype(dtype),
            window_strides=self.strides,
            padding=self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        # A convolution is linear in each output channel's kernel, so a gain on its output equals
        # the gain on its kernel of the references, and what is convolved with is `standardize`'s.
        return outputs * gain.astype(dtype) + bias.astype(dtype)
