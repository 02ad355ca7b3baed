"""What would fit: changes that make a refused mechanism meet its budget, found in little time.

Each hint is a mechanism whose epsilon was computed, on a coarse grid, and lies within the budget;
the coarse grid never shows less than the truth. Rényi DP's estimate, a fraction of a millisecond,
leads to it; two or three computations in all are usual.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from accounting._coarse_to_fine import guide
from accounting._search import guided_fitting
from accounting.accountants import Accountant, compute_epsilon, mechanism_parts
from accounting.calibration import LARGEST_NOISE_MULTIPLIER
from accounting.errors import AccountingError
from accounting.mechanism import Mechanism

_TOLERANCE = 0.02


@functools.lru_cache(maxsize=1024)
def what_would_fit(
    mechanism: Mechanism, epsilon: float, delta: float, accountant: Accountant
) -> tuple[float | None, int | None]:
    """Finds more noise, and fewer iterations, that meet a budget.

    Args:
        mechanism: Does not meet the budget.
        epsilon: Of the budget; finite, > 0.
        delta: Of the budget; in [1e-10, 1).
        accountant: "pld" or "rdp".

    Returns:
        ``(noise multiplier, iterations)``, each meeting the budget with all else as in
        `mechanism`; None where no such change was found.
    """

    # What is shown is what was computed: rounded before, not after.
    def louder(noise_multiplier: float) -> Mechanism:
        return dataclasses.replace(mechanism, noise_multiplier=_rounded_up(noise_multiplier))

    def shorter(inverse: float) -> Mechanism:
        return mechanism.after(_whole(inverse))

    @functools.cache  # Many x are the same number of iterations.
    def cost(changed: Mechanism) -> float:
        return compute_epsilon(mechanism_parts(changed), delta, accountant, coarse=True)

    def fitting(
        change: Callable[[float], Mechanism], start: float, highest: float
    ) -> float | None:
        try:
            return guided_fitting(
                lambda x: cost(change(x)),
                lambda x: guide(mechanism_parts(change(x)), delta, accountant),
                epsilon,
                start=start,
                near=True,
                tolerance=_TOLERANCE,
                lowest=start / 2,
                highest=highest,
            )
        except AccountingError:
            return None

    noise = fitting(louder, mechanism.noise_multiplier, LARGEST_NOISE_MULTIPLIER)
    inverse = fitting(shorter, 1 / mechanism.iterations, 1.0)
    return (
        None if noise is None else _rounded_up(noise),
        None if inverse is None else _whole(inverse),
    )


def _rounded_up(number: float) -> float:
    """The number, > 0, up to four significant digits."""
    digits = 3 - math.floor(math.log10(number))
    return max(number, round(math.ceil(round(number * 10**digits, 6)) / 10**digits, digits))


def _whole(inverse: float) -> int:
    """The number of iterations, down to a whole one."""
    return max(1, math.floor(1 / inverse + 1e-9))
