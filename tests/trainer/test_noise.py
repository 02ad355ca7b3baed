import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from trainer.keys import BranchKeys
from trainer.noise import gaussian_noise_like

ROOT = bytes(range(32))


def draws(stddev, size=200_000, step=1):
    tree = {"a": jnp.zeros(size), "b": jnp.zeros((size, 1))}
    return gaussian_noise_like(BranchKeys(ROOT).noise_key(step), tree, stddev)


@pytest.mark.parametrize("stddev", [0.5, 2.0, 37.0])
def test_noise_is_gaussian_with_the_given_std(stddev):
    # Kolmogorov-Smirnov on 200,000 draws of a fixed key, significance 1e-4; it rejects a std
    # that is 2 % off, so a wrong factor cannot hide.
    noise = np.asarray(draws(stddev)["a"])
    assert scipy.stats.kstest(noise / stddev, "norm").pvalue > 1e-4
    for factor in (0.98, 1.02):
        assert scipy.stats.kstest(noise / (stddev * factor), "norm").pvalue < 1e-4


def test_leaves_and_steps_have_noise_of_their_own():
    first, second = draws(1.0), draws(1.0, step=2)
    a, b = np.asarray(first["a"]), np.asarray(first["b"])[:, 0]
    # Correlation of 200,000 independent pairs: std 1/sqrt(n) = 0.0022; 5 of them.
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.0112
    assert abs(np.corrcoef(a, np.asarray(second["a"]))[0, 1]) < 0.0112


def test_form_follows_the_tree():
    tree = {"w": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(4)}
    noise = gaussian_noise_like(BranchKeys(ROOT).noise_key(1), tree, 1.0)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), noise) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), tree
    )
