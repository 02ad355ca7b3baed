"""Places where a parameter meets data, one module for each kind."""

from typing import Any

import jax.numpy as jnp
from jax.extend.core import primitives

from trainer.clipping.uses.convolution import Convolution
from trainer.clipping.uses.dense import Contraction
from trainer.clipping.uses.embedding import Lookup
from trainer.clipping.uses.gram import Gram, Measured, gram_of_weight
from trainer.clipping.uses.standardized import StandardizedConvolution
from trainer.clipping.uses.use import CopiedOperand, Use, widened

__all__ = [
    "Contraction",
    "CopiedOperand",
    "Gram",
    "Measured",
    "StandardizedConvolution",
    "Use",
    "gram_of_weight",
    "known_use",
    "widened",
]


def known_use(eqn: Any, position: int, standardized: bool) -> Use | None:
    """The formula for an equation with a parameter operand, or None.

    Args:
        eqn: The equation.
        position: Which operand is the parameter.
        standardized: Whether that is the weight standardisation of a parameter.
    """
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        return None
    if eqn.primitive is primitives.dot_general_p:
        return Contraction.of(eqn, position)
    if eqn.primitive is primitives.conv_general_dilated_p and position == 1:
        convolution = Convolution.of(eqn)
        # The output in half precision is not accurate enough to measure with.
        if standardized and convolution is not None and eqn.outvars[0].aval.dtype.itemsize >= 4:
            return StandardizedConvolution.of(convolution) or convolution
        return convolution
    if eqn.primitive is primitives.gather_p and position == 0:
        return Lookup.of(eqn)
    return None
