"""Which correlated noise: the strategy matrix of banded matrix factorisation.

The noise of step t is row t of ``C^-1 Z`` with Z independent Gaussian and C lower triangular,
banded and Toeplitz. C is chosen for the least mean squared error of the running sums of noisy
gradients (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization",
https://arxiv.org/abs/2306.08153), with columns of L2 norm at most 1, so that noise of
``noise_multiplier`` times the clip norm costs what the accountant says.
"""

import functools

import numpy as np

# The solver converges long before on the sizes that occur.
_OPTIMIZER_STEPS = 250


@functools.lru_cache(maxsize=64)
def toeplitz_strategy(iterations: int, bands: int) -> tuple[float, ...]:
    """The coefficients of C, the same on every machine up to rounding.

    Args:
        iterations: Steps that the run is planned for, >= ``bands``.
        bands: Number of coefficients, >= 2.

    Returns:
        ``bands`` numbers of L2 norm 1, the first > 0.
    """
    from jax_privacy.matrix_factorization import toeplitz

    coefs = np.asarray(
        toeplitz.optimize_banded_toeplitz(iterations, bands, max_optimizer_steps=_OPTIMIZER_STEPS),
        np.float64,
    )
    # Rounding must not let a column's norm exceed 1: the cost is that of norm 1.
    norm = np.linalg.norm(coefs) * (1 + 1e-6)
    return tuple(float(c) for c in coefs / norm)
