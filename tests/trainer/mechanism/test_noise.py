import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.noise import add_noise, replay, start_noise
from trainer.mechanism.noise_strategy import toeplitz_strategy

ROOT = bytes(range(32))


def noise_like(tree, stddev, step=1, root=ROOT):
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return add_noise(zeros, (), key_data=BranchKeys(root).noise_keys([step])[0], stddev=stddev)[0]


def draws(stddev, size=200_000, step=1, root=ROOT):
    return noise_like({"a": jnp.zeros(size), "b": jnp.zeros((size, 1))}, stddev, step, root)


@pytest.mark.parametrize("stddev", [0.5, 2.0, 37.0])
def test_noise_is_gaussian_with_the_given_std(stddev):
    # Kolmogorov-Smirnov on 200,000 draws of a fixed key, significance 1e-4; it rejects a std
    # that is 2 % off, so a wrong factor cannot hide.
    noise = np.asarray(draws(stddev)["a"])
    assert scipy.stats.kstest(noise / stddev, "norm").pvalue > 1e-4
    for factor in (0.98, 1.02):
        assert scipy.stats.kstest(noise / (stddev * factor), "norm").pvalue < 1e-4


def test_leaves_steps_and_trials_have_noise_of_their_own():
    first, second, other = draws(1.0), draws(1.0, step=2), draws(1.0, root=bytes(32))
    a = np.asarray(first["a"])
    # Correlation of 200,000 independent pairs: std 1/sqrt(n) = 0.0022; 5 of them.
    for b in (np.asarray(first["b"])[:, 0], np.asarray(second["a"]), np.asarray(other["a"])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.0112


def test_coordinates_and_steps_are_independent():
    # 4,000 steps of 30 coordinates: all 435 correlations of two coordinates, those of a
    # coordinate with another's next step, and those of squares, within 5.5 standard errors: by
    # chance once in 10,000 roots (2,235 of them at 3.8e-8), and this root is fixed.
    keys = BranchKeys(ROOT)
    step_keys = keys.noise_keys(range(4000))
    tree = {"w": jnp.zeros((4, 5)), "b": jnp.zeros(10)}

    @jax.vmap
    def noise(key):
        leaves = jax.tree.leaves(add_noise(tree, (), key_data=key, stddev=1.0)[0])
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    values = np.asarray(jax.jit(noise)(step_keys))
    bound = 5.5 / np.sqrt(len(values))
    size = values.shape[1]
    assert abs(np.corrcoef(values.T) - np.eye(size)).max() < bound
    assert abs(np.corrcoef(values[1:].T, values[:-1].T)[:size, size:]).max() < bound
    assert abs(np.corrcoef(values.T**2) - np.eye(size)).max() < bound


def test_form_follows_the_tree():
    tree = {"w": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(4)}
    noise = noise_like(tree, 1.0)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), noise) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )


@pytest.mark.parametrize(("iterations", "bands"), [(10, 2), (50, 4), (200, 16)])
def test_a_strategy_costs_what_is_accounted(iterations, bands):
    # Columns of norm at most 1: then noise of the multiplier times the clip norm is enough.
    coefs = toeplitz_strategy(iterations, bands)
    assert len(coefs) == bands
    assert coefs[0] > 0
    float32 = np.asarray(coefs, np.float32).astype(np.float64)
    assert 1 - 1e-5 < np.linalg.norm(float32) <= 1


def test_banded_noise_has_the_covariance_of_its_strategy():
    # C X = Z with Z independent: what C makes of the noise of successive steps is white.
    strategy = toeplitz_strategy(12, 3)
    keys = BranchKeys(ROOT)
    like = jnp.zeros(100_000)
    memory, steps = start_noise(strategy, like), []
    for step in range(1, 13):
        noise, memory = add_noise(
            like, memory, key_data=keys.noise_keys([step])[0], stddev=2.0, strategy=strategy
        )
        steps.append(np.asarray(noise))
    c = sum(np.diag(np.full(12 - i, coef), -i) for i, coef in enumerate(strategy))
    white = c @ np.stack(steps)
    # 100,000 draws: variances within 5 standard errors of 0.45 %, correlations of 0.32 %.
    np.testing.assert_allclose(white.var(axis=1), 4.0, rtol=0.0224)
    assert abs(np.corrcoef(white) - np.eye(12)).max() < 5 / np.sqrt(100_000)
    # And it is correlated: sums of it grow more slowly than those of independent noise.
    assert np.stack(steps).sum(axis=0).var() < 0.7 * 12 * 4.0


def test_what_noise_remembers_can_be_made_anew():
    strategy = toeplitz_strategy(20, 4)
    keys = BranchKeys(ROOT)
    like = {"w": jnp.zeros((3, 2)), "b": jnp.zeros(4)}
    step = jax.jit(
        lambda memory, key: add_noise(like, memory, key_data=key, stddev=0.5, strategy=strategy)[1]
    )
    memory = start_noise(strategy, like)
    for number in range(1, 12):
        memory = step(memory, keys.noise_keys([number])[0])
        past = keys.noise_keys(range(1, number + 1))
        again = replay(strategy, like, past, 0.5)
        jax.tree.map(np.testing.assert_array_equal, memory, again)
    nothing = np.zeros((0, 2), np.uint32)
    start = start_noise(strategy, like)
    jax.tree.map(np.testing.assert_array_equal, start, replay(strategy, like, nothing, 1))
