from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.trainer.small_trial import (
    QUANTILE,
    assert_trees_close,
    distance,
    inputs_of,
    made_up_data,
    recipe_of,
    state_of,
    take,
    traced_of,
)
from trainer.config import OptimizerName
from trainer.config_sections import AugmentationConfig, AveragingConfig
from trainer.mechanism.keys import BranchKeys
from trainer.models import cross_entropy
from trainer.training.optimizers import make_optimizer


@pytest.fixture(scope="module")
def data():
    return made_up_data()


def plain(name):
    """optax's own optimizer where ours is one under another name, or knows of noise."""
    return "adam" if name in ("dp_adam_bc", "scale_then_privatize") else name


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_zero_noise_and_infinite_clip_is_the_plain_optimizer(data, optimizer):
    batches = [np.arange(0, 10), np.arange(10, 20), np.arange(20, 30)]
    rates, decay = [0.5, 1.0, 0.25], 0.01
    recipe = recipe_of(optimizer)
    settings = traced_of(noise_multiplier=0.0, learning_rate=0.1, weight_decay=decay)
    got = state_of(recipe, np.inf)
    want = state_of(recipe)
    opt_state = make_optimizer(plain(optimizer), 1.0).init(want.params)
    params = want.params
    network = recipe.objective.network
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        got = take(recipe, got, data, [batch], settings, inputs_of(step, rate))
        transform = make_optimizer(plain(optimizer), 0.1 * rate, decay)

        def loss(params, b=batch):
            logits = network.logits(params, {}, data.images[b])
            return jnp.mean(cross_entropy(logits, data.labels[b])[0])

        updates, opt_state = transform.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    # float32 sums in another order; Adam divides by small roots, hence the absolute part.
    assert_trees_close(got.params, params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("noise_multiplier", "clip"), [(1.0, 1.0), (3.0, 0.2), (0.5, 7.0)])
def test_noise_std_is_noise_multiplier_times_clip_norm(data, noise_multiplier, clip):
    # An empty batch leaves the noise alone: with learning rate = divisor the update is -noise.
    # 150 steps x 103 parameters = 15,450 draws: the sample std has a relative standard error of
    # 1/sqrt(2n) = 0.57 %; accepted within 2.9 % (5 standard errors).
    recipe = recipe_of()
    settings = traced_of(
        noise_multiplier=noise_multiplier, learning_rate=10.0, expected_batch_size=10.0
    )
    state = state_of(recipe, clip)
    step = jax.jit(lambda inputs: recipe.finish(state, recipe.no_sums(state), inputs, settings))
    draws = []
    for number in range(150):
        after = step(inputs_of(number))
        draws += [
            np.ravel(np.asarray(old) - np.asarray(new))
            for old, new in zip(
                jax.tree.leaves(state.params), jax.tree.leaves(after.params), strict=True
            )
        ]
    noise = np.concatenate(draws)
    assert noise.std() == pytest.approx(noise_multiplier * clip, rel=0.029)
    assert abs(noise.mean()) < 5 * noise_multiplier * clip / np.sqrt(noise.size)


def test_the_divisor_is_the_expected_batch_size_not_the_realised_one(data):
    recipe = recipe_of()
    settings = traced_of(noise_multiplier=0.0, learning_rate=1.0)
    start = state_of(recipe, np.inf)
    moved = take(recipe, start, data, [[3, -1, -1, -1]], settings).params

    def loss(params):
        logits = recipe.objective.network.logits(params, {}, data.images[3:4])
        return jnp.mean(cross_entropy(logits, data.labels[3:4])[0])

    want = jax.tree.map(lambda p, g: p - g / 10.0, start.params, jax.grad(loss)(start.params))
    assert_trees_close(moved, want, rtol=1e-5, atol=1e-6)


