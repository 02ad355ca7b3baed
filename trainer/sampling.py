"""Poisson sampling into arrays of one fixed shape.

The accountant's amplification holds for Poisson sampling: every example joins a batch on its
own with probability q, so a batch has a random size, sometimes zero. A compiled program wants
one shape. A batch is therefore written into one or more *rows* of fixed capacity, padded with
-1: almost always one row, since the capacity is the binomial's 1 - 1e-6 quantile, and as many
more as it takes otherwise. Nothing is ever dropped, so no truncation needs accounting; an empty
batch is one row of padding and takes its noise like any other.
"""

import dataclasses
import functools

import numpy as np
import scipy.stats

PADDING = -1
_OVERFLOW_PROB = 1e-6


@dataclasses.dataclass(frozen=True)
class PoissonSampler:
    """Draws batches of example indices.

    Attributes:
        num_examples: Size of the training set, >= 1.
        sampling_prob: Probability with which each example joins a batch, in (0, 1].
    """

    num_examples: int
    sampling_prob: float

    @functools.cached_property
    def capacity(self) -> int:
        """Slots in a row: the smallest that one batch overflows with probability <= 1e-6."""
        quantile = scipy.stats.binom.ppf(
            1.0 - _OVERFLOW_PROB, self.num_examples, self.sampling_prob
        )
        return max(1, min(self.num_examples, int(quantile)))

    def indices(self, rng: np.random.Generator) -> np.ndarray:
        """One batch: the chosen indices in ascending order, int32 ``[batch]``."""
        chosen = rng.random(self.num_examples) < self.sampling_prob
        return np.flatnonzero(chosen).astype(np.int32)

    def rows(self, rng: np.random.Generator) -> np.ndarray:
        """One batch as rows, int32 ``[rows, capacity]`` with rows >= 1, padded with -1."""
        return to_rows(self.indices(rng), self.capacity)


def to_rows(indices: np.ndarray, capacity: int) -> np.ndarray:
    """Spreads indices over rows of one capacity.

    Args:
        indices: int32 ``[batch]``, possibly empty.
        capacity: Slots in a row, >= 1.

    Returns:
        int32 ``[max(1, ceil(batch / capacity)), capacity]``, padded with -1.
    """
    num_rows = max(1, -(-len(indices) // capacity))
    rows = np.full(num_rows * capacity, PADDING, dtype=np.int32)
    rows[: len(indices)] = indices
    return rows.reshape(num_rows, capacity)
