"""Optimizers by their optax names.

The learning rate and the weight decay may be traced numbers, so that trials which differ in them
alone share one compiled program. The rate is given anew for each step (`trainer.schedules`), so
no optimizer counts steps for it, and the state's shape depends on the name alone.

Weight decay is decoupled throughout (Loshchilov & Hutter 2019, "Decoupled Weight Decay
Regularization"): it pulls the parameters, which are DP outputs already, and touches no gradient
before the noise. So it costs no privacy and has no part in the clip norm.
"""

import jax
import optax

from trainer.config import OptimizerName

MOMENTUM = 0.9


def make_optimizer(
    name: OptimizerName,
    learning_rate: float | jax.Array,
    weight_decay: float | jax.Array = 0.0,
) -> optax.GradientTransformation:
    """The optimizer of a trial.

    Args:
        name: ``momentum`` and ``nesterov`` are SGD with momentum 0.9, as ``lars`` has it too;
            the rest are optax's defaults. ``adamw`` is another name for ``adam``, which decays
            weights as well.
        learning_rate: Step size of the next step, > 0; may be traced.
        weight_decay: Part of the weights that a step at learning rate 1 takes away, >= 0; may
            be traced. ``lamb`` and ``lars`` scale it by the layer's trust ratio, as published
            (You et al. 2020 and 2017).

    Returns:
        An optax transformation from dp_grad to update.
    """
    match name:
        case "lamb":
            return optax.lamb(learning_rate, weight_decay=weight_decay)  # type: ignore[arg-type]
        case "lars":
            return optax.lars(
                learning_rate,
                weight_decay=weight_decay,  # type: ignore[arg-type]
                momentum=MOMENTUM,
            )
        case "sgd":
            direction = optax.identity()
        case "momentum":
            direction = optax.trace(MOMENTUM)
        case "nesterov":
            direction = optax.trace(MOMENTUM, nesterov=True)
        case "adam" | "adamw":
            direction = optax.scale_by_adam()
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
