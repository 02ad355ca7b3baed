"""Our optimizers are optax's own, whatever the weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer.training.optimizers import make_optimizer

PARAMS = {"kernel": jnp.array([[0.5, -1.0], [2.0, 0.3]]), "bias": jnp.array([0.1, -0.2])}
RATE, DECAY = 0.1, 0.01

THEIRS = {
    "sgd": optax.sgd(RATE),
    "momentum": optax.sgd(RATE, momentum=0.9),
    "nesterov": optax.sgd(RATE, momentum=0.9, nesterov=True),
    "adam": optax.adam(RATE),
    "adamw": optax.adamw(RATE, weight_decay=0.0),
    "lamb": optax.lamb(RATE),
    "lars": optax.lars(RATE, momentum=0.9),
}
THEIRS_WITH_DECAY = {
    "adamw": optax.adamw(RATE, weight_decay=DECAY),
    "lamb": optax.lamb(RATE, weight_decay=DECAY),
    "lars": optax.lars(RATE, weight_decay=DECAY, momentum=0.9),
}


def gradient(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def after(optimizer, steps=4):
    params, state = PARAMS, optimizer.init(PARAMS)
    for step in range(steps):
        updates, state = optimizer.update(gradient(step), state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


@pytest.mark.parametrize("name", THEIRS)
def test_without_decay(name):
    assert_same(after(make_optimizer(name, RATE)), after(THEIRS[name]))


@pytest.mark.parametrize("name", THEIRS_WITH_DECAY)
def test_with_optax_own_decay(name):
    assert_same(after(make_optimizer(name, RATE, DECAY)), after(THEIRS_WITH_DECAY[name]))


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam"])
def test_decay_is_decoupled_from_the_gradient(name):
    optimizer = make_optimizer(name, RATE, DECAY)
    without, state = make_optimizer(name, RATE), None
    params, state, other = PARAMS, optimizer.init(PARAMS), without.init(PARAMS)
    for step in range(4):
        grads = gradient(step)
        updates, state = optimizer.update(grads, state, params)
        expected, other = without.update(grads, other, params)
        expected = jax.tree.map(lambda u, p: u - RATE * DECAY * p, expected, params)
        assert_same(updates, expected)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", THEIRS)
def test_rate_and_decay_may_be_traced_and_the_state_does_not_depend_on_them(name):
    def step(rate, decay, params):
        optimizer = make_optimizer(name, rate, decay)
        return optimizer.update(gradient(0), optimizer.init(params), params)[0]

    whole = jax.jit(step)(RATE, DECAY, PARAMS)
    assert_same(whole, step(RATE, DECAY, PARAMS))
    shapes = [
        jax.tree.structure(make_optimizer(name, rate, decay).init(PARAMS))
        for rate, decay in [(RATE, 0.0), (1.0, DECAY)]
    ]
    assert shapes[0] == shapes[1]
