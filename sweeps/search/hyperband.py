"""HyperBand: brackets of trials, each of which is halved again and again until few are left.

Algorithm 1 of Li et al. 2018 ("Hyperband: A Novel Bandit-Based Approach to Hyperparameter
Optimization", JMLR 18). A bracket of many trials compares them early, where a step costs little
and says little; one of few compares them late, or never. The sizes are such that each bracket
costs about the same. Brackets take trials by their numbers, the largest bracket first, and begin
again when all are full. In the paper's terms: R is the most iterations, in units of the grace
period; eta the reduction factor.

Ray Tune's ``HyperBandScheduler`` differs in little: it begins with the smallest bracket, and
rounds up where the paper rounds down.
"""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Bracket:
    """Trials that are compared with each other and with nobody else.

    Attributes:
        numbers: Of its trials.
        rungs: Where they are compared, in steps, lowest first; none if each runs to its end.
    """

    numbers: range
    rungs: Sequence[int]


def one_round(grace_period: int, max_iterations: int, reduction_factor: int) -> list[Bracket]:
    """The brackets, one of each kind, the largest first.

    Args:
        grace_period: No rung is below, >= 1.
        max_iterations: Where the longest trials end, >= ``grace_period``.
        reduction_factor: Of trials that come to a rung one in so many goes on; >= 2.
    """
    halvings = 0  # the paper's s_max
    while max_iterations // reduction_factor ** (halvings + 1) >= grace_period:
        halvings += 1
    brackets: list[Bracket] = []
    first = 0
    for s in reversed(range(halvings + 1)):
        size = -(-(halvings + 1) * reduction_factor**s // (s + 1))  # rounded up
        rungs = [max_iterations // reduction_factor**left for left in range(s, 0, -1)]
        brackets.append(Bracket(range(first, first + size), rungs))
        first += size
    return brackets


def bracket_of(number: int, brackets: Sequence[Bracket]) -> Bracket:
    """The bracket of a trial.

    Args:
        number: The trial's, from 0.
        brackets: From `one_round`.
    """
    whole = brackets[-1].numbers.stop
    start, place = number - number % whole, number % whole
    found = next(bracket for bracket in brackets if place in bracket.numbers)
    numbers = range(start + found.numbers.start, start + found.numbers.stop)
    return Bracket(numbers, found.rungs)


def best(utilities: Sequence[float], reduction_factor: int) -> list[int]:
    """Which of a bracket's trials go on past a rung: one in ``reduction_factor``, at least one.

    Args:
        utilities: Of all that came to the rung; one that is not finite does not go on.
        reduction_factor: As in `one_round`.

    Returns:
        Their places in ``utilities``, the best first; of equal ones, who comes first.
    """
    finite = [place for place, utility in enumerate(utilities) if math.isfinite(utility)]
    order = sorted(finite, key=lambda place: -utilities[place])
    return order[: max(1, len(utilities) // reduction_factor)]
