"""Vision transformer: an image as a sequence of patches.

Dosovitskiy et al. 2021: each patch becomes a vector, a class token is put in front, positions
are learned, and the logits are read off the class token. The sizes: base is theirs, tiny and
small are those of Touvron et al. 2021.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from trainer.models.precision import wide_type
from trainer.models.transformer_block import TransformerBlock

_POSITION_STDDEV = 0.02


def patch_size_for(height: int, width: int) -> int:
    """The patch side for images of a size: 16, 4 or 2 pixels.

    The published 16 for images of 64 pixels and more; smaller ones get smaller patches, so that
    8x8 and larger images have at least 4x4 patches.
    """
    side = min(height, width)
    if side >= 64:
        return 16
    return 4 if side >= 16 else 2


class VisionTransformer(nn.Module):
    """Vision transformer; the defaults are ViT-Tiny.

    Attributes:
        num_classes: Classes.
        width: Features per patch, a multiple of ``heads``.
        heads: Heads of each attention.
        depth: Blocks.
        patch_size: Side of a patch in pixels. None: by the image's size, `patch_size_for`.
        dtype: Type of the computation, by default that of inputs and parameters; pooled
            features and logits are at least float32.
    """

    num_classes: int
    width: int = 192
    heads: int = 3
    depth: int = 12
    patch_size: int | None = None
    dtype: jax.typing.DTypeLike | None = None

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits ``[batch, num_classes]`` of images ``[batch, height, width, channels]``."""
        batch, height, width = images.shape[:3]
        side = patch_size_for(height, width) if self.patch_size is None else self.patch_size
        # SAME pads an image whose sides are no multiples of the patch's; no pixel is left out.
        patches = nn.Conv(
            self.width,
            (side, side),
            strides=(side, side),
            padding="SAME",
            dtype=self.dtype,
            name="patches",
        )(images).reshape(batch, -1, self.width)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)
        positions = self.param(
            "positions",
            nn.initializers.normal(_POSITION_STDDEV),
            (1, 1 + patches.shape[1], self.width),
            jnp.float32,
        )
        token, patches, positions = promote_dtype(token, patches, positions, dtype=self.dtype)
        tokens = jnp.broadcast_to(token, (batch, 1, self.width))
        hidden = jnp.concatenate([tokens, patches], axis=1) + positions
        for block in range(self.depth):
            hidden = TransformerBlock(self.heads, dtype=self.dtype, name=f"block{block + 1}")(
                hidden
            )
        summary = hidden[:, 0].astype(wide_type(hidden))
        summary = nn.LayerNorm(name="final_norm")(summary)
        return nn.Dense(self.num_classes, name="head")(summary)
