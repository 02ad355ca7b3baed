"""Optimizers by their optax names.

The learning rate may be a traced number, so that trials which differ in it alone share one
compiled program. None of these schedules anything, so the state's shape does not depend on it.
"""

import jax
import optax

from trainer.config import OptimizerName

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


def make_optimizer(
    name: OptimizerName, learning_rate: float | jax.Array
) -> optax.GradientTransformation:
    """The optimizer of a trial.

    Args:
        name: ``momentum`` and ``nesterov`` are SGD with momentum 0.9; ``adamw`` decays weights
            by 1e-4 (decoupled, so it touches no gradient); the rest are optax's defaults.
        learning_rate: Step size, > 0; may be traced.

    Returns:
        An optax transformation from dp_grad to update.
    """
    match name:
        case "sgd":
            return optax.sgd(learning_rate)
        case "momentum":
            return optax.sgd(learning_rate, momentum=MOMENTUM)
        case "nesterov":
            return optax.sgd(learning_rate, momentum=MOMENTUM, nesterov=True)
        case "adam":
            return optax.adam(learning_rate)
        case "adamw":
            return optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)
        case "lamb":
            return optax.lamb(learning_rate)
