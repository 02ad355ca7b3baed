"""Random views of an image: mirrored, and cropped after padding by reflection.

A view is a function of one example and of random numbers, so it couples nothing. The gradients
of all views of an example are averaged *before* clipping (De et al. 2022, section 3.4): the
example still adds one gradient of bounded norm.
"""

import jax
import jax.numpy as jnp

from trainer.config_sections import AugmentationConfig


def views_of(image: jax.Array, key: jax.Array, config: AugmentationConfig) -> jax.Array:
    """Random views of one image.

    Args:
        image: ``[height, width, channels]``.
        key: Of this example in this step.
        config: How many views, and what is done to them.

    Returns:
        ``[views, height, width, channels]``; the image itself where nothing is random.
    """
    if not config.is_random:
        return image[None]
    return jax.vmap(lambda key: _view(image, key, config))(jax.random.split(key, config.views))


def _view(image: jax.Array, key: jax.Array, config: AugmentationConfig) -> jax.Array:
    flip_key, crop_key = jax.random.split(key)
    if config.flip:
        image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    pad = config.crop_padding
    if pad == 0:
        return image
    # Reflection cannot reach further than an image is wide; what is beyond it repeats.
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
