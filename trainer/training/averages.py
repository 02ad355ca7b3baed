"""Averages of the iterates: evaluated beside the last one, often better, and free.

Iterates are DP outputs, so any average of them is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from trainer.config_sections import AveragingConfig

EMA = "ema"
POLYAK = "polyak"


def start_averages(config: AveragingConfig, params: Any) -> dict[str, Any]:
    """The averages that a configuration asks for, before the first step."""
    asked = {EMA: config.ema_decay is not None, POLYAK: config.polyak}
    return {name: jax.tree.map(jnp.copy, params) for name, yes in asked.items() if yes}


def update_averages(
    averages: dict[str, Any], params: Any, step: jax.Array | int, ema_decay: jax.Array | float
) -> dict[str, Any]:
    """The averages after a step.

    Args:
        averages: Before it.
        params: The iterate that the step ended with.
        step: The step's number since the averages began, from 1.
        ema_decay: Decay of ``ema``. Its first steps decay faster, by
            ``min(decay, (1 + t) / (10 + t))`` with t steps before (De et al. 2022,
            https://arxiv.org/abs/2204.13650, appendix C.3, after TensorFlow's).

    Returns:
        The same keys: ``ema``, and ``polyak``, the mean of all iterates since the first step.
    """
    before = jnp.asarray(step, jnp.float32) - 1
    weights = {
        EMA: 1 - jnp.minimum(ema_decay, (1 + before) / (10 + before)),
        POLYAK: 1 / (1 + before),
    }
    return {
        name: jax.tree.map(
            lambda old, new, w=weights[name]: old + w * (new - old), average, params
        )
        for name, average in averages.items()
    }
