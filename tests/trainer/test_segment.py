import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.config import DataConfig, ModelConfig, OptimizerName, TrialConfig
from trainer.keys import BranchKeys
from trainer.models import cross_entropy, init_params, make_model
from trainer.optimizers import make_optimizer
from trainer.plan import make_plan
from trainer.sampling import PoissonSampler
from trainer.segment import Rows, Traced, TrainState, draw_rows, make_segment

NUM_EXAMPLES = 40
NUM_CLASSES = 3
SHAPE = (4, 4, 1)
ROOT = bytes(range(32))

CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="mlp", hidden_sizes=(5,)),
    optimizer="sgd",
    learning_rate=0.5,
    l2_clip_norm=1.0,
    noise_multiplier=1.0,
    sampling_prob=0.25,
    expected_batch_size=10.0,
    iterations=6,
    report_every_steps=3,
    target_delta=1e-5,
)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(NUM_EXAMPLES, *SHAPE)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, NUM_CLASSES, NUM_EXAMPLES), jnp.int32)


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG.model, NUM_CLASSES)


def fresh_state(model, optimizer: OptimizerName = "sgd", l2_clip_norm=1.0):
    params = init_params(model, SHAPE, seed=0)
    opt_state = make_optimizer(optimizer, 1.0).init(params)
    return TrainState(params, opt_state, jnp.float32(l2_clip_norm))


def traced(**changes):
    values = {
        "learning_rate": 0.5,
        "noise_multiplier": 1.0,
        "expected_batch_size": 10.0,
    }
    return Traced(**{**values, **changes})


def one_step(indices, capacity):
    """A single step over given indices, in as many rows as it takes."""
    from trainer.sampling import to_rows

    rows = to_rows(np.asarray(indices, np.int32), capacity)
    ends = np.arange(len(rows)) == len(rows) - 1
    key = BranchKeys(ROOT).noise_key(1)
    rates = np.ones(len(rows), np.float32)
    return Rows(rows, ends, np.tile(key, (len(rows), 1)), rates)


def assert_trees_close(ours, theirs, **tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize(
    "optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw", "lamb", "lars"]
)
def test_zero_noise_and_infinite_clip_is_the_plain_optimizer(model, data, optimizer):
    images, labels = data
    batches = [np.arange(0, 10), np.arange(10, 20), np.arange(20, 30)]
    rates, decay = np.array([0.5, 1.0, 0.25], np.float32), 0.01
    indices, keys = np.stack(batches).astype(np.int32), np.zeros((3, 2), np.uint32)
    rows = Rows(indices, np.ones(3, bool), keys, rates)
    settings = traced(noise_multiplier=0.0, learning_rate=0.1, weight_decay=decay)
    got = make_segment(model, optimizer)(
        fresh_state(model, optimizer, np.inf), images, labels, rows, settings
    )

    state = fresh_state(model, optimizer)
    for batch, rate in zip(batches, rates, strict=True):
        transform = make_optimizer(optimizer, 0.1 * rate, decay)
        grads = jax.grad(
            lambda params, b=batch: jnp.mean(cross_entropy(model, params, images[b], labels[b])[0])
        )(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        state = state._replace(
            params=optax.apply_updates(state.params, updates), opt_state=opt_state
        )
    # float32 sums in another order; Adam divides by small roots, hence the absolute part.
    assert_trees_close(got.params, state.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("noise_multiplier", "clip"), [(1.0, 1.0), (3.0, 0.2), (0.5, 7.0)])
def test_noise_std_is_noise_multiplier_times_clip_norm(data, noise_multiplier, clip):
    # An empty batch leaves the noise alone: with learning rate = divisor the update is -noise.
    # 150 steps x 103 parameters = 15,450 draws: the sample std has a relative standard error of
    # 1/sqrt(2n) = 0.57 %; accepted within 2.9 % (5 standard errors).
    model = make_model(CONFIG.model, NUM_CLASSES)
    images, labels = data
    segment = make_segment(model, "sgd")
    keys = BranchKeys(ROOT)
    steps = 150
    settings = traced(
        noise_multiplier=noise_multiplier,
        learning_rate=10.0,
        expected_batch_size=10.0,
    )
    draws = []
    before = jax.device_get(fresh_state(model, l2_clip_norm=clip))
    for step in range(steps):
        indices, ends = np.full((1, 4), -1, np.int32), np.ones(1, bool)
        rows = Rows(indices, ends, keys.noise_key(step)[None], np.ones(1, np.float32))
        start = jax.device_put(before)
        after = jax.device_get(segment(start, images, labels, rows, settings))
        draws += [
            (old - new).ravel()
            for old, new in zip(
                jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True
            )
        ]
    noise = np.concatenate(draws)
    assert noise.std() == pytest.approx(noise_multiplier * clip, rel=0.029)
    assert abs(noise.mean()) < 5 * noise_multiplier * clip / np.sqrt(noise.size)


def test_the_divisor_is_the_expected_batch_size_not_the_realised_one(model, data):
    images, labels = data
    settings = traced(noise_multiplier=0.0, learning_rate=1.0)
    segment = make_segment(model, "sgd")
    start = jax.device_get(fresh_state(model).params)
    unclipped = fresh_state(model, l2_clip_norm=np.inf)
    moved = segment(unclipped, images, labels, one_step([3], 4), settings).params
    example = slice(3, 4)
    grads = jax.grad(
        lambda params: jnp.mean(cross_entropy(model, params, images[example], labels[example])[0])
    )(start)
    want = jax.tree.map(lambda p, g: p - g / 10.0, start, grads)
    assert_trees_close(moved, want, rtol=1e-5, atol=1e-6)


def test_a_batch_spread_over_rows_gives_the_step_of_one_row(model, data):
    images, labels = data
    segment = make_segment(model, "momentum")
    indices = list(range(11))
    whole = segment(
        fresh_state(model, "momentum"), images, labels, one_step(indices, 11), traced()
    )
    spread = segment(
        fresh_state(model, "momentum"), images, labels, one_step(indices, 4), traced()
    )
    assert_trees_close(whole, spread, rtol=1e-5, atol=1e-6)


def test_rows_that_end_no_step_change_nothing(model, data):
    images, labels = data
    indices, keys = np.full((2, 4), -1, np.int32), np.zeros((2, 2), np.uint32)
    rows = Rows(indices, np.zeros(2, bool), keys, np.ones(2, np.float32))
    start = jax.device_get(fresh_state(model))
    after = make_segment(model, "sgd")(fresh_state(model), images, labels, rows, traced())
    assert_trees_close(start, after, rtol=0, atol=0)


def test_an_empty_batch_is_a_step_with_noise(model, data):
    images, labels = data
    start = jax.device_get(fresh_state(model).params)
    after = make_segment(model, "sgd")(
        fresh_state(model), images, labels, one_step([], 4), traced()
    ).params
    assert all(
        np.all(np.isfinite(new)) and not np.array_equal(old, new)
        for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(after), strict=True)
    )


