"""Training on examples that live on the devices: sampled, gathered and trained on in one program.

A call takes many steps. Each step draws its batch on the device, from a key of its own, so the
host has nothing to do between two steps, and where calls begin and end changes nothing. Over
several devices the units are dealt out; each device clips and sums what it has drawn of its own,
the sums are added up, and the noise is added to the total, once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from trainer.mechanism.noise import KEY_IMPL
from trainer.training.devices import AXIS
from trainer.training.objective import Data
from trainer.training.step import Recipe, StepInputs, Sums, Traced, TrainState

# What is folded into a step's key for the draw that a truncated batch needs besides.
_TRUNCATION = 1


@dataclasses.dataclass(frozen=True)
class Draw:
    """The shape of a sampler (`mechanism.sampling.Sampler`); its probability is an argument.

    Attributes:
        num_units: Units in the training set.
        capacity: Slots in a row of one device.
        bands: Number of groups.
        truncated_batch_size: As in the sampler.
    """

    num_units: int
    capacity: int
    bands: int = 1
    truncated_batch_size: int | None = None

    def chosen(
        self,
        key_data: jax.Array,
        step: jax.Array,
        groups: jax.Array | None,
        largest_bits: jax.Array,
    ) -> jax.Array:
        """Who takes part in a step, bool ``[num_units]``.

        Args:
            key_data: uint32 ``[2]``, the step's; secret.
            step: Its number, which picks the group.
            groups: int32 ``[num_units]``, or None for a single group.
            largest_bits: uint32 (`Sampler.largest_bits`).
        """
        key = jax.random.wrap_key_data(key_data, impl=KEY_IMPL)
        bits = jax.random.bits(key, (self.num_units,), jnp.uint32)
        chosen = bits <= largest_bits
        if groups is not None:
            chosen &= groups == step % self.bands
        size = self.truncated_batch_size
        if size is None or size >= self.num_units:
            return chosen
        return jax.lax.cond(
            jnp.sum(chosen) > size, lambda: self._truncated(chosen, key, size), lambda: chosen
        )

    def _truncated(self, chosen: jax.Array, key: jax.Array, size: int) -> jax.Array:
        """``size`` of those chosen, each as likely as any other."""
        # Two words each, so that ties, which the order of the data would decide, do not occur.
        words = jax.random.bits(
            jax.random.fold_in(key, _TRUNCATION), (2, self.num_units), jnp.uint32
        )
        units = jnp.arange(self.num_units)
        *_, order = jax.lax.sort((~chosen, words[0], words[1], units), num_keys=3)
        return jnp.zeros(self.num_units, bool).at[order[:size]].set(True)


@functools.lru_cache(maxsize=64)
def make_resident_program(
    recipe: Recipe, draw: Draw, mesh: Mesh | None = None, *, packed: bool = False
) -> Any:
    """Compiles (once per shape) the program that takes some steps.

    Args:
        recipe: What a step is.
        draw: Who takes part.
        mesh: Devices with the axis `trainer.training.devices.AXIS`; None for a single one.
        packed: Whether it takes steps of several trials at once (`trainer.training.packed`):
            ``state``, ``steps`` and ``traced`` have a leading axis of trials then, and the rest
            is the same for all of them. On a single device, without ``groups``.

    Returns:
        ``program(state, frozen, data, groups, steps, count, traced, largest_bits) -> state``,
        jitted: it takes the first ``count`` of ``steps``, `StepInputs` with a leading axis. Over
        a mesh, ``data`` is dealt out as `trainer.training.devices.Topology.deal` does, and the
        rest is the same everywhere. ``state`` is donated.
    """

    def sums_of_batch(
        state: TrainState, frozen: Any, data: Data, chosen: jax.Array, view_key: jax.Array
    ) -> Sums:
        ranks = jnp.cumsum(chosen.astype(jnp.int32))
        count = ranks[-1]

        def add_row(row: jax.Array, sums: Sums) -> Sums:
            wanted = row * draw.capacity + jnp.arange(1, draw.capacity + 1, dtype=jnp.int32)
            # The unit of rank k is the first whose rank is k.
            units = jnp.searchsorted(ranks, wanted).astype(jnp.int32)
            of_row = recipe.sums_of_row(state, frozen, data, units, wanted > count, view_key)
            return jax.tree.map(jnp.add, sums, of_row)

        rows = -(-count // draw.capacity)
        return jax.lax.fori_loop(0, rows, add_row, recipe.no_sums(state))

    def over_devices(
        state: TrainState, frozen: Any, data: Data, chosen: jax.Array, view_key: jax.Array
    ) -> Sums:
        assert mesh is not None
        dealt, everywhere = PartitionSpec(AXIS), PartitionSpec()
        by_user = data.positions is not None
        units_here = (data.positions if by_user else data.labels).shape[0] // mesh.size
        specs = Data(
            images=everywhere if by_user else dealt,
            labels=everywhere if by_user else dealt,
            positions=dealt if by_user else None,
            first=everywhere,
        )

        def here(
            state: TrainState, frozen: Any, data: Data, chosen: jax.Array, view_key: jax.Array
        ) -> Sums:
            first = jax.lax.axis_index(AXIS).astype(jnp.int32) * units_here
            mine = data._replace(first=first)
            return jax.lax.psum(sums_of_batch(state, frozen, mine, chosen, view_key), AXIS)

        return jax.shard_map(
            here,
            mesh=mesh,
            in_specs=(everywhere, everywhere, specs, dealt, everywhere),
            out_specs=everywhere,
            check_vma=False,  # each device runs as many rows as it has drawn
        )(
            state,
            frozen,
            data,
            jnp.pad(chosen, (0, units_here * mesh.size - len(chosen))),
            view_key,
        )

    batch_sums = sums_of_batch if mesh is None else over_devices

    def program(
        state: TrainState,
        frozen: Any,
        data: Data,
        groups: jax.Array | None,
        steps: StepInputs,
        count: jax.Array,
        traced: Traced,
        largest_bits: jax.Array,
    ) -> TrainState:
        def take(i: jax.Array, state: TrainState) -> TrainState:
            inputs = StepInputs(*(leaf[i] for leaf in steps))
            chosen = draw.chosen(inputs.draw_key, inputs.step, groups, largest_bits)
            sums = batch_sums(state, frozen, data, chosen, inputs.view_key)
            return recipe.finish(state, sums, inputs, traced)

        return jax.lax.fori_loop(0, count, take, state)

    if packed:
        program = jax.vmap(program, in_axes=(0, None, None, None, 0, None, 0, None))
    return jax.jit(program, donate_argnums=0)
