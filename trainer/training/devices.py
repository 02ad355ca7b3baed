"""The devices of a trial: one, several of one machine, or several machines'.

Training is data parallel. Parameters, keys and noise are the same on all devices; units are dealt
out. All that a trial computes twice it computes alike, since its random numbers depend on keys
and positions and not on where they are drawn. Of several processes (`jax.distributed`) the first
speaks for all: it draws the root of the keys, charges, writes and reports.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.errors import ConfigError, TrainerError
from trainer.mechanism.keys import BranchKeys

AXIS = "data"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where a trial runs; compared by value.

    Attributes:
        mesh: The devices along `AXIS`; None for a single one.
    """

    mesh: Mesh | None = None

    @property
    def size(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def is_one_process(self) -> bool:
        """Whether there is no process but this."""
        return jax.process_count() == 1

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return jax.process_index() == 0

    def everywhere(self, tree: Any) -> Any:
        """Puts arrays on every device, whole."""
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.tree.map(lambda leaf: self._placed(leaf, PartitionSpec()), tree)

    def deal(self, array: np.ndarray) -> jax.Array:
        """Deals an array's leading axis out, padded with zeros to a multiple of the devices."""
        if self.mesh is None:
            return jax.device_put(array)
        missing = -len(array) % self.size
        if missing:
            array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
        return self._placed(array, PartitionSpec(AXIS))

    def deal_own(self, array: np.ndarray) -> jax.Array:
        """Deals out what this process has of an array; its devices share its leading axis."""
        if self.mesh is None:
            return jax.device_put(array)
        sharding = NamedSharding(self.mesh, PartitionSpec(AXIS))
        return jax.make_array_from_process_local_data(sharding, array)

    def _placed(self, leaf: Any, spec: PartitionSpec) -> jax.Array:
        assert self.mesh is not None
        sharding = NamedSharding(self.mesh, spec)
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    def here(self, tree: Any) -> Any:
        """Arrays that are the same everywhere, on one device of this process."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)

    def new_keys(self) -> BranchKeys:
        """The keys of a new branch, of which all processes learn."""
        return self.agreed_keys(BranchKeys() if self.leads else None)

    def agreed_keys(self, keys: BranchKeys | None) -> BranchKeys:
        """The first process's keys, for all."""
        if jax.process_count() == 1:
            assert keys is not None
            return keys
        from jax.experimental import multihost_utils

        return BranchKeys.agreed(keys, multihost_utils.broadcast_one_to_all)

    def agreed(self, act: Callable[[], int]) -> int:
        """What the first process gets by acting, for all.

        Raises:
            TrainerError: In all other processes, where it failed in the first.
        """
        if jax.process_count() == 1:
            return act()
        from jax.experimental import multihost_utils

        failure: BaseException | None = None
        value = -1
        if self.leads:
            try:
                value = act()
            except BaseException as error:  # it is raised again, after the others know
                failure = error
        value = int(multihost_utils.broadcast_one_to_all(np.int32(value)))
        if failure is not None:
            raise failure
        if value < 0:
            raise TrainerError("the first of the processes could not go on; it says why")
        return value


def topology(num_devices: int | None = None) -> Topology:
    """The devices to train on.

    Args:
        num_devices: How many, the first ones; None for all. Of several processes, all.

    Raises:
        ConfigError: There are not so many.
    """
    devices = jax.devices()
    wanted = len(devices) if num_devices is None else num_devices
    if not 1 <= wanted <= len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise ConfigError(
            f"devices={num_devices!r}: allowed is a whole number from 1 to {len(devices)}, and "
            "with several processes all"
        )
    if wanted == 1:
        return Topology()
    return Topology(Mesh(np.asarray(devices[:wanted]), (AXIS,)))