def test_another_example_moves_the_sum_by_at_most_the_clip_norm(model, data):
    # Neighbouring batches under one key: the noise cancels, the difference is the sensitivity.
    images, labels = data
    settings = traced(learning_rate=10.0)
    segment = make_segment(model, "sgd")
    one, two = (
        segment(
            fresh_state(model, l2_clip_norm=0.3), images, labels, one_step(batch, 9), settings
        ).params
        for batch in (range(8), range(9))
    )
    difference = np.sqrt(
        sum(
            np.sum((np.asarray(a) - np.asarray(b)) ** 2)
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
        )
    )
    assert 0 < difference <= 0.3 * (1 + 1e-4)


def test_trials_of_one_shape_share_one_program(data):
    images, labels = data
    segment = make_segment(make_model(CONFIG.model, NUM_CLASSES), "adamw")
    compiled_before = segment._cache_size()
    for learning_rate, clip, noise in [(0.1, 1.0, 1.0), (0.3, 0.5, 2.0), (7.0, 9.0, 0.1)]:
        state = fresh_state(make_model(CONFIG.model, NUM_CLASSES), "adamw", clip)
        settings = traced(learning_rate=learning_rate, noise_multiplier=noise)
        segment(state, images, labels, one_step(range(5), 13), settings)
    assert segment._cache_size() == compiled_before + 1


def test_the_events_numbers_are_the_samplers():
    plan = make_plan(CONFIG, NUM_EXAMPLES)
    event: Any = plan.mechanism.dp_event()
    assert event.count == CONFIG.iterations
    assert event.event.sampling_probability == plan.sampler.sampling_prob == CONFIG.sampling_prob
    assert event.event.event.noise_multiplier == CONFIG.noise_multiplier
    assert plan.sampler.num_examples == NUM_EXAMPLES
    assert plan.expected_batch_size == CONFIG.expected_batch_size
    assert plan.l2_clip_norm == CONFIG.l2_clip_norm


def test_drawn_rows_hold_every_step_and_pad_to_whole_calls():
    plan = make_plan(CONFIG, NUM_EXAMPLES)
    rows = draw_rows(plan, BranchKeys(ROOT), 2, 6, multiple=3)
    assert len(rows.ends_step) % 3 == 0
    assert rows.ends_step.sum() == 4
    assert rows.indices.shape == (len(rows.ends_step), plan.sampler.capacity)
    parts = list(rows.split(3))
    assert np.array_equal(np.concatenate([part.indices for part in parts]), rows.indices)


def test_a_batch_beyond_the_capacity_loses_nobody(monkeypatch):
    monkeypatch.setattr(PoissonSampler, "capacity", 3)
    plan = make_plan(dataclasses.replace(CONFIG, sampling_prob=1.0), NUM_EXAMPLES)
    rows = draw_rows(plan, BranchKeys(ROOT), 0, 1, multiple=5)
    assert sorted(rows.indices[rows.indices >= 0].tolist()) == list(range(NUM_EXAMPLES))
    assert rows.ends_step.sum() == 1


def test_every_step_has_the_learning_rate_of_its_place_in_the_trial():
    config = dataclasses.replace(CONFIG, learning_rate_schedule="linear", warmup_steps=2)
    plan = make_plan(config, NUM_EXAMPLES)
    whole = draw_rows(plan, BranchKeys(ROOT), 0, 6, multiple=1)
    parts = [draw_rows(plan, BranchKeys(ROOT), *span, multiple=5) for span in ((0, 2), (2, 6))]
    want = [0.5, 1, 1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(whole.learning_rate_factors[whole.ends_step], want)
    halves = [part.learning_rate_factors[part.ends_step] for part in parts]
    np.testing.assert_allclose(np.concatenate(halves), want)
