"""Population based training: the worst of a population make room for variants of the best.

The rules of Jaderberg et al. 2017 ("Population Based Training of Neural Networks") as Ray Tune's
``PopulationBasedTraining`` has them: who is in the lower quantile at a perturbation goes on from
what one in the upper quantile has learnt (*exploit*), with hyperparameters that differ a little
from that one's (*explore*).
"""

import math
import random
from collections.abc import Mapping, Sequence

from sweeps.search_space import value_at
from sweeps.spec.domains import Domain, Value

PERTURBATION_FACTORS = (1.2, 0.8)
"""Ray Tune's, by which a number is multiplied that is not drawn anew."""


def quantiles(utilities: Sequence[float], quantile_fraction: float) -> tuple[list[int], list[int]]:
    """Who is in the lower quantile and who in the upper one; of two trials, one is in each.

    Args:
        utilities: Of the population; one that is not finite is in neither.
        quantile_fraction: How large they are, in [0, 0.5].

    Returns:
        Their places in ``utilities``, the worst first; of equal ones, who comes first.
    """
    finite = [place for place, utility in enumerate(utilities) if math.isfinite(utility)]
    order = sorted(finite, key=lambda place: utilities[place])
    count = min(math.ceil(len(order) * quantile_fraction), len(order) // 2)
    return order[:count], order[len(order) - count :]


def explore(
    values: Mapping[str, Value],
    mutations: Mapping[str, Domain],
    resample_probability: float,
    rng: random.Random,
) -> dict[str, Value]:
    """Hyperparameters that differ a little.

    A number is multiplied by one of `PERTURBATION_FACTORS`, which may lead out of its range; a
    listed value becomes its neighbour in the list. What is drawn anew, or is not in the list,
    is drawn from the domain.

    Args:
        values: Of who is exploited.
        mutations: By field that changes, what it is drawn from.
        resample_probability: Of being drawn anew, in [0, 1].
        rng: Where chance comes from.

    Returns:
        A value of each field in ``mutations``.
    """
    return {
        name: _mutated(values[name], domain, resample_probability, rng)
        for name, domain in mutations.items()
    }


def _mutated(
    value: Value, domain: Domain, resample_probability: float, rng: random.Random
) -> Value:
    anew = rng.random() < resample_probability
    if domain.kind == "choice":
        listed = domain.values
        if anew or value not in listed:
            return rng.choice(listed)
        place = listed.index(value) + rng.choice([-1, 1])
        return listed[min(max(place, 0), len(listed) - 1)]
    if anew:
        return value_at(domain, rng.random())
    changed = float(value) * rng.choice(PERTURBATION_FACTORS)
    return max(1, round(changed)) if domain.kind in ("randint", "lograndint") else changed
