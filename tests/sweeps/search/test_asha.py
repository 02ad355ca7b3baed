"""Our rule of successive halving is the one that Ray Tune's own scheduler has."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from sweeps.search import asha

FACTORS = st.integers(2, 5)
# Many equal ones, too.
UTILITIES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.9]) | st.floats(-1e6, 1e6)


def bracket_of(grace_period: int, max_iterations: int, factor: int) -> Any:
    """The one bracket of Ray's scheduler, with rungs as it makes them."""
    scheduler = AsyncHyperBandScheduler(
        metric="m", mode="max", max_t=max_iterations, grace_period=grace_period,
        reduction_factor=factor,
    )  # fmt: skip
    (bracket,) = scheduler._brackets
    return bracket


@given(FACTORS, st.integers(1, 50), st.integers(1, 3000))
def test_the_rungs_are_rays(factor: int, grace_period: int, more: int) -> None:
    max_iterations = grace_period + more
    bracket = bracket_of(grace_period, max_iterations, factor)
    # Whoever comes to the last step ends there, and is not compared.
    theirs = [rung for rung, _ in reversed(bracket._rungs) if rung < max_iterations]
    assert asha.milestones(grace_period, max_iterations, factor) == theirs


def test_nobody_is_compared_where_the_first_rung_is_the_end() -> None:
    assert asha.milestones(10, 10, 2) == []
    assert asha.milestones(10, 5, 2) == []


@given(st.lists(UTILITIES, min_size=1, max_size=40), FACTORS)
def test_at_a_rung_the_same_trials_go_on(utilities: list[float], factor: int) -> None:
    bracket = bracket_of(10, 15, factor)
    before: list[float] = []
    for number, utility in enumerate(utilities):
        trial = SimpleNamespace(trial_id=str(number))
        theirs = bracket.on_result(trial, 10, utility) == TrialScheduler.CONTINUE
        assert asha.goes_on(utility, before, factor) is theirs
        before.append(utility)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_whole_sweeps_are_pruned_alike(seed: int, factor: int) -> None:
    """Trials that report at every rung, in any order among each other."""
    rng = random.Random(seed)
    grace_period, max_iterations = 3, 3 * factor**4 + 1
    rungs = asha.milestones(grace_period, max_iterations, factor)
    bracket = bracket_of(grace_period, max_iterations, factor)
    ours: dict[int, list[float]] = {rung: [] for rung in rungs}
    waiting = {number: list(rungs) for number in range(60)}
    ended: dict[int, int] = {}
    while waiting:
        number = rng.choice([*waiting])
        rung = waiting[number].pop(0)
        utility = rng.choice([rng.random(), round(rng.random(), 1)])
        trial = SimpleNamespace(trial_id=str(number))
        theirs = bracket.on_result(trial, rung, utility) == TrialScheduler.CONTINUE
        stays = asha.goes_on(utility, ours[rung], factor)
        ours[rung].append(utility)
        assert stays is theirs
        if not stays:
            ended[number] = rung
        if not stays or not waiting[number]:
            del waiting[number]
    assert len(set(ended.values())) > 2, "some are pruned, at several rungs"
    assert len(ended) < 60


def test_who_is_as_good_as_the_best_of_the_rest_goes_on() -> None:
    assert asha.goes_on(0.1, [], 2)
    assert asha.goes_on(0.5, [0.1, 0.5], 2)
    assert not asha.goes_on(0.2, [0.1, 0.5], 2)
    assert asha.goes_on(0.3, [0.1, 0.3, 0.5], 2)
    assert not asha.goes_on(float("-inf"), [0.0], 2)
