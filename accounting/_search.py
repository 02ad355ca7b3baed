"""The smallest x at which a decreasing cost fits a target, in few evaluations.

Idea: cost against x is nearly a straight line in log-log scale (noise against epsilon, iterations
against epsilon), so interpolating between a point that is too dear and one that fits lands close
to the crossing. Each proposal is pushed a little to the side that closes the bracket, and
bisection takes over whenever interpolation stalls.
"""

import math
from collections.abc import Callable

MAX_EVALUATIONS = 200


def smallest_fitting(
    cost: Callable[[float], float],
    target: float,
    *,
    start: float,
    factor: float,
    tolerance: float,
    lowest: float,
    highest: float,
) -> float | None:
    """Returns an x with cost(x) <= target, while cost(x / (1 + tolerance)) > target or nearly so.

    Args:
        cost: Decreasing up to small wobbles; may return infinity.
        target: Largest cost that fits, > 0.
        start: Where to begin; in [lowest, highest].
        factor: First step of the search for a bracket, > 1; later steps grow.
        tolerance: Relative width of the final bracket, > 0.
        lowest: Least x tried, > 0.
        highest: Largest x tried.

    Returns:
        A fitting x that was evaluated; None if `highest` does not fit or `lowest` does.
    """
    log_target = math.log(target)

    def excess(log_x: float) -> float:
        value = cost(math.exp(log_x))
        return math.log(max(value, 1e-300)) - log_target if value < math.inf else math.inf

    bottom, top = math.log(lowest), math.log(highest)
    stride = math.log(factor)
    dear = fits = math.log(start)
    dear_excess = fits_excess = excess(fits)
    while fits_excess > 0:
        if fits >= top:
            return None
        dear, dear_excess = fits, fits_excess
        fits = min(top, fits + stride)
        fits_excess = excess(fits)
        stride *= 2
    while dear_excess <= 0:
        if dear <= bottom:
            return None
        fits, fits_excess = dear, dear_excess
        dear = max(bottom, dear - stride)
        dear_excess = excess(dear)
        stride *= 2

    closed = math.log1p(tolerance)
    fitted_last, stalled = False, 0
    for _ in range(MAX_EVALUATIONS):
        width = fits - dear
        if width <= closed:
            break
        middle = dear + width / 2
        if stalled < 2 and math.isfinite(dear_excess):
            middle = dear + width * dear_excess / (dear_excess - fits_excess)
            middle += (-0.4 if fitted_last else 0.4) * closed
            margin = min(0.3 * closed, width / 2)
            middle = min(max(middle, dear + margin), fits - margin)
        middle_excess = excess(middle)
        fitted_last = middle_excess <= 0
        if fitted_last:
            fits, fits_excess = middle, middle_excess
        else:
            dear, dear_excess = middle, middle_excess
        stalled = 0 if fits - dear < width / 2 or stalled >= 2 else stalled + 1
    return math.exp(fits)
