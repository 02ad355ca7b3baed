"""The block that transformers repeat: self-attention, then a small network per position.

Vaswani et al. 2017, with layer normalisation before each half instead of after it (Xiong et al.
2020), which trains without warm-up. Positions of one example see each other, examples do not.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from trainer.models.precision import wide_type

_MLP_RATIO = 4


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of a sequence to itself, without a mask.

    Attributes:
        heads: Heads; they divide the width of the sequence among themselves.
        dtype: Type of the computation, by default that of inputs and parameters; scores and
            their softmax are at least float32.
    """

    heads: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, length, width]`` to the same shape."""
        width = inputs.shape[-1]
        if width % self.heads:
            raise ValueError(f"heads={self.heads!r}: allowed is a divisor of the width {width}")

        def project(name: str, values: jax.Array) -> jax.Array:
            init = nn.initializers.xavier_uniform()
            return nn.Dense(width, kernel_init=init, dtype=self.dtype, name=name)(values)

        def split(values: jax.Array) -> jax.Array:
            return values.reshape(*values.shape[:-1], self.heads, width // self.heads)

        query, key, value = (split(project(name, inputs)) for name in ("query", "key", "value"))
        query, key, value = promote_dtype(query, key, value, dtype=self.dtype)
        # b: example, q and k: positions, h: head, d: feature of a head.
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide_type(query))
        weights = jax.nn.softmax(scores / math.sqrt(width // self.heads)).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return project("out", mixed.reshape(inputs.shape))


class TransformerBlock(nn.Module):
    """Attention and a two-layer GELU network, each normalised first and added to its input.

    Attributes:
        heads: Heads of the attention.
        dtype: Type of the computation, by default that of inputs and parameters; statistics
            of the normalisations are at least float32.
    """

    heads: int
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Maps ``[batch, length, width]`` to the same shape."""
        width = inputs.shape[-1]
        init = nn.initializers.xavier_uniform()
        hidden = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(inputs)
        hidden = inputs + SelfAttention(self.heads, dtype=self.dtype, name="attention")(hidden)
        outputs = nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(hidden)
        outputs = nn.Dense(_MLP_RATIO * width, kernel_init=init, dtype=self.dtype, name="mlp_in")(
            outputs
        )
        outputs = nn.Dense(width, kernel_init=init, dtype=self.dtype, name="mlp_out")(
            nn.gelu(outputs)
        )
        return hidden + outputs
