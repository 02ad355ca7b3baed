"""Optimizers by their optax names, and two that know of the noise.

The learning rate, the weight decay and the noise may be traced numbers, so that trials which
differ in them alone share one compiled program. The rate is given anew for each step
(`trainer.training.schedules`), so no optimizer counts steps for it, and the state's shape depends
on the name alone. What an optimizer does is post-processing of noisy gradients, which costs no
privacy.

Weight decay is decoupled throughout (Loshchilov & Hutter 2019, "Decoupled Weight Decay
Regularization"): it pulls the parameters, which are DP outputs already, and touches no gradient
before the noise. So it costs no privacy and has no part in the clip norm.

Adam's second moment holds the noise's variance, where it drowns the gradient's. Two ways out:

* ``dp_adam_bc`` subtracts it (`scale_by_corrected_adam`).
* ``scale_then_privatize`` divides each unit's gradient by the root of the second moment *before*
  it is clipped, and multiplies back after the noise was added (Ganesh, McMahan & Thakurta 2025,
  "On Design Principles for Private Adaptive Optimizers", https://arxiv.org/abs/2507.01129,
  Algorithm 8). The clip norm is then one of scaled gradients.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config import OptimizerName

MOMENTUM = 0.9

# Keeps the first steps' scale, when nothing is known of the second moment, within reason.
SCALE_EPSILON = 1e-3

# Of the noise's variance: three standard errors of a second moment over 1,000 steps.
_LEAST_SIGNAL = 0.1


def make_optimizer(
    name: OptimizerName,
    learning_rate: float | jax.Array,
    weight_decay: float | jax.Array = 0.0,
    noise_variance: float | jax.Array = 0.0,
) -> optax.GradientTransformation:
    """The optimizer of a trial.

    Args:
        name: ``momentum`` and ``nesterov`` are SGD with momentum 0.9, as ``lars`` has it too;
            the rest are optax's defaults. ``adamw`` is another name for ``adam``, which decays
            weights as well. ``scale_then_privatize`` is Adam here; see `pre_clipping_scale`.
        learning_rate: Step size of the next step, > 0; may be traced.
        weight_decay: Part of the weights that a step at learning rate 1 takes away, >= 0; may
            be traced. ``lamb`` and ``lars`` scale it by the layer's trust ratio, as published
            (You et al. 2020 and 2017).
        noise_variance: Variance of the noise on each coordinate of dp_grad, >= 0; may be traced.
            ``dp_adam_bc`` alone reads it.

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
        case "adam" | "adamw" | "scale_then_privatize":
            direction = optax.scale_by_adam()
        case "dp_adam_bc":
            direction = scale_by_corrected_adam(noise_variance)
    return optax.chain(
        direction,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_corrected_adam(
    noise_variance: float | jax.Array,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """Adam whose second moment has the noise's variance subtracted.

    The update is ``m / (sqrt(max(v - variance, variance / 10)) + eps)`` with both moments
    corrected for their start at zero (Tang, Shpilevskiy & Lécuyer 2024, "DP-AdamBC: Your DP-Adam
    Is Actually DP-SGD (Unless You Apply Bias Correction)", https://arxiv.org/abs/2312.14334,
    Algorithm 1). Their floor under the root is a constant to be tuned; this one follows the
    noise, so that without noise it is Adam.

    Args:
        noise_variance: Of each coordinate of the gradient; may be traced.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: As in `optax.scale_by_adam`.
    """

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        first = optax.tree.bias_correction(mu, b1, count)
        second = optax.tree.bias_correction(nu, b2, count)
        floor = _LEAST_SIGNAL * noise_variance

        def scaled(m: jax.Array, v: jax.Array) -> jax.Array:
            return m / (jnp.sqrt(jnp.maximum(v - noise_variance, floor)) + eps)

        state = optax.ScaleByAdamState(count=count, mu=mu, nu=nu)
        return jax.tree.map(scaled, first, second), state

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2, eps).init, update)


def pre_clipping_scale(name: OptimizerName, opt_state: Any) -> Any | None:
    """What an optimizer has each unit's gradient multiplied with before it is clipped.

    Args:
        name: The optimizer.
        opt_state: Its state before the step; a DP output, so the scale is one.

    Returns:
        A pytree of positive numbers like the parameters; None for all but
        ``scale_then_privatize``.
    """
    if name != "scale_then_privatize":
        return None
    moments = opt_state[0].nu
    return jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + SCALE_EPSILON), moments)
