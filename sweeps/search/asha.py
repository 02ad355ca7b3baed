"""Asynchronous successive halving: a trial goes on past a rung if it is among the best there.

The rule of Li et al. 2020 ("A System for Massively Parallel Hyperparameter Tuning", MLSys), in two
forms. Ray Tune's ``AsyncHyperBandScheduler`` stops (`goes_on`): whoever reaches a rung is compared
with those that were there before, once. The paper's Algorithm 2 promotes (`best`): whoever is not
among the best of a rung waits there, and goes on when it is.
"""

from collections.abc import Sequence

import numpy as np


def milestones(grace_period: int, max_iterations: int, reduction_factor: int) -> list[int]:
    """The rungs below ``max_iterations``, in steps: each so many times as far as the one before.

    Args:
        grace_period: The first rung, >= 1.
        max_iterations: Where trials end, >= 1.
        reduction_factor: Of trials that come to a rung one in so many goes on; >= 2.
    """
    rungs: list[int] = []
    rung = grace_period
    while rung < max_iterations:
        rungs.append(rung)
        rung *= reduction_factor
    return rungs


def goes_on(utility: float, others: Sequence[float], reduction_factor: int) -> bool:
    """Whether a trial goes on past a rung.

    Args:
        utility: The trial's; -inf where it is not finite.
        others: Finite ones of those that reached the rung before; the first to come goes on.
        reduction_factor: As in `milestones`.
    """
    if not others:
        return True
    return bool(utility >= np.percentile(others, 100 * (1 - 1 / reduction_factor)))


def best(utilities: Sequence[float], reduction_factor: int) -> list[int]:
    """Which trials of a rung may go on: the best ``len(utilities) // reduction_factor``.

    Args:
        utilities: Of all that have reached the rung, whatever became of them, first come first.
        reduction_factor: As in `milestones`.

    Returns:
        Their places in ``utilities``, the best first; of equal ones, who came first.
    """
    order = sorted(range(len(utilities)), key=lambda place: -utilities[place])
    return order[: len(utilities) // reduction_factor]
