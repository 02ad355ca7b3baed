"""The smallest x at which a decreasing cost fits a target, in few evaluations.

Idea: cost against x is nearly a straight line in log-log scale (noise against epsilon, iterations
against epsilon), so interpolating between a point that is too dear and one that fits lands close
to the crossing. Each proposal is pushed a little to the side that closes the bracket, and
bisection takes over whenever interpolation stalls.
"""

import math
from collections.abc import Callable

MAX_EVALUATIONS = 200
_GUIDED_EVALUATIONS = 8
_STEEPEST = 10.0


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


def guided_fitting(
    cost: Callable[[float], float],
    guide: Callable[[float], float],
    target: float,
    *,
    start: float,
    near: bool,
    tolerance: float,
    lowest: float,
    highest: float,
) -> float | None:
    """As `smallest_fitting`, in two or three evaluations where a cheap guide resembles the cost.

    The ratio of cost to guide changes slowly, so each evaluation corrects the guide, the second
    its slope too, and the corrected guide's crossing is the next proposal. Where that does not
    settle, the guide is left out.

    Args:
        cost: Decreasing up to small wobbles; may return infinity.
        guide: Cheap, decreasing, roughly in proportion to the cost; may return infinity.
        target: Largest cost that fits, > 0.
        start: Where to begin; in [lowest, highest].
        near: Whether `start` is close to the crossing, closer than the guide's own.
        tolerance: How far above the crossing the result may lie, as a share; > 0.
        lowest: Least x tried, > 0.
        highest: Largest x tried.

    Returns:
        A fitting x that was evaluated; None if `highest` does not fit or `lowest` does.
    """
    best, at = math.inf, start
    known: list[tuple[float, float]] = []  # log x, and there the log of cost over guide.
    slope = 0.0

    def corrected(x: float) -> float:
        log_x, log_ratio = known[-1] if known else (0.0, 0.0)
        return guide(x) * math.exp(min(log_ratio + slope * (math.log(x) - log_x), 700.0))

    for round_number in range(_GUIDED_EVALUATIONS):
        closeness = 0.0
        if round_number > 0 or not near:
            proposed = smallest_fitting(
                corrected,
                target,
                start=at,
                factor=1.2,
                tolerance=tolerance / 10,
                lowest=lowest,
                highest=highest,
            )
            if proposed is None:
                break
            steepness = _steepness(corrected, proposed)
            closeness = 0.6 * tolerance * steepness
            # Between the crossing and what the tolerance allows, nearer to the former.
            at = min(proposed * (1 + 0.3 * tolerance), highest)
        value, guided = cost(at), guide(at)
        if not (0 < value < math.inf and 0 < guided < math.inf):
            break
        if value <= target:
            best = min(best, at)
            if value >= target * (1 - closeness):
                return at
        known.append((math.log(at), math.log(value / guided)))
        if len(known) > 1 and known[-1][0] != known[-2][0]:
            slope = (known[-1][1] - known[-2][1]) / (known[-1][0] - known[-2][0])
            # What is corrected must still fall as x rises.
            slope = min(max(slope, -_STEEPEST), 0.8 * _steepness(guide, at))
    return smallest_fitting(
        cost,
        target,
        start=min(max(at if best == math.inf else best, lowest), highest),
        factor=1 + 3 * tolerance,
        tolerance=tolerance,
        lowest=lowest,
        highest=highest,
    )


def _steepness(function: Callable[[float], float], x: float) -> float:
    """By what power of 1/x a positive function falls around x; zero where that is unknown."""
    before, here = function(x / 1.02), function(x)
    return math.log(before / here) / math.log(1.02) if 0 < here < before < math.inf else 0.0
