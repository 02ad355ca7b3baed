"""The median rule: a trial that was never as good as half of the others are on average is pruned.

That of Golovin et al. 2017 ("Google Vizier: A Service for Black-Box Optimization", KDD) as Ray
Tune's ``MedianStoppingRule`` has it: at a report at step t >= ``grace_period``, a trial is
compared with the others that have come as far. It is pruned if the best utility that it ever
reported is strictly below the median of their *running means*: each is the mean of what that
trial reported from ``grace_period`` to t, both included.
"""

import statistics
from collections.abc import Sequence


def goes_on(best: float, means: Sequence[float], min_samples_required: int) -> bool:
    """Whether a trial goes on after a report.

    Args:
        best: Its best utility so far; -inf where none was finite.
        means: The running means, all finite, of the others that have come as far.
        min_samples_required: With fewer of these every trial goes on; >= 1.
    """
    return len(means) < min_samples_required or best >= statistics.median(means)
