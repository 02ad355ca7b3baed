"""A clip norm that follows a quantile of the gradient norms, and what that releases.

Each step counts the gradients that the clip norm leaves as they are, adds noise, and moves the
clip norm towards the value that leaves the wanted fraction unclipped (Andrew et al. 2021,
"Differentially Private Learning with Adaptive Clipping", arXiv 1905.03871, Algorithm 1). The
noisy count is part of the accounted mechanism (`trainer.training.plan.noise_of_gradients`); the
clip norm is computed from noisy counts alone, so it is a DP output, as the parameters are.
"""

import jax
import jax.numpy as jnp

# Where the clip norm stays, so that neither it nor a norm's square leaves float32's range: noise
# of zero on sums that are not, or infinite noise, would otherwise be in reach of long runs.
LEAST_CLIP_NORM = 1e-10
LARGEST_CLIP_NORM = 1e10


def shifted_count(
    grad_norms: jax.Array, is_padding: jax.Array, l2_clip_norm: jax.Array | float
) -> jax.Array:
    """How many gradients are within the clip norm, less half the number of examples.

    Each example adds +1/2 if its gradient's norm is at most the clip norm, and -1/2 if not.

    Formal guarantees: the L2 sensitivity is 1/2 under

    * ``add_or_remove_one``: the other examples' terms do not change, each being a function of
      its example, of the parameters and of the clip norm; the one more or less adds +-1/2.
    * ``zero_out``: the others' terms do not change either; the blanked example adds nothing to
      any sum of a step, as if it were padding: zero instead of +-1/2.

    Without the shift the former would be 1, which is why the paper has it. (Where one example
    *replaces* another the count moves by up to 1; no relation here allows that.)

    An example whose gradient is not finite has a norm of infinity or NaN, neither of which is
    ``<= l2_clip_norm``, so it adds -1/2 as any other clipped one; or of zero by engines that drop
    such a gradient first, and adds +1/2. The guarantee needs no more than that it is one of them.

    Args:
        grad_norms: Norms before clipping, ``[batch]``; private.
        is_padding: bool ``[batch]``; these add zero.
        l2_clip_norm: The step's.

    Returns:
        A float32 scalar, exact up to 2^23 examples; private until it has its noise.
    """
    terms = jnp.where(grad_norms <= l2_clip_norm, 0.5, -0.5)
    return jnp.sum(jnp.where(is_padding, 0.0, terms), dtype=jnp.float32)


def next_clip_norm(
    l2_clip_norm: jax.Array,
    noisy_count: jax.Array,
    *,
    expected_batch_size: jax.Array | float,
    target_quantile: jax.Array | float,
    learning_rate: jax.Array | float,
) -> jax.Array:
    """The clip norm of the step that follows: ``C exp(-eta_C (b - gamma))``.

    Args:
        l2_clip_norm: C, of this step.
        noisy_count: `shifted_count` of the whole step, with its noise.
        expected_batch_size: What makes a fraction b of the count; public, never the realised
            batch size.
        target_quantile: gamma, the fraction to leave unclipped.
        learning_rate: eta_C.

    Returns:
        A float32 scalar in [`LEAST_CLIP_NORM`, `LARGEST_CLIP_NORM`].
    """
    fraction = noisy_count / expected_batch_size + 0.5
    moved = l2_clip_norm * jnp.exp(-learning_rate * (fraction - target_quantile))
    return jnp.clip(moved, LEAST_CLIP_NORM, LARGEST_CLIP_NORM)
