"""Promotion continues the trials that Algorithm 2 of Li et al. 2020 does, over any crash."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from sweeps.home import HOME_VARIABLE, Home
from sweeps.search import asha
from tests.sweeps.database.small_sweep import PLAN, SWEEP
from tests.sweeps.search.virtual_sweep import EVERY, REPORTS, VirtualSweep, rung_table


class Algorithm2:
    """The paper's pseudocode, in memory: which job a worker that is free gets.

    A job brings a trial to the end that its rung stands for; the last one is a whole trial.
    """

    def __init__(self, grace_period: int, factor: int, trials: int) -> None:
        self.factor = factor
        self.ends: list[int] = []
        while grace_period * factor ** len(self.ends) < PLAN:
            self.ends.append(grace_period * factor ** len(self.ends))
        self.ends.append(PLAN)
        self.rungs: list[list[tuple[float, int]]] = [[] for _ in self.ends]
        self.promoted: list[set[int]] = [set() for _ in self.ends]
        self.new = list(range(trials))

    def get_job(self) -> tuple[int, int] | None:
        """A trial and the rung to bring it to."""
        for k in reversed(range(len(self.ends) - 1)):
            rung = self.rungs[k]
            # sorted() keeps those in order that are equal.
            ranked = [trial for _, trial in sorted(rung, key=lambda each: -each[0])]
            candidates = ranked[: len(rung) // self.factor]
            promotable = [trial for trial in candidates if trial not in self.promoted[k]]
            if promotable:
                self.promoted[k].add(promotable[0])
                return promotable[0], k + 1
        return (self.new.pop(0), 0) if self.new else None


def reference(sweep: VirtualSweep, grace_period: int, factor: int) -> list[tuple[int, int, int]]:
    """What the paper's workers report, on the same clock: time, trial, step."""
    algorithm = Algorithm2(grace_period, factor, len(sweep.curves))
    steps = [0] * len(sweep.curves)
    running: dict[int, tuple[int, int]] = {}  # when it reports next, and its rung
    reports: list[tuple[int, int, int]] = []
    now = 0
    while True:
        while len(running) < sweep.workers and (job := algorithm.get_job()) is not None:
            trial, rung = job
            running[trial] = (now + int(sweep.paces[trial]), rung)
        if not running:
            return reports
        now, trial = min((at, trial) for trial, (at, _) in running.items())
        _, rung = running.pop(trial)
        steps[trial] += EVERY
        reports.append((now, trial, steps[trial]))
        if steps[trial] < algorithm.ends[rung]:
            running[trial] = (now + int(sweep.paces[trial]), rung)
        else:
            utility = sweep.curves[trial][steps[trial] // EVERY - 1]
            algorithm.rungs[rung].append((utility, trial))


def a_virtual_sweep(folder: Path, seed: int, factor: int, trials: int) -> VirtualSweep:
    """Curves that cross, some of them equal; workers whose reports may come at one time."""
    rng = random.Random(seed)
    return VirtualSweep(
        home=Home.from_environment({HOME_VARIABLE: str(folder)}),
        scheduler={
            "name": "async_hyperband",
            "grace_period": EVERY,
            "reduction_factor": factor,
            "promotion": True,
        },
        curves=[[rng.randrange(16) / 16 for _ in range(REPORTS)] for _ in range(trials)],
        paces=[rng.randrange(1, 6) for _ in range(trials)],
        workers=3,
    )


@pytest.mark.parametrize(("seed", "factor", "trials"), [(0, 2, 9), (1, 3, 12), (2, 2, 8)])
def test_the_right_trials_go_on_whatever_crashes(
    tmp_path: Path, seed: int, factor: int, trials: int
) -> None:
    calm = a_virtual_sweep(tmp_path / "calm", seed, factor, trials)
    events = calm.run()
    ours = [(each.time, each.number, each.step) for each in events if each.what == "reported"]
    assert ours == reference(calm, EVERY, factor)
    taken_up = [each for each in events if each.what == "taken up"]
    assert any(each.step for each in taken_up), "one waited, and was promoted later"
    # Each step once, and nobody begins where it had not waited.
    assert len({each[1:] for each in ours}) == len(ours)
    store = open_store(calm.home)
    table, rows = rung_table(store), store.trials(SWEEP)
    waits = {each.number for each in table if not each.goes_on}
    last = {each.number: each.step for each in events}
    for row in rows:
        ended = TrialState.PAUSED if row.number in waits else TrialState.COMPLETED
        assert row.state == ended
        assert row.charged_iterations == last[row.number]
    assert {row.trial_id for row in store.rungs.waiting(SWEEP)} == {
        row.trial_id for row in rows if row.number in waits
    }
    # Its driver dies again and again, with one report that it has not seen.
    rough = a_virtual_sweep(tmp_path / "rough", seed, factor, trials)
    assert rough.run(crash_at=range(2, 1000, 3)) == events
    again = open_store(rough.home)
    assert rung_table(again) == table
    assert [row.state for row in again.trials(SWEEP)] == [row.state for row in rows]
    for each in (store, again):
        assert each.ledger.verify().ok
        each.ledger.close()


@given(st.lists(st.integers(0, 5).map(float), max_size=30), st.integers(2, 5))
def test_the_best_of_a_rung(utilities: list[float], factor: int) -> None:
    places = asha.best(utilities, factor)
    assert len(places) == len(utilities) // factor
    for place, utility in enumerate(utilities):
        better = sum(
            other > utility or (other == utility and earlier < place)
            for earlier, other in enumerate(utilities)
        )
        assert (place in places) == (better < len(utilities) // factor)
    assert [utilities[place] for place in places] == sorted(
        (utilities[place] for place in places), reverse=True
    )


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(2, 5))
def test_one_that_comes_to_a_rung_makes_room_for_one_at_most(
    utilities: list[float], factor: int
) -> None:
    # So it makes no difference whether who comes goes on at once, or a worker looks from above.
    before: set[Any] = set(asha.best(utilities[:-1], factor))
    assert len(set(asha.best(utilities, factor)) - before) <= 1
