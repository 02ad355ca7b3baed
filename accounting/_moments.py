"""Moments of the privacy loss of one step, from which its Rényi divergence follows.

The moment of order a is E[(P/Q)^a] under Q, for the output distributions P and Q of a step on
neighbouring data; its log, divided by a - 1, is the Rényi divergence. At whole orders a moment is
a finite sum of positive terms, between them a quadrature; both take a few array operations. What
is computed is the excess over 1, so that the smallest moments keep their full relative precision.

References:
    Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", 2019,
    https://arxiv.org/abs/1908.10530
    Chua et al., "Scalable DP-SGD: Shuffling vs. Poisson Subsampling", 2024, on truncation,
    https://arxiv.org/abs/2411.04205
"""

# scipy ships no stubs.
# pyright: reportMissingTypeStubs=false

import math

import numpy as np
import numpy.typing as npt

from accounting.mechanism import Step, TruncatedSampledGaussian

# From here a straight line between whole orders is within 1e-4 of the curve.
_INTERPOLATED_FROM_ORDER = 64
# Below this noise the quadrature would need too many points; a step costs at least 50 then.
_LEAST_NOISE_FOR_QUADRATURE = 0.1
# Outside these nothing is left of double precision. Clamped upwards in cost: less noise and more
# frequent sampling never cost less.
_LARGEST_NOISE_MULTIPLIER = 1e9
_LEAST_SAMPLING_PROB = 1e-12

# The sum over the tail of the Gaussian beyond, and aliasing, are below exp(-_DIGITS), about 1e-17.
_DIGITS = 40.0
_TAIL_STDDEVS = 9.5

Floats = npt.NDArray[np.float64]


def log_moment(step: Step, order: float) -> float:
    """Returns the log of the larger moment of the two directions, or an upper bound on it.

    Args:
        step: With valid numbers.
        order: In [1.01, 1024].

    Returns:
        A number >= 0, exact to a relative 1e-12 for a Poisson-sampled step at whole orders, and
        at all orders below 64 unless noise is below 0.1. `math.inf` where it exceeds the range of
        a float.
    """
    poisson = _poisson(step.sampling_prob, step.noise_multiplier, order)
    if isinstance(step, TruncatedSampledGaussian):
        return _truncated(step, order, poisson)
    return poisson


def _poisson(sampling_prob: float, noise_multiplier: float, order: float) -> float:
    """The log moment of a Poisson-sampled Gaussian step.

    P is with the one example and Q without, which is the costlier direction (Mironov et al.,
    2019, Theorem 5). Under Q, with z standard normal, P/Q = 1 + x where
    x = sampling_prob * (exp(z/noise - 1/(2 noise^2)) - 1), whose mean is zero.
    """
    noise_multiplier = min(noise_multiplier, _LARGEST_NOISE_MULTIPLIER)
    sampling_prob = max(sampling_prob, _LEAST_SAMPLING_PROB)
    inverse_variance = (1 / noise_multiplier) * (1 / noise_multiplier)
    if sampling_prob == 1:
        return order * (order - 1) / 2 * inverse_variance
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        below = math.floor(order)
        if below == order:
            return _at_whole_order(sampling_prob, inverse_variance, below)
        if noise_multiplier >= _LEAST_NOISE_FOR_QUADRATURE and order < _INTERPOLATED_FROM_ORDER:
            return _by_quadrature(sampling_prob, noise_multiplier, order)
        # Convex in the order and zero at order 1, hence below the line between whole orders.
        lower = _at_whole_order(sampling_prob, inverse_variance, below) if below > 1 else 0.0
        upper = _at_whole_order(sampling_prob, inverse_variance, below + 1)
        line = lower + (order - below) * (upper - lower) if lower < math.inf else math.inf
        # Minkowski's inequality for the norm of (1 - q) + q * exp(...), in L^order under Q.
        norm = np.logaddexp(
            math.log1p(-sampling_prob),
            math.log(sampling_prob) + (order - 1) / 2 * inverse_variance,
        )
        return min(line, order * float(norm))


def _at_whole_order(sampling_prob: float, inverse_variance: float, order: int) -> float:
    """The binomial expansion of (1 - q + q * exp(...))^order, less what sums to one.

    All terms are positive, so that no precision is lost (Mironov et al., 2019, Section 3.3).
    """
    draws = np.arange(1, order + 1, dtype=np.float64)
    log_comb = np.cumsum(np.log((order - draws + 1) / draws))[1:]
    draws = draws[1:]
    exponents = draws * (draws - 1) / 2 * inverse_variance
    log_expm1 = exponents + np.log(-np.expm1(-exponents))
    log_terms = (
        log_comb
        + draws * math.log(sampling_prob)
        + (order - draws) * math.log1p(-sampling_prob)
        + log_expm1
    )
    return _log1p_sum_exp(log_terms)


