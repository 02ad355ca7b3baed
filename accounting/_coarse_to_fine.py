"""Where a mechanism meets a target: a coarse search, then a fine one around its answer.

A mechanism depends on one number x, and its epsilon falls as x rises. Rényi DP's estimate leads;
what it proposes is computed on a coarse grid until it settles, then by the accountant in full.
"""

from collections.abc import Callable

import numpy as np

from accounting._search import guided_fitting
from accounting.accountants import (
    Accountant,
    Parts,
    compute_epsilon,
    epsilon,
    mechanism_parts,
)
from accounting.mechanism import Mechanism

TOLERANCE = 1e-3
"""The result is at most this fraction above the least x that meets the target."""

_COARSE_TOLERANCE = 3e-3
_LIBRARY_ORDERS = np.array(
    [*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 128, 256, 512, 1024],
    dtype=np.float64,
)


def guide(parts: Parts, delta: float, accountant: Accountant) -> float:
    """Returns an estimate of epsilon in a fraction of a millisecond; no bound.

    Close to accountant "rdp", and to "pld" but for a factor that changes slowly.

    Args:
        parts: Distinct steps and their counts; not empty.
        delta: In [1e-10, 1).
        accountant: What to resemble.
    """
    from accounting import cumulants  # Loads scipy, so only on demand.

    orders = _LIBRARY_ORDERS if accountant == "rdp" else None
    estimate = cumulants.renyi_guide(parts, delta, orders)
    return estimate if estimate > 0 else 0.0  # Whatever is not a number is of no use.


def coarse_to_fine(
    mechanism: Callable[[float], Mechanism],
    target_epsilon: float,
    target_delta: float,
    accountant: Accountant,
    *,
    start: float,
    lowest: float,
    highest: float,
) -> float | None:
    """Returns about the least x whose mechanism meets a target.

    Args:
        mechanism: The mechanism at x, whose cost falls as x rises.
        target_epsilon: Of the target; finite, > 0.
        target_delta: Of the target; in [1e-10, 1).
        accountant: "pld" or "rdp".
        start: Where to begin; in [lowest, highest].
        lowest: Least x tried, > 0.
        highest: Largest x tried.

    Returns:
        An x that meets the target, at most `TOLERANCE` above the least; None if `highest` does
        not meet it or `lowest` does.

    Raises:
        AccountingError: The accountant failed.
    """

    def parts(x: float) -> Parts:
        return mechanism_parts(mechanism(x))

    def guided(x: float) -> float:
        return guide(parts(x), target_delta, accountant)

    found: float | None = start
    if accountant == "pld":
        found = guided_fitting(
            lambda x: compute_epsilon(parts(x), target_delta, accountant, coarse=True),
            guided,
            target_epsilon,
            start=start,
            near=False,
            tolerance=_COARSE_TOLERANCE,
            lowest=lowest,
            highest=highest,
        )
    return found and guided_fitting(
        lambda x: epsilon(mechanism(x), delta=target_delta, accountant=accountant),
        guided,
        target_epsilon,
        start=found,
        near=accountant == "pld",
        tolerance=TOLERANCE,
        lowest=lowest,
        highest=highest,
    )
