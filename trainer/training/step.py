"""One step of training: from clipped gradients to new parameters.

    rows of a batch -> clipped gradients, summed -> noise -> optimizer -> averages

Everything in which trials of one shape differ is an argument (`Traced`): learning rates, weight
decay, clip norm, noise, divisor, keys. So one program serves every such trial of a sweep. The
clip norm is part of the state, since `quantile` clipping moves it. Where batches come from is
left to `trainer.training.resident` and `trainer.training.streamed`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.clipping import ClippingMode, clipped_grad
from trainer.config import ClippingModeName, OptimizerName
from trainer.mechanism.noise import add_noise, count_noise
from trainer.mechanism.quantile_clipping import next_clip_norm, shifted_count
from trainer.training.averages import update_averages
from trainer.training.objective import Data, Objective
from trainer.training.optimizers import make_optimizer, pre_clipping_scale


class TrainState(NamedTuple):
    """What training changes.

    All but the last are DP outputs.

    Attributes:
        params: What is trained of the model.
        opt_state: The optimizer's state.
        l2_clip_norm: Bound on one unit's gradient norm in the next step, a float32 scalar.
            Only `quantile` clipping changes it.
        averages: Averages of the iterates, by name (`trainer.training.averages`).
        noise: What correlated noise remembers. Secret: it never leaves the process.
    """

    params: Any
    opt_state: Any
    l2_clip_norm: jax.Array
    averages: dict[str, Any]
    noise: Any


class QuantileTraced(NamedTuple):
    """The numbers of `mechanism.quantile_clipping`, float32 scalars."""

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
        ema_decay: Of the moving average, where there is one.
        averages_start: Steps that were behind the trial when its averages began.
        quantile: Given where the mode is `quantile`, and only there.
    """

    learning_rate: jax.Array | float
    noise_multiplier: jax.Array | float
    expected_batch_size: jax.Array | float
    weight_decay: jax.Array | float = 0.0
    ema_decay: jax.Array | float = 0.0
    averages_start: jax.Array | float = 0.0
    quantile: QuantileTraced | None = None


class StepInputs(NamedTuple):
    """What differs from step to step; with a leading axis, of several steps.

    Attributes:
        step: int32, the step's number, from 1.
        noise_key: uint32 ``[2]``, secret.
        draw_key: uint32 ``[2]``, secret; read where a device draws the batch.
        view_key: uint32 ``[2]``, secret; read where the loss of a unit is random.
        learning_rate_factor: float32, from the schedule.
    """

    step: Any
    noise_key: Any
    draw_key: Any
    view_key: Any
    learning_rate_factor: Any


