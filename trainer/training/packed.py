"""Steps of several trials at once, on a device that one small trial would leave idle.

The program of `trainer.training.resident` is mapped over a leading axis of *lanes*, one for each
trial; the examples are the same for all of them. A trial keeps its own state, keys and numbers, so
it draws the very batches and the very noise that it would alone, bit for bit: these are functions
of its keys. What is computed from them differs from what it would be alone by rounding, for sums
over many lanes may be taken in another order. So a trial's lane is among the facts by which a
branch is gone on with (`trainer.training.program_identity`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from trainer.mechanism.keys import BranchKeys
from trainer.training.resident import make_resident_program
from trainer.training.runners import MAX_STEPS_PER_CALL, ResidentRunner, step_inputs
from trainer.training.step import Recipe, TrainState

T = TypeVar("T")


class Lane(NamedTuple):
    """A place in a packed program.

    Attributes:
        number: From 0.
        width: How many there are.
    """

    number: int
    width: int


class Share(NamedTuple):
    """What one trial brings to some steps.

    Attributes:
        lane: Its place.
        runner: Its numbers and its data.
        state: After ``start`` steps.
        keys: Of its branch.
        start: Steps that it has taken already.
    """

    lane: Lane
    runner: ResidentRunner
    state: TrainState
    keys: BranchKeys
    start: int


def take_steps(
    recipe: Recipe, shares: Sequence[Share], count: int, on_steps: Callable[[int], None]
) -> list[TrainState]:
    """Takes ``count`` steps of several trials.

    Args:
        recipe: What a step is, the same for all.
        shares: Of each trial, on one device, of one sampler, of the same examples and of the same
            frozen parameters; in lanes of their own of one width.
        count: How many, >= 1.
        on_steps: Called with the number of steps taken, now and then; they may be under way.

    Returns:
        The states afterwards, in the order of ``shares``.
    """
    lanes = in_lanes({share.lane: share for share in shares})
    runner = shares[0].runner
    program = make_resident_program(recipe, runner.draw, packed=True)
    state = stacked([share.state for share in lanes])
    traced = stacked([share.runner.traced for share in lanes])
    for begin in range(0, count, MAX_STEPS_PER_CALL):
        end = min(begin + MAX_STEPS_PER_CALL, count)
        inputs = {
            share.lane: step_inputs(
                share.runner.plan,
                share.keys,
                share.start + begin,
                share.start + end,
                MAX_STEPS_PER_CALL,
            )
            for share in shares
        }
        steps = jax.tree.map(lambda *leaves: np.stack(leaves), *(inputs[s.lane] for s in lanes))
        state = program(
            state,
            runner.frozen,
            runner.data,
            None,
            steps,
            np.int32(end - begin),
            traced,
            runner.largest_bits,
        )
        on_steps(end)
    states = _unstacked(state, len(lanes))
    return [states[share.lane.number] for share in shares]


def in_lanes(given: Mapping[Lane, T]) -> list[T]:
    """What each lane has, by number; idle ones have another's, and nobody looks at their results.

    All lanes are always computed, so what one gives does not depend on who else is there.
    """
    anybody = next(iter(given.values()))
    width = next(iter(given)).width
    return [given.get(Lane(number, width), anybody) for number in range(width)]


def stacked(trees: Sequence[Any]) -> Any:
    """Pytrees of one structure as one with a leading axis."""
    return _stacked(tuple(trees))


@jax.jit
def _stacked(trees: tuple[Any, ...]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def _unstacked(tree: Any, width: int) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return tuple(
        jax.tree.unflatten(structure, [leaf[lane] for leaf in leaves]) for lane in range(width)
    )