def test_a_batch_spread_over_rows_gives_the_step_of_one_row(data):
    recipe = recipe_of("momentum")
    whole = take(recipe, state_of(recipe), data, [range(11)], traced_of())
    rows = [range(4), range(4, 8), [8, 9, 10, -1]]
    spread = take(recipe, state_of(recipe), data, rows, traced_of())
    assert_trees_close(whole, spread, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_a_step_with_noise(data):
    recipe = recipe_of()
    start = state_of(recipe)
    after = take(recipe, start, data, [[-1] * 4], traced_of()).params
    assert all(
        np.all(np.isfinite(new)) and not np.array_equal(old, new)
        for old, new in zip(jax.tree.leaves(start.params), jax.tree.leaves(after), strict=True)
    )


VIEWS = AugmentationConfig(views=3, flip=True, crop_padding=1)


def neighbours(recipe, data, l2_clip_norm):
    """The sums of two batches of which one has an example more."""
    state = state_of(recipe, l2_clip_norm)
    row = jnp.arange(9, dtype=jnp.int32)
    key = inputs_of().view_key
    sums = jax.jit(
        lambda padding: recipe.sums_of_row(state, {}, data, row, padding, jnp.asarray(key))
    )
    return [sums(jnp.arange(9) >= size) for size in (8, 9)]


@pytest.mark.parametrize("views", [AugmentationConfig(), VIEWS], ids=["plain", "views"])
@pytest.mark.parametrize("strategy", [(), (0.8, 0.6)], ids=["independent", "banded"])
@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic", "quantile"])
def test_another_example_moves_a_step_by_at_most_the_clip_norm(data, views, strategy, mode):
    # Neighbouring batches under one key: the noise cancels, the difference is the sensitivity.
    recipe = recipe_of(views=views, mode=mode, noise_strategy=strategy)
    one, two = neighbours(recipe, data, 0.3)
    moved = distance(one.grads, two.grads)
    assert 0 < moved <= 0.3 * (1 + 1e-4)
    quantile = None
    if mode == "quantile":
        assert abs(float(one.shifted_count) - float(two.shifted_count)) == 0.5
        quantile = QUANTILE
    # Through the whole step: plain SGD with rate = divisor moves by the noisy sum.
    settings = traced_of(learning_rate=10.0, quantile=quantile)
    state = state_of(recipe, 0.3)
    ends = [recipe.finish(state, sums, inputs_of(), settings).params for sums in (one, two)]
    assert distance(*ends) == pytest.approx(moved, rel=1e-3)


def test_another_example_moves_the_scaled_sum_by_at_most_the_clip_norm(data):
    one, two = neighbours(recipe_of("scale_then_privatize"), data, 0.3)
    assert 0 < distance(one.grads, two.grads) <= 0.3 * (1 + 1e-4)


def test_views_are_averaged_before_clipping(data):
    recipe = recipe_of(views=VIEWS)
    state = state_of(recipe, np.inf)
    key = inputs_of().view_key
    one = jax.jit(
        lambda: recipe.sums_of_row(
            state, {}, data, jnp.array([5]), jnp.array([False]), jnp.asarray(key)
        )
    )()
    loss = lambda params: recipe.objective.loss(params, {}, data, jnp.int32(5), jnp.asarray(key))
    plain_gradient = jax.jit(jax.grad(loss))(state.params)
    assert_trees_close(one.grads, plain_gradient, rtol=1e-5, atol=1e-7)


def test_no_two_examples_or_steps_have_the_same_views(data):
    same = data._replace(images=jnp.tile(data.images[:1], (40, 1, 1, 1)), labels=data.labels * 0)
    recipe = recipe_of(views=VIEWS)
    params = state_of(recipe).params
    keys = [BranchKeys(bytes(32)).view_keys([step])[0] for step in (1, 2)]
    loss = jax.jit(lambda unit, key: recipe.objective.loss(params, {}, same, unit, key))
    losses = [float(loss(jnp.int32(unit), key)) for key in keys for unit in range(8)]
    assert len(set(losses)) > 12


def test_averages_follow_their_formulas(data):
    recipe = recipe_of()
    averaging = AveragingConfig(ema_decay=0.5, polyak=True)
    state = state_of(recipe, averaging=averaging)
    iterates, ema = [], state.params
    for step in range(1, 6):
        state = take(recipe, state, data, [range(5)], traced_of(ema_decay=0.5), inputs_of(step))
        iterates.append(state.params)
        decay = min(0.5, step / (9 + step))  # (1 + t) / (10 + t) with t = step - 1
        ema = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, ema, state.params)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *iterates)
    assert_trees_close(state.averages["ema"], ema, rtol=1e-5, atol=1e-6)
    assert_trees_close(state.averages["polyak"], mean, rtol=1e-5, atol=1e-6)


def test_noise_corrected_adam_subtracts_the_noise_it_was_told_of():
    # Pure noise: the corrected second moment is at its floor, a tenth of the noise's variance.
    rng = np.random.default_rng(0)
    optimizer = make_optimizer("dp_adam_bc", 1.0, noise_variance=4.0)
    grads = rng.normal(scale=2.0, size=(200, 2000)).astype(np.float32)
    params = jnp.zeros(2000)
    state, updates = optimizer.init(params), params
    update: Any = jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
    rates = np.array([[0.9], [0.999]])
    weights = (1 - rates) * rates ** np.arange(199, -1, -1) / (1 - rates**200)
    first, second = weights[0] @ grads, weights[1] @ grads**2
    want = -first / np.sqrt(np.maximum(second - 4.0, 0.4))
    np.testing.assert_allclose(updates, want, rtol=1e-3, atol=1e-5)


def test_a_users_gradient_is_the_mean_of_its_examples(data):
    positions = jnp.asarray([[0, 1, 2], [3, -1, -1], [4, 5, -1]], jnp.int32)
    owned = data._replace(positions=positions)
    recipe = recipe_of(examples_per_user=3)
    state = state_of(recipe, np.inf)
    key = inputs_of().view_key
    users = jnp.arange(3, dtype=jnp.int32)
    sums = jax.jit(
        lambda: recipe.sums_of_row(state, {}, owned, users, jnp.zeros(3, bool), jnp.asarray(key))
    )()

    def mean_loss(params, examples):
        logits = recipe.objective.network.logits(params, {}, data.images[examples])
        return jnp.mean(cross_entropy(logits, data.labels[examples])[0])

    grads = [
        jax.grad(mean_loss)(state.params, np.array(examples))
        for examples in ([0, 1, 2], [3], [4, 5])
    ]
    assert_trees_close(
        sums.grads, jax.tree.map(lambda *leaves: sum(leaves), *grads), rtol=1e-4, atol=1e-6
    )


def test_of_a_user_with_many_examples_some_are_drawn_each_as_likely():
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    data = made_up_data()._replace(positions=positions)
    recipe = recipe_of(examples_per_user=2)
    params = state_of(recipe).params
    per_example = [
        float(
            recipe_of().objective.loss(
                params, {}, made_up_data(), jnp.int32(i), jnp.zeros(2, "uint32")
            )
        )
        for i in range(6)
    ]
    loss = jax.jit(lambda key: recipe.objective.loss(params, {}, data, jnp.int32(0), key))
    keys = BranchKeys(bytes(32))
    seen = [float(loss(keys.view_keys([step])[0])) for step in range(600)]
    # 15 pairs, each a mean of two of six losses; its mean over draws is that of all six, within
    # 5 standard errors.
    assert len({round(value, 4) for value in seen}) == 15
    error = np.std(seen) / np.sqrt(len(seen))
    assert abs(np.mean(seen) - np.mean(per_example)) < 5 * error
