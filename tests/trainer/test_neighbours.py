"""Replay on neighbouring data: the same keys, one example blanked, through the whole step.

Under zero_out nothing but that example's gradient may change: who is drawn, the noise, the divisor
stay. So the parameters after a step differ by at most the learning rate times the clip norm over
the divisor, and not at all where the example was not drawn.
"""

import dataclasses
import types

import jax
import numpy as np
import pytest

from tests.trainer.small_trial import (
    CONFIG,
    NUM_EXAMPLES,
    SHAPE,
    distance,
    made_up_data,
    recipe_of,
    state_of,
    traced_of,
)
from trainer.config_sections import AugmentationConfig, MechanismConfig
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.sampling import PADDING
from trainer.training.devices import topology
from trainer.training.objective import Data
from trainer.training.plan import make_plan
from trainer.training.runners import ResidentRunner, StreamedRunner

BLANKED = 7
STEPS = 40
CLIP, RATE, DIVISOR = 0.3, 5.0, 10.0
VIEWS = AugmentationConfig(views=3, flip=True, crop_padding=1)
MECHANISMS = {
    "poisson": {},
    "truncated": {
        "mechanism": MechanismConfig(truncated_batch_size=22, num_units=NUM_EXAMPLES),
    },
    "full batch": {"sampling_prob": 1.0, "expected_batch_size": float(NUM_EXAMPLES)},
    "banded": {"mechanism": MechanismConfig(bands=4), "sampling_prob": 0.5},
}


def neighbour(data: Data) -> Data:
    """The same with one example blanked: its gradient is not a number, so it adds zero."""
    images = np.array(data.images)
    images[BLANKED] = np.nan
    return data._replace(images=jax.device_put(images))


class Held:
    """Examples in memory, read by position."""

    image_shape = SHAPE

    def __init__(self, data):
        self.data = jax.tree.map(np.asarray, data)

    def read_into(self, positions, images, labels):
        images[:] = self.data.images[positions]
        labels[:] = self.data.labels[positions]


def resident(plan, data):
    return ResidentRunner(plan, traced(), data, {}, topology(1))


def streamed(plan, data):
    info = types.SimpleNamespace(image_shape=SHAPE)
    dataset = types.SimpleNamespace(train=Held(data), info=info, user_positions=None)
    return StreamedRunner(plan, traced(), dataset, {}, topology(1), None)  # type: ignore[arg-type]


def traced():
    return traced_of(learning_rate=RATE, expected_batch_size=DIVISOR)


def iterates(runner, recipe, keys):
    """The parameters after each of several steps, and what each step began with."""
    state, seen = state_of(recipe, CLIP), []
    for step in range(STEPS):
        state = runner.advance(recipe, state, keys, step, step + 1, lambda step: None)
        seen.append(jax.device_get(state))
        # Every step begins anew, so that steps do not add up, but for what noise remembers.
        state = state_of(recipe, CLIP)._replace(noise=state.noise)
    runner.close()
    return seen


@pytest.mark.parametrize("views", [AugmentationConfig(), VIEWS], ids=["plain", "views"])
@pytest.mark.parametrize("place", [resident, streamed])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_blanking_an_example_moves_a_step_by_at_most_its_share(mechanism, place, views):
    config = dataclasses.replace(CONFIG, iterations=STEPS, **MECHANISMS[mechanism])
    plan = make_plan(config, NUM_EXAMPLES)
    keys = BranchKeys(bytes(range(32)))
    recipe = recipe_of(views=views, noise_strategy=plan.noise_strategy)
    data = made_up_data()
    ones = iterates(place(plan, data), recipe, keys)
    others = iterates(place(plan, neighbour(data)), recipe, keys)
    moved = [distance(a.params, b.params) for a, b in zip(ones, others, strict=True)]
    assert max(moved) <= RATE * CLIP / DIVISOR * (1 + 1e-4)
    joined = drawn(plan, keys, place)
    for step in range(STEPS):
        assert (moved[step] > 1e-6) == joined[step], step
    assert any(joined)
    assert all(joined) == (mechanism == "full batch")
    # What correlated noise remembers is no function of the data.
    assert distance(ones[-1].noise, others[-1].noise) == 0


def drawn(plan, keys, place):
    """In which steps the blanked example was drawn."""
    sampler = plan.sampler
    groups = sampler.groups(keys.groups_rng()) if sampler.bands > 1 else None
    if place is streamed:
        batches = [
            sampler.indices(keys.sampling_rng(step), step, groups) for step in range(1, STEPS + 1)
        ]
        return [BLANKED in batch[batch != PADDING] for batch in batches]
    draw = resident(plan, made_up_data()).draw
    most = jax.numpy.uint32(sampler.largest_bits)
    chosen = jax.jit(lambda key, step: draw.chosen(key, step, groups, most)[BLANKED])
    return [bool(chosen(keys.draw_keys([step])[0], step)) for step in range(1, STEPS + 1)]
