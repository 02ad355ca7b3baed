"""The compiled program: many DP-SGD steps in one call.

A segment scans over rows (`trainer.sampling`). Each row adds its clipped gradients to a running
sum; the row that ends a step turns the sum into a noisy average, updates the parameters and
starts the next sum. Everything in which trials of one shape differ is an argument: learning
rates, weight decay, clip norm, noise, divisor, keys. So one program serves every such trial of a
sweep. The clip norm is part of the state, since `quantile` clipping moves it.
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
from trainer.config import ClippingEngine, ClippingModeName, OptimizerName
from trainer.keys import BranchKeys
from trainer.models import cross_entropy
from trainer.noise import count_noise, gaussian_noise_like
from trainer.optimizers import make_optimizer
from trainer.plan import TrainingPlan
from trainer.quantile_clipping import next_clip_norm, shifted_count
from trainer.sampling import PADDING


class TrainState(NamedTuple):
    """What training changes; all of it DP outputs.

    Attributes:
        params: The model's parameters.
        opt_state: The optimizer's state.
        l2_clip_norm: Bound on one example's gradient norm in the next step, a float32 scalar.
            Only `quantile` clipping changes it.
    """

    params: Any
    opt_state: Any
    l2_clip_norm: jax.Array


class QuantileTraced(NamedTuple):
    """The numbers of `quantile` clipping, float32 scalars; see `trainer.quantile_clipping`."""

    target_quantile: jax.Array | float
    learning_rate: jax.Array | float
    count_noise_stddev: jax.Array | float


class Traced(NamedTuple):
    """Numbers that reach the program as arguments, float32 scalars.

    Attributes:
        learning_rate: Of the optimizer, before its schedule.
        noise_multiplier: Of the sum of gradients (`TrainingPlan.grad_noise_multiplier`).
        expected_batch_size: Divisor of the noisy sums.
        weight_decay: Of the optimizer.
        quantile: Given where the mode is `quantile`, and only there.
    """

    learning_rate: jax.Array | float
    noise_multiplier: jax.Array | float
    expected_batch_size: jax.Array | float
    weight_decay: jax.Array | float = 0.0
    quantile: QuantileTraced | None = None


class _Sums(NamedTuple):
    """What the rows of a step add up to; private until it has its noise.

    Attributes:
        grads: The clipped gradients.
        shifted_count: Of gradients within the clip norm; None where nothing is counted.
    """

    grads: Any
    shifted_count: jax.Array | None


class Rows(NamedTuple):
    """The batches of several steps.

    Attributes:
        indices: int32 ``[rows, capacity]``, padded with -1.
        ends_step: bool ``[rows]``; True in the last row of each step.
        noise_keys: uint32 ``[rows, 2]``; read where ``ends_step`` holds.
        learning_rate_factors: float32 ``[rows]``, from the schedule; read likewise.
    """

    indices: np.ndarray
    ends_step: np.ndarray
    noise_keys: np.ndarray
    learning_rate_factors: np.ndarray

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
    indices, ends_step, noise_keys, factors = [], [], [], []
    for step in range(start + 1, stop + 1):
        step_rows = plan.sampler.rows(keys.sampling_rng(step))
        indices.append(step_rows)
        ends_step += [False] * (len(step_rows) - 1) + [True]
        noise_keys += [keys.noise_key(step)] * len(step_rows)
        factors += [plan.learning_rate_factors[step - 1]] * len(step_rows)
    missing = -len(ends_step) % multiple
    indices.append(np.full((missing, plan.sampler.capacity), PADDING, np.int32))
    return Rows(
        indices=np.concatenate(indices),
        ends_step=np.array(ends_step + [False] * missing),
        noise_keys=np.concatenate([np.stack(noise_keys), np.zeros((missing, 2), np.uint32)]),
        learning_rate_factors=np.array(factors + [0.0] * missing, np.float32),
    )


@functools.lru_cache(maxsize=64)
def make_segment(
    model: nn.Module,
    optimizer_name: OptimizerName,
    mode: ClippingModeName = "flat",
    engine: ClippingEngine = "auto",
    microbatch_size: int | None = None,
) -> Any:
    """Compiles (once per shape) the program that takes the steps in some rows.

    Args:
        model: From `trainer.models.make_model`; modules are compared by value.
        optimizer_name: One of `OptimizerName`.
        mode: How gradients are clipped, one of `ClippingModeName`.
        engine: How that is computed, one of `ClippingEngine`.
        microbatch_size: Examples of a row processed at a time; None lets the engine choose.

    Returns:
        ``segment(state, images, labels, rows, traced) -> state``, jitted, with images float32
        ``[num_examples, height, width, channels]`` and labels int32 ``[num_examples]``. Rows
        must hold whole steps. ``state`` is donated.

    Guarantees:
        A step changes the parameters only through the clipped sum, whose L2 sensitivity is
        the state's clip norm, plus Gaussian noise of ``noise_multiplier`` times that
        sensitivity. It changes the clip norm not at all, or in mode `quantile` only through
        the shifted count, whose sensitivity is 1/2, plus Gaussian noise of
        ``count_noise_stddev``, independent of the former.
    """
    counts = mode == "quantile"

    def mean_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        losses, _ = cross_entropy(model, params, images, labels)
        return jnp.mean(losses)

    def sums_of_row(
        state: TrainState, images: jax.Array, labels: jax.Array, is_padding: jax.Array
    ) -> _Sums:
        grad_fn = clipped_grad(
            mean_loss,
            batch_argnums=(1, 2),
            l2_clip_norm=state.l2_clip_norm,
            return_grad_norms=counts,
            microbatch_size=microbatch_size,
            engine=engine,
            mode="flat" if mode == "quantile" else mode,
        )
        summed = grad_fn(state.params, images, labels, is_padding_example=is_padding)
        if not counts:
            return _Sums(summed, None)
        grads, aux = summed
        return _Sums(grads, shifted_count(aux.grad_norms, is_padding, state.l2_clip_norm))

    def take_step(state: TrainState, sums: _Sums, row: Rows, traced: Traced) -> TrainState:
        key = row.noise_keys
        # Zero noise is plain SGD whatever the clip norm, where 0 x infinity would be NaN. No
        # configuration asks for it: `TrialConfig` and the accountant both refuse zero.
        stddev = jnp.where(
            jnp.equal(traced.noise_multiplier, 0),
            0.0,
            traced.noise_multiplier * state.l2_clip_norm,
        )
        noise = gaussian_noise_like(key, sums.grads, stddev)
        dp_grad = jax.tree.map(
            lambda total, draw: (total + draw) / traced.expected_batch_size, sums.grads, noise
        )
        learning_rate = jnp.multiply(traced.learning_rate, row.learning_rate_factors)
        optimizer = make_optimizer(optimizer_name, learning_rate, traced.weight_decay)
        updates, opt_state = optimizer.update(dp_grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if sums.shifted_count is None:
            return TrainState(params, opt_state, state.l2_clip_norm)
        assert traced.quantile is not None  # its mode was chosen when the program was made
        l2_clip_norm = next_clip_norm(
            state.l2_clip_norm,
            sums.shifted_count + count_noise(key, traced.quantile.count_noise_stddev),
            expected_batch_size=traced.expected_batch_size,
            target_quantile=traced.quantile.target_quantile,
            learning_rate=traced.quantile.learning_rate,
        )
        return TrainState(params, opt_state, l2_clip_norm)

    @functools.partial(jax.jit, donate_argnums=0)
    def segment(
        state: TrainState, images: jax.Array, labels: jax.Array, rows: Rows, traced: Traced
    ) -> TrainState:
        def add_row(carry, row: Rows):
            state, sums = carry
            is_padding = row.indices == PADDING
            indices = jnp.where(is_padding, 0, row.indices)
            of_row = sums_of_row(state, images[indices], labels[indices], is_padding)
            sums = jax.tree.map(jnp.add, sums, of_row)
            return jax.lax.cond(
                row.ends_step,
                lambda: (
                    take_step(state, sums, row, traced),
                    jax.tree.map(jnp.zeros_like, sums),
                ),
                lambda: (state, sums),
            ), None

        nothing = _Sums(
            jax.tree.map(jnp.zeros_like, state.params), jnp.float32(0) if counts else None
        )
        (state, _), _ = jax.lax.scan(add_row, (state, nothing), rows)
        return state

    return segment