def _by_quadrature(sampling_prob: float, noise_multiplier: float, order: float) -> float:
    """Integrates (1 + x)^order - 1 - order * x >= 0 over the Gaussian by the trapezoidal rule.

    The integrand is analytic but for branch points at distance pi * noise from the real line, so
    with spacing h the error falls as exp(-2 pi c/h), c being how far the strip reaches; over it
    the Gaussian grows to exp(c^2/2).
    """
    strip = min(0.9 * math.pi * noise_multiplier, 6.0)
    spacing = 2 * math.pi * strip / (_DIGITS + strip * strip / 2)
    highest = max(order, 2.0) / noise_multiplier + _TAIL_STDDEVS
    z: Floats = np.arange(-_TAIL_STDDEVS, highest + spacing, spacing)
    log_ratio = z / noise_multiplier - 0.5 / (noise_multiplier * noise_multiplier)
    log_q = math.log(sampling_prob)
    far = log_ratio > 600  # exp would overflow soon; one is nothing beside it already.
    x = sampling_prob * np.expm1(np.minimum(log_ratio, 600))
    log_power = order * np.where(far, log_q + log_ratio, np.log1p(x))
    log_linear = np.where(far, math.log(order) + log_q + log_ratio, np.log1p(order * x))

    tail = np.ones_like(x)  # The binomial series from its second power on, for small x.
    for power in range(14, 2, -1):
        tail = 1 + (order - power + 1) / power * x * tail
    series = math.log(order * (order - 1) / 2) + 2 * np.log(np.abs(x)) + np.log(tail)
    middle = np.log(np.expm1(np.minimum(log_power, 30.0)) - order * x)
    large = log_power + np.log(-np.expm1(log_linear - log_power))
    log_integrand = np.where(
        order * np.abs(x) < 0.05, series, np.where(log_power < 30, middle, large)
    )
    log_width = math.log(spacing / math.sqrt(2 * math.pi))
    return _log1p_sum_exp(log_integrand - z * z / 2 + log_width)


def _log1p_sum_exp(logs: Floats) -> float:
    """log(1 + sum(exp(logs))), precise where the sum is tiny."""
    largest = float(np.max(logs))
    if not math.isfinite(largest):
        return 0.0 if largest == -math.inf else largest
    total = largest + math.log(float(np.sum(np.exp(logs - largest))))
    return float(np.logaddexp(0.0, total))


def _truncated(step: TruncatedSampledGaussian, order: float, poisson: float) -> float:
    """A bound on the log moment of a step whose batch is cut, given that of the step uncut.

    Let example i be blanked, and p be the probability that at least `truncated_batch_size` of the
    *other* examples are drawn; i has no part in that, nor has what it contains. P and Q are thus
    mixtures with the same weights, 1 - p and p, and the moment, an f-divergence, is jointly
    convex in them:

        moment <= (1 - p) * (moment of the Poisson step) + p * (moment given a full batch).

    With fewer others drawn nothing is cut, hence the former. Given a full batch, which examples
    are in it does not depend on what they contain. Without i in it, P and Q agree and the moment
    is 1. With i in it, for each choice of the others, they are Gaussians no farther apart than
    the sensitivity, of moment exp(order * (order - 1)/(2 noise^2)). And i can be in it only if
    it was drawn, of probability q independently of the others. By joint convexity again,

        moment given a full batch <= 1 + q * (exp(order * (order - 1)/(2 noise^2)) - 1).

    This uses that a blanked example still takes its place in the batch, as it does under
    "zero_out". Were it missing, another would take that place and the distance double.
    """
    from scipy import special  # Costs a tenth of a second, so only on demand.

    n, cap = step.num_examples, step.truncated_batch_size
    if cap > n - 1:
        return poisson
    full = float(special.betainc(float(cap), float(n - cap), step.sampling_prob))
    full = min(1.0, full * (1 + 1e-9) + 1e-300)
    inverse_variance = (1 / step.noise_multiplier) * (1 / step.noise_multiplier)
    log_gaussian = order * (order - 1) / 2 * inverse_variance
    # In logs, as log(1 + excess), the excess over 1 of either part being that of the mixture.
    with np.errstate(over="ignore", divide="ignore"):
        excess = np.logaddexp(
            math.log1p(-full) + _log_expm1(poisson) if full < 1 else -math.inf,
            math.log(full) + math.log(step.sampling_prob) + _log_expm1(log_gaussian),
        )
        return max(poisson, float(np.logaddexp(0.0, excess)))


def _log_expm1(value: float) -> float:
    """log(exp(value) - 1) for value >= 0."""
    if value == 0:
        return -math.inf
    return value + math.log(-math.expm1(-value)) if value < math.inf else math.inf
