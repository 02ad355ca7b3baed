"""The compiled program: many DP-SGD steps in one call.

A segment scans over rows (`trainer.sampling`). Each row adds its clipped gradients to a running
sum; the row that ends a step turns the sum into a noisy average, updates the parameters and
starts the next sum. Everything in which trials of one shape differ is an argument: learning
rate, clip norm, noise, divisor, keys. So one program serves every such trial of a sweep.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.clipping import clipped_grad
from trainer.config import OptimizerName
from trainer.keys import BranchKeys
from trainer.models import cross_entropy
from trainer.noise import gaussian_noise_like
from trainer.optimizers import make_optimizer
from trainer.plan import TrainingPlan
from trainer.sampling import PADDING


class TrainState(NamedTuple):
    """What training changes: parameters and optimizer state, both DP outputs."""

    params: Any
    opt_state: Any


class Traced(NamedTuple):
    """Numbers that reach the program as arguments, float32 scalars."""

    learning_rate: jax.Array | float
    l2_clip_norm: jax.Array | float
    noise_multiplier: jax.Array | float
    expected_batch_size: jax.Array | float


class Rows(NamedTuple):
    """The batches of several steps.

    Attributes:
        indices: int32 ``[rows, capacity]``, padded with -1.
        ends_step: bool ``[rows]``; True in the last row of each step.
        noise_keys: uint32 ``[rows, 2]``; read where ``ends_step`` holds.
    """

    indices: np.ndarray
    ends_step: np.ndarray
    noise_keys: np.ndarray

    def split(self, size: int) -> "Iterator[Rows]":
        """Parts of ``size`` rows; the row count is a multiple of it."""
        for first in range(0, len(self.ends_step), size):
            yield Rows(*(leaf[first : first + size] for leaf in self))


def draw_rows(plan: TrainingPlan, keys: BranchKeys, start: int, stop: int, multiple: int) -> Rows:
    """Draws the batches of steps ``start + 1 .. stop``.

    Args:
        plan: Its sampler draws.
        keys: The branch's secrets; the step's number picks the key.
        start: Steps already taken.
        stop: Steps taken afterwards, > start.
        multiple: The row count is padded to a multiple of this with rows that do nothing.
    """
    indices, ends_step, noise_keys = [], [], []
    for step in range(start + 1, stop + 1):
        step_rows = plan.sampler.rows(keys.sampling_rng(step))
        indices.append(step_rows)
        ends_step += [False] * (len(step_rows) - 1) + [True]
        noise_keys += [keys.noise_key(step)] * len(step_rows)
    missing = -len(ends_step) % multiple
    indices.append(np.full((missing, plan.sampler.capacity), PADDING, np.int32))
    return Rows(
        indices=np.concatenate(indices),
        ends_step=np.array(ends_step + [False] * missing),
        noise_keys=np.concatenate([np.stack(noise_keys), np.zeros((missing, 2), np.uint32)]),
    )


@functools.lru_cache(maxsize=64)
def make_segment(model: nn.Module, optimizer_name: OptimizerName) -> Any:
    """Compiles (once per shape) the program that takes the steps in some rows.

    Args:
        model: From `trainer.models.make_model`; modules are compared by value.
        optimizer_name: One of `OptimizerName`.

    Returns:
        ``segment(state, images, labels, rows, traced) -> state``, jitted, with images float32
        ``[num_examples, height, width, channels]`` and labels int32 ``[num_examples]``. Rows
        must hold whole steps. ``state`` is donated.

    Guarantees:
        A step changes the parameters only through the clipped sum, whose L2 sensitivity is
        the clip norm, plus Gaussian noise of ``noise_multiplier`` times that sensitivity.
    """

    def mean_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        losses, _ = cross_entropy(model, params, images, labels)
        return jnp.mean(losses)

    def take_step(state: TrainState, grad_sum: Any, sensitivity: Any, key: Any, traced: Traced):
        # Zero noise is plain SGD whatever the clip norm, where 0 x infinity would be NaN. No
        # configuration asks for it: `TrialConfig` and the accountant both refuse zero.
        stddev = jnp.where(
            jnp.equal(traced.noise_multiplier, 0), 0.0, traced.noise_multiplier * sensitivity
        )
        noise = gaussian_noise_like(key, grad_sum, stddev)
        dp_grad = jax.tree.map(
            lambda total, draw: (total + draw) / traced.expected_batch_size, grad_sum, noise
        )
        optimizer = make_optimizer(optimizer_name, traced.learning_rate)
        updates, opt_state = optimizer.update(dp_grad, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state)

    @functools.partial(jax.jit, donate_argnums=0)
    def segment(
        state: TrainState, images: jax.Array, labels: jax.Array, rows: Rows, traced: Traced
    ) -> TrainState:
        grad_fn = clipped_grad(mean_loss, batch_argnums=(1, 2), l2_clip_norm=traced.l2_clip_norm)
        sensitivity = grad_fn.sensitivity()

        def add_row(carry, row: Rows):
            state, grad_sum = carry
            is_padding = row.indices == PADDING
            indices = jnp.where(is_padding, 0, row.indices)
            clipped_grad_sum = grad_fn(
                state.params, images[indices], labels[indices], is_padding_example=is_padding
            )
            grad_sum = jax.tree.map(jnp.add, grad_sum, clipped_grad_sum)
            return jax.lax.cond(
                row.ends_step,
                lambda: (
                    take_step(state, grad_sum, sensitivity, row.noise_keys, traced),
                    jax.tree.map(jnp.zeros_like, grad_sum),
                ),
                lambda: (state, grad_sum),
            ), None

        carry = (state, jax.tree.map(jnp.zeros_like, state.params))
        (state, _), _ = jax.lax.scan(add_row, carry, rows)
        return state

    return segment
