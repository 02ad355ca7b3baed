"""Which types the models compute in.

A model's ``dtype`` means what Flax means by it: None computes in the promoted type of inputs and
parameters, a type casts both to it. What sums many numbers or exponentiates them, and all that
follows the last layer of a model's trunk, stays wider: `wide_type`.
"""

import jax
import jax.numpy as jnp


def wide_type(values: jax.Array) -> jnp.dtype:
    """The type for statistics, softmax, pooled features and logits: at least float32."""
    return jnp.promote_types(values.dtype, jnp.float32)