class Sums(NamedTuple):
    """What the rows of a step add up to; private until it has its noise.

    Attributes:
        grads: The clipped gradients.
        shifted_count: Of gradients within the clip norm; None where nothing is counted.
    """

    grads: Any
    shifted_count: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is compiled into a step; equal recipes share a program.

    Attributes:
        objective: What is differentiated.
        optimizer: Its name.
        mode: How gradients are clipped.
        engine: How that is computed: a settled one, never ``auto`` (`trainer.training.engine`).
        microbatch_size: Units processed at a time; None for a whole row.
        noise_strategy: Coefficients of correlated noise; empty for independent noise.
    """

    objective: Objective
    optimizer: OptimizerName
    mode: ClippingModeName = "flat"
    engine: Any = "book_keeping"
    microbatch_size: int | None = None
    noise_strategy: tuple[float, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether a step counts gradients within the clip norm."""
        return self.mode == "quantile"

    @property
    def clipping_mode(self) -> ClippingMode:
        """How the gradients of one step are clipped: `quantile` clips flat."""
        return "flat" if self.mode == "quantile" else self.mode

    def no_sums(self, state: TrainState) -> Sums:
        """The sums of a batch of nobody."""
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        return Sums(zeros, jnp.float32(0) if self.counts else None)

    def sums_of_row(
        self,
        state: TrainState,
        frozen: Any,
        data: Data,
        units: jax.Array,
        is_padding: jax.Array,
        view_key: jax.Array,
    ) -> Sums:
        """What the units in a row add.

        Args:
            state: Before the step.
            frozen: Parameters that are not trained.
            data: All examples.
            units: int32 ``[capacity]``, positions of units.
            is_padding: bool ``[capacity]``; these add nothing.
            view_key: The step's.
        """
        scale = pre_clipping_scale(self.optimizer, state.opt_state)
        transform: dict[str, Any] = {}
        if scale is not None:
            transform = {
                "pre_clipping_transform": lambda grads: jax.tree.map(jnp.multiply, grads, scale)
            }
        grad_fn = clipped_grad(
            self.objective.loss,
            batch_argnums=3,
            keep_batch_dim=False,
            l2_clip_norm=state.l2_clip_norm,
            return_grad_norms=self.counts,
            microbatch_size=self.microbatch_size,
            engine=self.engine,
            mode=self.clipping_mode,
            **transform,
        )
        units = jnp.where(is_padding, 0, units)
        summed = grad_fn(
            state.params, frozen, data, units, view_key, is_padding_example=is_padding
        )
        if not self.counts:
            return Sums(summed, None)
        grads, aux = summed
        return Sums(grads, shifted_count(aux.grad_norms, is_padding, state.l2_clip_norm))

    def finish(
        self, state: TrainState, sums: Sums, inputs: StepInputs, traced: Traced
    ) -> TrainState:
        """Ends a step: noise, once and for all rows together, then the update.

        Formal guarantees:
            A step changes the parameters only through the clipped sum, whose L2 sensitivity is
            the state's clip norm, plus Gaussian noise of ``noise_multiplier`` times that
            sensitivity. It changes the clip norm not at all, or in mode `quantile` only through
            the shifted count, whose sensitivity is 1/2, plus Gaussian noise of
            ``count_noise_stddev``, independent of the former.

        Args:
            state: Before the step.
            sums: Of all rows.
            inputs: The step's.
            traced: The trial's numbers.
        """
        # Zero noise is plain SGD whatever the clip norm, where 0 x infinity would be NaN. No
        # configuration asks for it: `TrialConfig` and the accountant both refuse zero.
        stddev = jnp.where(
            jnp.equal(traced.noise_multiplier, 0),
            0.0,
            traced.noise_multiplier * state.l2_clip_norm,
        )
        noisy, noise = add_noise(
            sums.grads,
            state.noise,
            key_data=inputs.noise_key,
            stddev=stddev,
            strategy=self.noise_strategy,
        )
        scale = pre_clipping_scale(self.optimizer, state.opt_state)
        if scale is not None:
            noisy = jax.tree.map(jnp.divide, noisy, scale)
        dp_grad = jax.tree.map(lambda total: total / traced.expected_batch_size, noisy)
        optimizer = make_optimizer(
            self.optimizer,
            jnp.multiply(traced.learning_rate, inputs.learning_rate_factor),
            traced.weight_decay,
            jnp.square(stddev / traced.expected_batch_size),
        )
        updates, opt_state = optimizer.update(dp_grad, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averaged = jnp.asarray(inputs.step, jnp.float32) - traced.averages_start
        return TrainState(
            params=params,
            opt_state=opt_state,
            l2_clip_norm=self._next_clip_norm(state, sums, inputs, traced),
            averages=update_averages(state.averages, params, averaged, traced.ema_decay),
            noise=noise,
        )

    def _next_clip_norm(
        self, state: TrainState, sums: Sums, inputs: StepInputs, traced: Traced
    ) -> jax.Array:
        if sums.shifted_count is None:
            return state.l2_clip_norm
        assert traced.quantile is not None  # its mode was chosen when the program was made
        return next_clip_norm(
            state.l2_clip_norm,
            sums.shifted_count + count_noise(inputs.noise_key, traced.quantile.count_noise_stddev),
            expected_batch_size=traced.expected_batch_size,
            target_quantile=traced.quantile.target_quantile,
            learning_rate=traced.quantile.learning_rate,
        )
