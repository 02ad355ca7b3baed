"""What a mechanism costs: `epsilon(mechanism, delta=...)`.

Both accountants return an upper bound on the true epsilon for every valid input, within seconds
and a bounded memory, and the same number every time:

* "rdp": Rényi DP, or the closed form without subsampling where that is smaller.
* "pld": the smallest of three sound bounds, the privacy loss distribution among them; hence
  never above "rdp". The grid of the distribution is 1e-4 apart for all usual parameters, coarser
  (up to 0.4) where it would not fit, and absent where epsilon is in the thousands and beyond.
  At sampling probability 1 the result is the exact value of the Gaussian mechanism.

Nothing carries over from one query to the next but finished results and the distribution of a
single step, so a failed query cannot poison a later one.
"""

import functools
import math
from typing import Literal

from accounting import _validate
from accounting.errors import AccountingError, InvalidPrivacyParameter
from accounting.mechanism import DpSgdMechanism

Accountant = Literal["pld", "rdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp")


def epsilon(mechanism: DpSgdMechanism, *, delta: float, accountant: Accountant = "pld") -> float:
    """Returns an epsilon for which the mechanism is (epsilon, delta)-differentially private.

    Asking for several `mechanism.after(step)` is cheap: the distribution of one step is kept.

    Args:
        mechanism: What is accounted.
        delta: In [1e-10, 1).
        accountant: "pld" (tight) or "rdp" (fast, looser).

    Returns:
        A number >= 0, never NaN; `math.inf` only where the bound exceeds the range of a float.

    Raises:
        InvalidPrivacyParameter: An argument is of the wrong type or out of range.
        AccountingError: The accountant failed; nothing is known about the cost.

    Formal guarantees:
        Never below the true epsilon of the mechanism described by `DpSgdMechanism`, up to
        rounding errors of double precision, for which there is a margin.
    """
    if not isinstance(mechanism, DpSgdMechanism):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidPrivacyParameter("mechanism", mechanism, "a DpSgdMechanism")
    _validate.one_of("accountant", accountant, ACCOUNTANTS)
    return _cached_epsilon(mechanism, _validate.delta("delta", delta), accountant)


@functools.lru_cache(maxsize=4096)
def _cached_epsilon(mechanism: DpSgdMechanism, delta: float, accountant: Accountant) -> float:
    return compute_epsilon(mechanism, delta, accountant, coarsening=1)


def compute_epsilon(
    mechanism: DpSgdMechanism, delta: float, accountant: Accountant, *, coarsening: int
) -> float:
    """Computes what `epsilon` caches, from validated arguments.

    Args:
        mechanism: What is accounted.
        delta: In [1e-10, 1).
        accountant: "pld" or "rdp".
        coarsening: By what factor, at least 1, the grid may be coarser: faster and less tight,
            sound all the same.

    Raises:
        AccountingError: The accountant failed.
    """
    from accounting import bounds, privacy_loss  # Costs about a second, so only on demand.

    try:
        found: list[float] = []
        if accountant == "pld":
            interval = privacy_loss.FINEST_INTERVAL * coarsening
            found.append(bounds.gaussian_bound(mechanism, delta))
            found.append(bounds.pld_bound(mechanism, delta, interval))
        # Rarely the smallest beside the distribution, so a coarse answer does without it.
        if accountant == "rdp" or coarsening == 1 or math.inf in found:
            found.append(bounds.rdp_bound(mechanism, delta))
        result = math.nan if any(map(math.isnan, found)) else min(found)
    except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        raise AccountingError(
            f"the {accountant} accountant failed for {mechanism} at delta {delta:g}: {error}"
        ) from error
    if math.isnan(result) or result < 0:
        raise AccountingError(
            f"the {accountant} accountant answered {result} for {mechanism} at delta {delta:g}"
        )
    return result
