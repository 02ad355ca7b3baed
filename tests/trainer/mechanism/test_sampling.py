import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.sampling import PADDING, Sampler, to_rows
from trainer.training.resident import Draw
from trainer.training.streamed import user_examples

ROOT = bytes(range(32))


def on_host(sampler):
    """A function from a step to the units that the host draws."""
    keys = BranchKeys(ROOT)
    groups = sampler.groups(keys.groups_rng()) if sampler.bands > 1 else None
    return lambda step: sampler.indices(keys.sampling_rng(step), step, groups)


def on_device(sampler):
    """The same for what a device draws."""
    keys = BranchKeys(ROOT)
    draw = Draw(sampler.num_units, sampler.capacity, sampler.bands, sampler.truncated_batch_size)
    groups = sampler.groups(keys.groups_rng()) if sampler.bands > 1 else None
    most = jnp.uint32(sampler.largest_bits)
    chosen = jax.jit(lambda key, step: draw.chosen(key, step, groups, most))
    return lambda step: np.flatnonzero(chosen(keys.draw_keys([step])[0], np.int32(step)))


PLACES = pytest.mark.parametrize("place", [on_host, on_device])


@PLACES
def test_batch_sizes_have_the_binomial_law(place):
    # 3,000 batches; a chi-square test over bins of at least 5 expected batches, at 1e-4: a right
    # sampler fails once in 10,000 roots, and this root is fixed.
    sampler = Sampler(num_units=200, sampling_prob=0.05)
    batch = place(sampler)
    sizes = [len(batch(step)) for step in range(3000)]
    edges = np.arange(4, 18)
    law = scipy.stats.binom(200, 0.05)
    probs = np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]]))
    bins = np.searchsorted(edges, sizes)  # size <= edges[i] falls into bin i
    counts = np.bincount(bins, minlength=len(probs))
    assert min(probs) * 3000 >= 5
    assert scipy.stats.chisquare(counts, probs * 3000).pvalue > 1e-4


@PLACES
def test_units_join_alike_and_on_their_own(place):
    sampler = Sampler(num_units=40, sampling_prob=0.3)
    batch = place(sampler)
    joined = np.zeros((4000, 40))
    for step in range(4000):
        joined[step, batch(step)] = 1
    # Each rate within 5 standard errors, and so each of the 780 correlations of two units.
    assert abs(joined.mean(axis=0) - 0.3).max() < 5 * np.sqrt(0.21 / 4000)
    correlations = np.corrcoef(joined.T) - np.eye(40)
    assert abs(correlations).max() < 5 / np.sqrt(4000)
    # Steps too are independent of each other.
    assert abs(np.corrcoef(joined[:-1].ravel(), joined[1:].ravel())[0, 1]) < 5 / np.sqrt(160_000)


@PLACES
def test_batches_hold_each_unit_once_in_order(place):
    batch = place(Sampler(num_units=60, sampling_prob=0.5))
    for step in range(50):
        units = batch(step)
        assert (np.diff(units) > 0).all()
        assert units.min() >= 0
        assert units.max() < 60


@PLACES
def test_full_batches_take_everyone(place):
    batch = place(Sampler(num_units=17, sampling_prob=1.0))
    np.testing.assert_array_equal(batch(1), np.arange(17))


@PLACES
@pytest.mark.parametrize("draws_groups", [False, True])
def test_each_step_draws_from_its_group_alone(place, draws_groups):
    sampler = Sampler(num_units=90, sampling_prob=0.5, bands=3, draws_groups=draws_groups)
    groups = sampler.groups(BranchKeys(ROOT).groups_rng())
    assert set(groups) == {0, 1, 2}
    batch = place(sampler)
    joined = np.zeros((600, 90))
    for step in range(600):
        joined[step, batch(step)] = 1
        assert set(groups[batch(step)]) <= {step % 3}
    # Within its group's steps every unit joins at the rate, within 5 standard errors.
    rates = np.array([joined[groups[unit] :: 3, unit].mean() for unit in range(90)])
    assert abs(rates - 0.5).max() < 5 * np.sqrt(0.25 / 200)


def test_groups_by_position_are_even_and_drawn_ones_are_independent():
    fixed = Sampler(num_units=10, sampling_prob=0.5, bands=3)
    np.testing.assert_array_equal(
        fixed.groups(np.random.default_rng(0)), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    )
    drawn = Sampler(num_units=30_000, sampling_prob=0.5, bands=3, draws_groups=True)
    counts = np.bincount(drawn.groups(np.random.default_rng(0)))
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@PLACES
def test_truncated_batches_lose_units_at_random(place):
    # 20 of 40 join on average and 18 may stay, so most batches lose some.
    sampler = Sampler(num_units=40, sampling_prob=0.5, truncated_batch_size=18)
    assert sampler.capacity == 18
    batch = place(sampler)
    joined = np.zeros((4000, 40))
    for step in range(4000):
        joined[step, batch(step)] = 1
    sizes = joined.sum(axis=1)
    assert sizes.max() == 18
    law = scipy.stats.binom(40, 0.5)
    kept = sum(law.sf(size) for size in range(18)) / 40  # the mean of min(size, 18)
    assert abs(joined.mean(axis=0) - kept).max() < 5 * np.sqrt(0.25 / 4000)
    assert abs((sizes == 18).mean() - law.sf(17)) < 5 * np.sqrt(0.25 / 4000)


@given(num_units=st.integers(1, 5000), prob=st.floats(1e-6, 1), bands=st.integers(1, 7))
def test_a_batch_exceeds_a_row_once_in_a_million(num_units, prob, bands):
    sampler = Sampler(num_units=num_units, sampling_prob=prob, bands=bands)
    assert 1 <= sampler.capacity <= num_units
    group = -(-num_units // bands)
    assert scipy.stats.binom.sf(sampler.capacity, group, prob) <= 1e-6


@given(prob=st.floats(2.0**-32, 1.0))
def test_a_device_never_draws_more_often_than_is_accounted(prob):
    bits = Sampler(num_units=1, sampling_prob=prob).largest_bits
    assert 0 <= bits < 2**32
    assert (bits + 1) / 2**32 <= prob
    assert prob - (bits + 1) / 2**32 < 2.0**-32


@settings(max_examples=50)
@given(size=st.integers(0, 50), capacity=st.integers(1, 20))
def test_rows_hold_a_batch_whole(size, capacity):
    rows = to_rows(np.arange(size, dtype=np.int32), capacity)
    assert rows.shape == (max(1, -(-size // capacity)), capacity)
    np.testing.assert_array_equal(rows[rows != PADDING], np.arange(size))


@pytest.mark.parametrize(("batch", "num_examples"), [(4096, 50_000), (65_536, 1_281_167)])
def test_padding_is_a_small_part_of_a_row(batch, num_examples):
    sampler = Sampler(num_units=num_examples, sampling_prob=batch / num_examples)
    assert sampler.capacity / batch - 1 <= (0.08 if batch == 4096 else 0.02)


def test_of_a_users_examples_some_are_drawn():
    positions = np.array([[0, 1, 2, 3], [4, -1, -1, -1], [5, 6, -1, -1]], np.int32)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        chosen = user_examples(positions, np.array([0, -1, 2], np.int32), 3, rng)
        assert chosen.shape == (3, 3)
        assert set(chosen[1]) == {-1}
        assert set(chosen[2]) == {5, 6, -1}
        seen.add(tuple(sorted(chosen[0])))
    assert seen == {(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)}
    wide = user_examples(positions, np.array([1], np.int32), 6, rng)
    assert wide.shape == (1, 6)
    assert sorted(wide[0]) == [-1] * 5 + [4]
