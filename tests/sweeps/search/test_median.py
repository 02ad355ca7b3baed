"""Our median rule is the one that Ray Tune's own scheduler has, from rows and over crashes."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import MedianStoppingRule, TrialScheduler

from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from sweeps.home import HOME_VARIABLE, Home
from sweeps.search import median
from tests.sweeps.database.small_sweep import PLAN, SWEEP
from tests.sweeps.search.virtual_sweep import EVERY, REPORTS, VirtualSweep, rung_table

# Sums of a few of these are exact, so that a mean is the same in whatever order it is taken.
UTILITIES = st.integers(0, 64).map(lambda n: n / 64)


class Rays:
    """Ray's own scheduler, told of reports one by one."""

    def __init__(self, grace_period: int, min_samples_required: int) -> None:
        self._rule = MedianStoppingRule(
            time_attr="step",
            metric="m",
            mode="max",
            grace_period=grace_period,
            min_samples_required=min_samples_required,
        )
        self._trials: dict[int, Any] = {}
        self.stopped: list[tuple[int, int]] = []

    def goes_on(self, number: int, step: int, utility: float) -> bool:
        # It keeps results by the trial itself.
        trial = self._trials.setdefault(number, _Trial(number))
        nobody_waits: Any = SimpleNamespace(get_live_trials=list)
        result = {"step": step, "m": utility}
        if step == PLAN:
            self._rule.on_trial_complete(nobody_waits, trial, result)
            return True
        stays = self._rule.on_trial_result(nobody_waits, trial, result) == TrialScheduler.CONTINUE
        if not stays:
            self.stopped.append((number, step))
        return stays


class _Trial:
    def __init__(self, number: int) -> None:
        self.trial_id = str(number)


@given(st.data(), st.integers(1, 40), st.integers(1, 4))
def test_the_same_trials_are_pruned_at_the_same_reports(
    data: st.DataObject, grace_period: int, fewest: int
) -> None:
    rays = Rays(grace_period, fewest)
    curves: dict[int, list[tuple[int, float]]] = {number: [] for number in range(5)}
    alive = [*curves]
    for _ in range(data.draw(st.integers(1, 40))):
        if not alive:
            break
        number = data.draw(st.sampled_from(alive))
        step = EVERY * (len(curves[number]) + 1)
        utility = data.draw(UTILITIES)
        curves[number].append((step, utility))
        theirs = rays.goes_on(number, step, utility)
        scopes = [
            [value for at, value in curve if grace_period <= at <= step]
            for other, curve in curves.items()
            if other != number and curve and curve[-1][0] >= step
        ]
        means = [sum(scope) / len(scope) for scope in scopes if scope]
        best = max(value for _, value in curves[number])
        assert (step < grace_period or median.goes_on(best, means, fewest)) is theirs
        if not theirs:
            alive.remove(number)


def test_who_is_as_good_as_the_median_goes_on() -> None:
    assert median.goes_on(0.5, [0.1, 0.5, 0.9], 3)
    assert not median.goes_on(0.49, [0.1, 0.5, 0.9], 3)
    assert median.goes_on(0.0, [0.5, 0.9], 3), "too few to compare with"
    assert not median.goes_on(float("-inf"), [0.0], 1)


def a_virtual_sweep(folder: Path, seed: int, **changes: Any) -> VirtualSweep:
    rng = random.Random(seed)
    number = 9
    curves = [
        [
            min(64, rng.randrange(8) + rng.randrange(1, 8) * report) / 64
            for report in range(REPORTS)
        ]
        for _ in range(number)
    ]
    return VirtualSweep(
        home=Home.from_environment({HOME_VARIABLE: str(folder)}),
        scheduler={
            "name": "median_stopping_rule",
            "grace_period": 15,
            "min_samples_required": 2,
        },
        curves=curves,
        paces=[rng.uniform(0.5, 2.0) for _ in range(number)],
        workers=3,
        **changes,
    )


@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_is_pruned_as_ray_would_whatever_crashes(tmp_path: Path, seed: int) -> None:
    rays = Rays(grace_period=15, min_samples_required=2)
    calm = a_virtual_sweep(tmp_path / "calm", seed, on_report=rays.goes_on)
    events = calm.run()
    store = open_store(calm.home)
    table = rung_table(store)
    pruned = {(row.number, row.step) for row in table if not row.goes_on}
    assert pruned == set(rays.stopped)
    assert 2 <= len(pruned) < 9
    states = {row.number: row.state for row in store.trials(SWEEP)}
    stopped = {number for number, _ in rays.stopped}
    for number, state in states.items():
        assert state == (TrialState.PRUNED if number in stopped else TrialState.COMPLETED)
    rough = a_virtual_sweep(tmp_path / "rough", seed)
    assert rough.run(crash_at=range(2, 1000, 7)) == events
    again = open_store(rough.home)
    assert rung_table(again) == table
    assert {row.number: row.state for row in again.trials(SWEEP)} == states
    for each in (store, again):
        assert each.ledger.verify().ok
        each.ledger.close()
