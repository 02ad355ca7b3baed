"""Who takes part in a step: Poisson sampling, whole or truncated, of all units or of a group.

The accountant's amplification holds for Poisson sampling: every unit (an example, or a user with
all examples) joins a batch on its own with probability q, so a batch has a random size, sometimes
zero. A compiled program wants one shape. A batch is therefore taken in *rows* of fixed capacity:
almost always one, since the capacity is the binomial's 1 - 1e-6 quantile, and as many more as it
takes otherwise. Nobody is dropped, unless a truncated batch size says so, which is accounted for;
an empty batch takes its noise like any other.

Two places draw by this one law. On the host (`Sampler.indices`) a batch's size is drawn first,
which costs next to nothing for small q; on a device (`trainer.training.resident`) every unit
compares 32 random bits with q.
"""

import bisect
import dataclasses
import functools

import numpy as np
from scipy import special

PADDING = -1
_OVERFLOW_PROB = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws batches of units.

    Attributes:
        num_units: Units in the training set, >= 1.
        sampling_prob: Probability with which each unit of the step's group joins, in
            [2^-32, 1].
        bands: Number of groups, >= 1; step t draws from group t mod ``bands`` alone.
        truncated_batch_size: Units that a batch keeps at most, at random; None keeps all.
        draws_groups: Whether each unit draws its group by itself, as it must where the number of
            units is protected, or has it by its position.
    """

    num_units: int
    sampling_prob: float
    bands: int = 1
    truncated_batch_size: int | None = None
    draws_groups: bool = False

    @functools.cached_property
    def capacity(self) -> int:
        """Slots in a row: the smallest that one batch overflows with probability <= 1e-6."""
        if self.truncated_batch_size is not None:
            return min(self.num_units, self.truncated_batch_size)
        return self.capacity_of(self.num_units)

    def capacity_of(self, num_units: int) -> int:
        """Slots in a row for the draws from a part of the units, as `capacity` for all.

        Args:
            num_units: Size of the part, >= 1.
        """
        if self.draws_groups:
            size, prob = num_units, self.sampling_prob / self.bands
        else:
            size, prob = -(-num_units // self.bands), self.sampling_prob
        # The binomial's quantile: scipy.stats has it, and takes a second to import.
        quantile = bisect.bisect_left(
            range(size), -_OVERFLOW_PROB, key=lambda drawn: -special.bdtrc(drawn, size, prob)
        )
        return max(1, min(num_units, quantile))

    @property
    def largest_bits(self) -> int:
        """A unit joins if 32 random bits are at most this number: with probability <= q.

        The probability is below q by at most 2^-32, never above it.
        """
        return int(self.sampling_prob * 2.0**32) - 1

    def groups(self, rng: np.random.Generator) -> np.ndarray:
        """The group of each unit, int32 ``[num_units]``; fixed for a branch.

        Args:
            rng: Secret; read where units draw their groups.
        """
        if self.draws_groups:
            return rng.integers(0, self.bands, self.num_units, np.int32)
        return np.arange(self.num_units, dtype=np.int32) % np.int32(self.bands)

    def indices(
        self, rng: np.random.Generator, step: int = 0, groups: np.ndarray | None = None
    ) -> np.ndarray:
        """One batch.

        Args:
            rng: Secret, of this step alone.
            step: The step; it picks the group.
            groups: From `groups`; None where there is one group.

        Returns:
            Positions of the units drawn, ascending, int32 ``[batch]``.
        """
        members = None
        size = self.num_units
        if groups is not None and self.bands > 1:
            members = np.flatnonzero(groups == step % self.bands)
            size = len(members)
        # The number first, then a set of that many, each as likely as any other: the same law
        # as a decision for each unit.
        count = int(rng.binomial(size, self.sampling_prob))
        if self.truncated_batch_size is not None:
            count = min(count, self.truncated_batch_size)
        chosen = np.sort(rng.choice(size, count, replace=False, shuffle=False))
        return (chosen if members is None else members[chosen]).astype(np.int32)


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
