"""Training on examples that are read as they are drawn.

The host draws each batch, reads its examples in rows, ahead of time (`trainer.data.streaming`),
and the devices take one row after the other. A row is much smaller than a batch may be, so a batch
of any size trains in the memory of a row.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from trainer.training.devices import AXIS
from trainer.training.objective import Data
from trainer.training.step import Recipe, StepInputs, Sums, Traced, TrainState


@functools.lru_cache(maxsize=64)
def make_streamed_programs(recipe: Recipe, mesh: Mesh | None = None) -> tuple[Any, Any, Any]:
    """Compiles (once per shape) the programs that take a step row by row.

    Args:
        recipe: What a step is.
        mesh: As in `trainer.training.resident.make_resident_program`.

    Returns:
        Three jitted functions:

        * ``start(state) -> sums``;
        * ``add_row(sums, state, frozen, data, is_padding, view_key) -> sums``, where ``data``
          holds the row's examples and ``is_padding`` is bool ``[capacity]``, over a mesh both
          dealt out;
        * ``finish(state, sums, inputs, traced) -> state``; ``state`` is donated.
    """

    def sums_of_row(
        state: TrainState, frozen: Any, data: Data, is_padding: jax.Array, view_key: jax.Array
    ) -> Sums:
        units = jnp.arange(is_padding.shape[0], dtype=jnp.int32)
        return recipe.sums_of_row(state, frozen, data, units, is_padding, view_key)

    def over_devices(
        state: TrainState, frozen: Any, data: Data, is_padding: jax.Array, view_key: jax.Array
    ) -> Sums:
        assert mesh is not None
        dealt, everywhere = PartitionSpec(AXIS), PartitionSpec()
        units_here = is_padding.shape[0] // mesh.size
        positions = None if data.positions is None else dealt
        specs = Data(images=dealt, labels=dealt, positions=positions, first=everywhere)

        def here(
            state: TrainState, frozen: Any, data: Data, is_padding: jax.Array, view_key: jax.Array
        ) -> Sums:
            device = jax.lax.axis_index(AXIS).astype(jnp.int32)
            mine = data._replace(first=data.first + device * units_here)
            return jax.lax.psum(sums_of_row(state, frozen, mine, is_padding, view_key), AXIS)

        return jax.shard_map(
            here,
            mesh=mesh,
            in_specs=(everywhere, everywhere, specs, dealt, everywhere),
            out_specs=everywhere,
            check_vma=False,  # each device runs as many microbatches as it has units
        )(state, frozen, data, is_padding, view_key)

    row_sums = sums_of_row if mesh is None else over_devices

    # Sums are not donated: the caller waits for the ones before, so that rows do not pile up.
    @jax.jit
    def add_row(
        sums: Sums,
        state: TrainState,
        frozen: Any,
        data: Data,
        is_padding: jax.Array,
        view_key: jax.Array,
    ) -> Sums:
        return jax.tree.map(jnp.add, sums, row_sums(state, frozen, data, is_padding, view_key))

    @functools.partial(jax.jit, donate_argnums=0)
    def finish(state: TrainState, sums: Sums, inputs: StepInputs, traced: Traced) -> TrainState:
        return recipe.finish(state, sums, inputs, traced)

    return jax.jit(recipe.no_sums), add_row, finish


def user_examples(
    positions: np.ndarray, users: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Some examples of each user in a row.

    Args:
        positions: int32 ``[num_users, most]``, padded with -1.
        users: int32 ``[capacity]``, padded with -1.
        count: How many of each user; of who has more, each is as likely as any other.
        rng: Secret, of this step.

    Returns:
        int32 ``[capacity, count]``, padded with -1.
    """
    theirs = np.where(users[:, None] >= 0, positions[users], -1)
    order = np.where(theirs >= 0, rng.random(theirs.shape), 2.0)
    chosen = np.take_along_axis(theirs, np.argsort(order, axis=1)[:, :count], axis=1)
    missing = count - chosen.shape[1]
    return np.pad(chosen, ((0, 0), (0, max(0, missing))), constant_values=-1).astype(np.int32)
