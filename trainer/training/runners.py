"""How a trial takes its steps: on resident or on streamed examples.

A runner owns the examples on the devices and the compiled programs, and derives each step's keys.
Both kinds take the same steps by the same recipe; they differ in who draws the batch.
"""

import collections
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from trainer.data.datasets import Dataset, OpenDataset
from trainer.data.reading import Examples
from trainer.data.streaming import stream
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.sampling import PADDING, to_rows
from trainer.training.devices import Topology
from trainer.training.objective import Data
from trainer.training.plan import TrainingPlan
from trainer.training.resident import Draw, make_resident_program
from trainer.training.step import Recipe, StepInputs, Traced, TrainState
from trainer.training.streamed import make_streamed_programs, user_examples

OnStep = Callable[[int], None]
"""Called with the number of steps taken, now and then; the steps may still be under way."""

# Longer calls save dispatches and let a person wait for news; past this there is no gain.
MAX_STEPS_PER_CALL = 100

# Examples in a row that is streamed: much work for a device, little memory.
_STREAMED_ROW = 4096


class Runner(Protocol):
    """Takes steps."""

    data: Data
    """Examples on the devices; for streamed ones, a row's form."""

    capacity: int
    """Units in a row of one device."""

    frozen: Any
    """Parameters that are not trained, on the devices."""

    traced: Any
    """The trial's numbers, on the devices."""

    def advance(
        self,
        recipe: Recipe,
        state: TrainState,
        keys: BranchKeys,
        start: int,
        stop: int,
        on_step: OnStep,
    ) -> TrainState:
        """Takes steps ``start + 1 .. stop``.

        Args:
            recipe: What a step is.
            state: After ``start`` steps; donated.
            keys: Of the branch.
            start: Steps already taken.
            stop: Steps taken afterwards.
            on_step: See `OnStep`.
        """
        ...

    def close(self) -> None:
        """Ends what runs in the background."""
        ...


def step_inputs(
    plan: TrainingPlan, keys: BranchKeys, start: int, stop: int, length: int
) -> StepInputs:
    """What differs between steps ``start + 1 .. stop``, padded with zeros to ``length`` steps."""
    steps = range(start + 1, stop + 1)

    def padded(rows: np.ndarray, dtype: Any) -> np.ndarray:
        array = np.zeros((length, *rows.shape[1:]), dtype)
        array[: len(rows)] = rows
        return array

    return StepInputs(
        step=padded(np.arange(start + 1, stop + 1), np.int32),
        noise_key=padded(keys.noise_keys(steps), np.uint32),
        draw_key=padded(keys.draw_keys(steps), np.uint32),
        view_key=padded(keys.view_keys(steps), np.uint32),
        learning_rate_factor=padded(plan.learning_rate_factors[start:stop], np.float32),
    )


