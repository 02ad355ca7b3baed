import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from trainer.sampling import PADDING, PoissonSampler, to_rows


def test_inclusion_counts_are_binomial():
    # Batch sizes over 4,000 steps against Binomial(n, q) by chi-square over deciles, and every
    # example's inclusion count against Binomial(steps, q). Significance 1e-6 each; fixed seed.
    num_examples, prob, steps = 500, 0.07, 4_000
    sampler = PoissonSampler(num_examples, prob)
    rng = np.random.default_rng(7)
    sizes = np.empty(steps, int)
    inclusions = np.zeros(num_examples, int)
    for step in range(steps):
        batch = sampler.indices(rng)
        sizes[step] = len(batch)
        inclusions[batch] += 1

    law = scipy.stats.binom(num_examples, prob)
    edges = np.unique(law.ppf(np.linspace(0, 1, 11)[1:-1])).astype(int)
    bounds = [-1, *edges, num_examples]
    observed = [
        np.sum((sizes > low) & (sizes <= high)) for low, high in itertools.pairwise(bounds)
    ]
    expected = steps * np.diff([0.0, *law.cdf(edges), 1.0])
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-6

    deviations = (inclusions - steps * prob) / np.sqrt(steps * prob * (1 - prob))
    statistic = float(np.sum(deviations**2))  # ~ chi-square with num_examples degrees
    assert 1e-6 < scipy.stats.chi2(num_examples).cdf(statistic) < 1 - 1e-6


def test_inclusions_of_two_examples_are_independent():
    sampler = PoissonSampler(2, 0.5)
    rng = np.random.default_rng(3)
    table = np.zeros((2, 2), int)
    for _ in range(4_000):
        chosen = set(sampler.indices(rng).tolist())
        table[int(0 in chosen), int(1 in chosen)] += 1
    result: Any = scipy.stats.chi2_contingency(table)
    assert result.pvalue > 1e-6


@given(size=st.integers(0, 200), capacity=st.integers(1, 40))
def test_rows_hold_every_index_once_in_order(size, capacity):
    indices = np.arange(size, dtype=np.int32)
    rows = to_rows(indices, capacity)
    assert rows.shape == (max(1, -(-size // capacity)), capacity)
    assert rows.dtype == np.int32
    assert rows[rows != PADDING].tolist() == indices.tolist()


def test_an_empty_batch_is_one_row_of_padding():
    rows = PoissonSampler(3, 1e-9).rows(np.random.default_rng(0))
    assert rows.shape == (1, 1)
    assert (rows == PADDING).all()


def test_full_batch_takes_everyone():
    sampler = PoissonSampler(17, 1.0)
    assert sampler.capacity == 17
    assert sampler.rows(np.random.default_rng(0)).tolist() == [list(range(17))]


@pytest.mark.parametrize(
    ("num_examples", "batch", "expected"),
    # Smallest capacity that one batch overflows with probability <= 1e-6.
    [(50_000, 256, 335), (60_000, 512, 623), (50_000, 4096, 4390)],
)
def test_capacity_is_the_binomial_quantile(num_examples, batch, expected):
    sampler = PoissonSampler(num_examples, batch / num_examples)
    assert sampler.capacity == expected
    law = scipy.stats.binom(num_examples, batch / num_examples)
    assert law.sf(sampler.capacity) <= 1e-6 < law.sf(sampler.capacity - 1)
