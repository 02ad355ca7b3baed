"""The laws of how many candidates a private selection runs, as numbers and as draws.

All but Poisson's are truncated negative binomials: for k >= 1, P[K = k] is proportional to
(1 - gamma)^k * binom(k + shape - 1, k). Shape 1 is the geometric law, and shape 0, as a limit,
the logarithmic one.

References:
    Papernot and Steinke, "Hyperparameter Tuning with Renyi Differential Privacy", 2022,
    Definition 1, https://arxiv.org/abs/2110.03620
"""

import math
import random
from collections.abc import Callable

# exp(-mean) must stay a normal number; sums of Poisson numbers are Poisson.
_LARGEST_POISSON_PIECE = 500.0
_LEAST_PROBABILITY = 2.0**-60


def log_inverse_gamma(mean: float, shape: float) -> float:
    """Returns log(1/gamma) of the truncated negative binomial law with a mean, rounded up.

    Args:
        mean: From 1 to 10,000.
        shape: From 0 to 100.

    With t = log(1/gamma) the mean is shape * (exp(t) - 1)/(1 - exp(-shape * t)), which grows with
    t; at shape 0 it is (exp(t) - 1)/t.
    """

    def mean_at(t: float) -> float:
        decay = shape * t
        return math.expm1(t) / t * (decay / -math.expm1(-decay) if decay > 0 else 1.0)

    if mean == 1:
        return 0.0
    low, high = 0.0, 2 * math.log(mean) + 2
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if mean_at(middle) < mean else (low, middle)
    return high


def draw_poisson(mean: float, rng: random.Random) -> int:
    """Draws a number >= 0 of Poisson's law; mean > 0."""
    pieces = math.ceil(mean / _LARGEST_POISSON_PIECE)
    piece = mean / pieces
    return sum(
        _invert(rng.random(), 0, math.exp(-piece), lambda k: piece / (k + 1))
        for _ in range(pieces)
    )


def draw_truncated_negative_binomial(mean: float, shape: float, rng: random.Random) -> int:
    """Draws a number >= 1; mean from 1 to 10,000, shape from 0 to 100."""
    if mean == 1:
        return 1
    t = log_inverse_gamma(mean, shape)
    again = -math.expm1(-t)
    once = again * (shape / math.expm1(shape * t) if shape * t > 0 else 1 / t)
    return _invert(rng.random(), 1, once, lambda k: again * (k + shape) / (k + 1))


def _invert(uniform: float, least: int, probability: float, ratio: Callable[[int], float]) -> int:
    """Returns the least k whose cumulative probability exceeds a uniform number.

    Args:
        uniform: In [0, 1).
        least: The least k possible.
        probability: That of `least`, > 0.
        ratio: P[k + 1] / P[k]; decreasing or tending to less than 1.
    """
    k, below = least, probability
    while below <= uniform:
        factor = ratio(k)
        if factor < 1 and probability < _LEAST_PROBABILITY:
            break  # The rest is lost in rounding.
        probability *= factor
        below += probability
        k += 1
    return k
