"""A small transformer encoder that classifies token sequences.

Token and position embeddings, transformer blocks, and the mean over positions. Every position
counts, so a padding token is a token like any other.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from trainer.models.precision import wide_type
from trainer.models.transformer_block import TransformerBlock

# As Devlin et al. 2019 start theirs.
_EMBEDDING_STDDEV = 0.02


class TextTransformer(nn.Module):
    """Transformer encoder for classification.

    Attributes:
        num_classes: Classes.
        vocab_size: Tokens are 0 .. vocab_size - 1.
        max_length: Longest sequence.
        width: Features per token, a multiple of ``heads``.
        depth: Blocks.
        heads: Heads of each attention.
        dtype: Type of the computation, by default that of the embeddings; pooled
            features and logits are at least float32.
    """

    num_classes: int
    vocab_size: int
    max_length: int
    width: int = 128
    depth: int = 2
    heads: int = 2
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of tokens int32 ``[batch, length]``.

        Raises:
            ValueError: If the sequences are longer than ``max_length``.
        """
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"length={length}: allowed is at most max_length={self.max_length}")
        init = nn.initializers.normal(_EMBEDDING_STDDEV)
        hidden = nn.Embed(
            self.vocab_size, self.width, embedding_init=init, dtype=self.dtype, name="tokens"
        )(tokens)
        positions = self.param("positions", init, (1, self.max_length, self.width), jnp.float32)
        hidden, positions = promote_dtype(hidden, positions[:, :length], dtype=self.dtype)
        hidden = hidden + positions
        for block in range(self.depth):
            hidden = TransformerBlock(self.heads, dtype=self.dtype, name=f"block{block + 1}")(
                hidden
            )
        hidden = nn.LayerNorm(name="final_norm")(hidden.astype(wide_type(hidden)))
        return nn.Dense(self.num_classes, name="head")(jnp.mean(hidden, axis=1))
