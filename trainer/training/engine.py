"""Which clipping engine a trial uses, settled before anything is compiled.

Inside a program the choice could differ from one process to the next, and with it the rounding.
Settled here, it is a fact about a trial: it is kept in checkpoints, and a process that goes on
with the trial's noise takes it over.

To settle it the loss is traced, which takes longer than a short trial's first steps. So a process
keeps what it found for each recipe and its shapes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping import Choice, settle
from trainer.training.objective import Data
from trainer.training.optimizers import pre_clipping_scale
from trainer.training.step import Recipe, TrainState


def settled(recipe: Recipe, state: TrainState, frozen: Any, data: Data, capacity: int) -> Recipe:
    """A recipe whose engine is no longer ``auto``.

    Args:
        recipe: Its engine may be ``auto``.
        state: For its shapes.
        frozen: Parameters that are not trained.
        data: For its shapes.
        capacity: Units in a row.
    """
    if recipe.engine != "auto":
        return recipe
    if pre_clipping_scale(recipe.optimizer, state.opt_state) is not None:
        # Gradients are needed themselves, in order to be scaled.
        return dataclasses.replace(recipe, engine="vmap")
    leaves, tree = jax.tree.flatten((state.params, frozen, data._replace(first=None)))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
    place = _known(recipe, tree, shapes, capacity)
    if not place or not place[0].fits:
        params, frozen, data = jax.tree.unflatten(tree, shapes)
        place[:] = [_choice(recipe, params, frozen, data, capacity)]
    choice = place[0]
    return dataclasses.replace(
        recipe, engine=choice.engine, microbatch_size=choice.microbatch_size
    )


@functools.lru_cache(maxsize=64)
def _known(
    recipe: Recipe, tree: Any, shapes: tuple[jax.ShapeDtypeStruct, ...], capacity: int
) -> list[Choice]:
    """A place for the choice of a recipe and shapes."""
    return []


def _choice(recipe: Recipe, params: Any, frozen: Any, data: Data, capacity: int) -> Choice:
    return settle(
        recipe.objective.loss,
        _small(params),
        _small(frozen),
        _one_of_each(data),
        jnp.zeros(capacity, jnp.int32),
        jnp.zeros(2, jnp.uint32),
        batch_argnums=3,
        keep_batch_dim=False,
        mode=recipe.clipping_mode,
        microbatch_size=recipe.microbatch_size,
    )


def _small(tree: Any) -> Any:
    """The same shapes, on one device."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


def _one_of_each(data: Data) -> Data:
    """A data set of one example that costs as much to train on as any other."""
    one = lambda array: jnp.zeros((1, *array.shape[1:]), array.dtype)
    positions = None if data.positions is None else one(data.positions)
    return Data(one(data.images), one(data.labels), positions, jnp.int32(0))