class ResidentRunner:
    """Takes steps on examples that live on the devices.

    Args:
        plan: The trial's.
        traced: Its numbers.
        data: All training examples, on the devices.
        frozen: Parameters that are not trained, on the devices.
        topology: The devices.
    """

    def __init__(
        self, plan: TrainingPlan, traced: Traced, data: Data, frozen: Any, topology: Topology
    ) -> None:
        self.plan, self.traced, self.data = plan, topology.everywhere(traced), data
        self.frozen, self.topology = frozen, topology
        sampler = plan.sampler
        self.capacity = sampler.capacity
        if topology.size > 1 and sampler.truncated_batch_size is None:
            self.capacity = sampler.capacity_of(-(-sampler.num_units // topology.size))
        self.draw = Draw(
            num_units=sampler.num_units,
            capacity=self.capacity,
            bands=sampler.bands,
            truncated_batch_size=sampler.truncated_batch_size,
        )
        self.largest_bits = topology.everywhere(np.uint32(sampler.largest_bits))
        self._groups: tuple[BranchKeys, Any] | None = None

    def advance(
        self,
        recipe: Recipe,
        state: TrainState,
        keys: BranchKeys,
        start: int,
        stop: int,
        on_step: OnStep,
    ) -> TrainState:
        """As in `Runner`."""
        program = make_resident_program(recipe, self.draw, self.topology.mesh)
        groups = self._groups_of(keys)
        for begin in range(start, stop, MAX_STEPS_PER_CALL):
            end = min(begin + MAX_STEPS_PER_CALL, stop)
            steps = step_inputs(self.plan, keys, begin, end, MAX_STEPS_PER_CALL)
            state = program(
                state,
                self.frozen,
                self.data,
                groups,
                self.topology.everywhere(steps),
                self.topology.everywhere(np.int32(end - begin)),
                self.traced,
                self.largest_bits,
            )
            on_step(end)
        return state

    def close(self) -> None:
        """Nothing runs in the background."""

    def _groups_of(self, keys: BranchKeys) -> Any:
        if self.plan.sampler.bands == 1:
            return None
        if self._groups is None or self._groups[0] is not keys:
            groups = self.plan.sampler.groups(keys.groups_rng())
            self._groups = (keys, self.topology.everywhere(groups))
        return self._groups[1]


class _Row(NamedTuple):
    """A row that was drawn and is being read."""

    step: int
    first: int
    ends_step: bool
    units: np.ndarray
    examples: np.ndarray


class StreamedRunner:
    """Takes steps on examples that are read as they are drawn.

    Args:
        plan: The trial's.
        traced: Its numbers.
        dataset: What is read.
        frozen: Parameters that are not trained, on the devices.
        topology: The devices.
        examples_per_user: Examples of a user in a step, where users are protected.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        traced: Traced,
        dataset: OpenDataset,
        frozen: Any,
        topology: Topology,
        examples_per_user: int | None,
    ) -> None:
        self.plan, self.traced = plan, topology.everywhere(traced)
        self.dataset, self.frozen, self.topology = dataset, frozen, topology
        self.per_unit = examples_per_user or 1
        self.by_user = examples_per_user is not None
        most = max(1, _STREAMED_ROW // self.per_unit)
        rows = -(-plan.sampler.capacity // most)
        self.capacity = -(-plan.sampler.capacity // (rows * topology.size))
        size = self.capacity * self.per_unit
        shape = (size, *dataset.info.image_shape)
        self.data = Data(
            images=jax.ShapeDtypeStruct(shape, jnp.float32),
            labels=jax.ShapeDtypeStruct((size,), jnp.int32),
            positions=np.zeros((self.capacity, self.per_unit), np.int32) if self.by_user else None,
        )
        self._drawn: collections.deque[_Row] = collections.deque()
        self._stream: Generator[Examples] | None = None
        self._next: tuple[BranchKeys, int] | None = None

    def advance(
        self,
        recipe: Recipe,
        state: TrainState,
        keys: BranchKeys,
        start: int,
        stop: int,
        on_step: OnStep,
    ) -> TrainState:
        """As in `Runner`. What is read ahead stays for the next call."""
        begin_sums, add_row, finish = make_streamed_programs(recipe, self.topology.mesh)
        ahead = self._stream
        if ahead is None or self._next != (keys, start):
            self.close()
            ahead = self._stream = stream(self.dataset.train, self._positions(keys, start))
        self._next = None  # unless this comes to its end
        for step in range(start + 1, stop + 1):
            one = step_inputs(self.plan, keys, step - 1, step, 1)
            inputs = self.topology.everywhere(StepInputs(*(leaf[0] for leaf in one)))
            sums = begin_sums(state)
            while True:
                before = sums
                examples = next(ahead)
                row = self._drawn.popleft()
                data, is_padding = self._on_devices(row, examples)
                sums = add_row(before, state, self.frozen, data, is_padding, inputs.view_key)
                # One row may wait for another, not for more: each holds its examples.
                jax.block_until_ready(before)
                if row.ends_step:
                    break
            state = finish(state, sums, inputs, self.traced)
            on_step(step)
        self._next = (keys, stop)
        return state

    def close(self) -> None:
        """Ends reading ahead."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None
        self._drawn.clear()

    def _positions(self, keys: BranchKeys, start: int) -> Iterator[np.ndarray]:
        """Draws rows of positions from step ``start + 1`` to the last."""
        sampler = self.plan.sampler
        groups = sampler.groups(keys.groups_rng()) if sampler.bands > 1 else None
        here = self._slots_here()
        for step in range(start + 1, len(self.plan.learning_rate_factors) + 1):
            rng = keys.sampling_rng(step)
            rows = to_rows(sampler.indices(rng, step, groups), self.capacity * self.topology.size)
            for number, units in enumerate(rows):
                examples = units
                if self.by_user:
                    positions = self.dataset.user_positions
                    assert positions is not None
                    examples = user_examples(positions, units, self.per_unit, rng)
                first = number * len(units)
                row = _Row(step, first, number == len(rows) - 1, units[here], examples[here])
                self._drawn.append(row)
                yield row.examples.reshape(-1)

    def _slots_here(self) -> slice:
        """Which slots of a row are of this process's devices."""
        devices = self.topology.size // jax.process_count()
        first = jax.process_index() * devices * self.capacity
        return slice(first, first + devices * self.capacity)

    def _on_devices(self, row: _Row, examples: Examples) -> tuple[Data, jax.Array]:
        deal = self.topology.deal_own
        positions = None
        if self.by_user:
            # By place in the row, of each device by itself.
            slots = np.arange(self.capacity * self.per_unit, dtype=np.int32)
            places = np.resize(slots, row.examples.size).reshape(row.examples.shape)
            positions = deal(np.where(row.examples >= 0, places, PADDING).astype(np.int32))
        data = Data(
            images=deal(examples.images),
            labels=deal(examples.labels),
            positions=positions,
            first=self.topology.everywhere(np.int32(row.first)),
        )
        return data, deal(row.units == PADDING)


def resident_data(dataset: Dataset, topology: Topology) -> Data:
    """A data set's training examples, on the devices.

    Over several devices examples are dealt out. Where users are the units, those are dealt out
    and every device has all examples.
    """
    if dataset.user_positions is None:
        train = dataset.train
        return Data(topology.deal(train.images), topology.deal(train.labels))
    return Data(
        images=topology.everywhere(dataset.train.images),
        labels=topology.everywhere(dataset.train.labels),
        positions=topology.deal(dataset.user_positions),
    )
