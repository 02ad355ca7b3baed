"""HyperBand goes on with the trials that Algorithm 1 of Li et al. 2018 does, over any crash."""

import dataclasses
import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray.tune.schedulers import HyperBandScheduler

from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from sweeps.home import HOME_VARIABLE, Home
from sweeps.search import hyperband
from tests.sweeps.database.small_sweep import PLAN, SWEEP
from tests.sweeps.search.virtual_sweep import EVERY, REPORTS, Event, VirtualSweep, rung_table

FACTORS = st.integers(2, 5)


# -- the brackets ----------------------------------------------------------------------------


@given(FACTORS, st.integers(0, 6))
def test_the_brackets_are_rays_in_the_papers_order(factor: int, halvings: int) -> None:
    most = factor**halvings
    ray: Any = HyperBandScheduler(metric="m", mode="max", max_t=most, reduction_factor=factor)
    ours = hyperband.one_round(1, most, factor)
    assert len(ours) == ray._s_max_1
    for s, bracket in enumerate(reversed(ours)):
        assert len(bracket.numbers) == ray._get_n0(s)
        assert bracket.rungs == [factor**left for left in range(halvings - s, halvings)]


@given(st.integers(1, 60), st.integers(0, 5000), FACTORS, st.integers(0, 5000))
def test_every_trial_has_one_bracket(grace: int, more: int, factor: int, number: int) -> None:
    most = grace + more
    brackets = hyperband.one_round(grace, most, factor)
    bracket = hyperband.bracket_of(number, brackets)
    assert number in bracket.numbers
    assert all(hyperband.bracket_of(each, brackets) == bracket for each in bracket.numbers)
    before = bracket.numbers.start - 1
    assert before < 0 or hyperband.bracket_of(before, brackets).numbers.stop - 1 == before
    # Who reports every `grace` steps reports between any two rungs, and before its end.
    ends = [*bracket.rungs, most]
    assert ends[0] >= grace
    assert all(high - low >= grace for low, high in itertools.pairwise(ends))
    # One is left that runs to its end, of a full bracket, and not more than one round has.
    left = len(bracket.numbers)
    for _ in bracket.rungs:
        left = max(1, left // factor)
    assert 1 <= left <= len(brackets)


@dataclasses.dataclass(frozen=True)
class Rays:
    """A trial, to Ray."""

    number: int


@pytest.mark.parametrize(("factor", "s"), [(2, 1), (2, 4), (3, 1), (3, 3), (4, 2), (5, 2)])
@given(data=st.data())
def test_a_bracket_is_halved_as_ray_does(data: st.DataObject, factor: int, s: int) -> None:
    """Where nothing is rounded: a bracket of ``factor ** s`` trials."""
    (bracket, *_) = hyperband.one_round(1, factor**s, factor)
    ray: Any = HyperBandScheduler(metric="m", mode="max", max_t=factor**s, reduction_factor=factor)
    theirs = ray._create_bracket(s)
    trials = [Rays(number) for number in bracket.numbers]
    for trial in trials:
        theirs.add_trial(trial)
    for rung in bracket.rungs:
        drawn = st.permutations(range(len(trials)))
        utilities = [float(each) for each in data.draw(drawn)]
        assert theirs._cumul_r == rung
        for trial, utility in zip(trials, utilities, strict=True):
            theirs.update_trial_stats(trial, {"training_iteration": rung, "m": utility})
        good, bad = theirs.successive_halving("m", 1.0)
        places = hyperband.best(utilities, factor)
        assert {trials[place].number for place in places} == {trial.number for trial in good}
        for trial in bad:
            theirs.cleanup_trial(trial)
        trials = [trial for trial in trials if trial in good]
    assert len(trials) == 1


@given(st.lists(st.integers(0, 5).map(float) | st.just(-math.inf), max_size=30), FACTORS)
def test_the_best_of_a_rung(utilities: list[float], factor: int) -> None:
    places = hyperband.best(utilities, factor)
    finite = [utility for utility in utilities if utility > -math.inf]
    assert len(places) == min(len(finite), max(1, len(utilities) // factor))
    chosen = [utilities[place] for place in places]
    assert chosen == sorted(finite, reverse=True)[: len(places)]
    assert all(a < b for a, b in itertools.pairwise(places) if utilities[a] == utilities[b])


# -- whole sweeps ----------------------------------------------------------------------------


def algorithm_1(sweep: VirtualSweep, factor: int) -> dict[int, int]:
    """The paper's pseudocode: the last step that each trial reports.

    Where a bracket is not full, of those that are there one in ``factor`` goes on, at least one.
    """
    s_max = math.floor(math.log(PLAN / EVERY, factor))
    ends: dict[int, int] = {}
    first = 0
    for s in itertools.cycle(range(s_max, -1, -1)):
        n = math.ceil((s_max + 1) / (s + 1) * factor**s)
        there = [*range(first, min(first + n, len(sweep.curves)))]
        is_full = len(there) == n
        first += n
        for i in range(s + 1):
            r_i = PLAN if i == s else int(PLAN * factor ** (i - s))
            report = -(-r_i // EVERY)
            ends |= dict.fromkeys(there, report * EVERY)
            there.sort(key=lambda trial, at=report: -sweep.curves[trial][at - 1])
            if is_full:
                assert len(there) == n // factor**i
            there = there[: max(1, len(there) // factor)]
            there.sort()
        if first >= len(sweep.curves):
            return ends
    raise AssertionError


def a_virtual_sweep(folder: Path, seed: int, factor: int, trials: int, **more: Any) -> Any:
    """Curves that cross, some of them equal; workers whose reports may come at one time."""
    rng = random.Random(seed)
    return VirtualSweep(
        home=Home.from_environment({HOME_VARIABLE: str(folder)}),
        scheduler={"name": "hyperband", "reduction_factor": factor},
        curves=[[rng.randrange(16) / 16 for _ in range(REPORTS)] for _ in range(trials)],
        paces=[rng.randrange(1, 6) for _ in range(trials)],
        workers=3,
        **more,
    )


def reports_of(events: list[Event]) -> list[tuple[float, int, int]]:
    return [(each.time, each.number, each.step) for each in events if each.what == "reported"]


@pytest.mark.parametrize(("seed", "factor", "trials"), [(0, 3, 20), (1, 2, 14)])
def test_the_right_trials_go_on_whatever_crashes(
    tmp_path: Path, seed: int, factor: int, trials: int
) -> None:
    calm = a_virtual_sweep(tmp_path / "calm", seed, factor, trials)
    events = calm.run()
    ends = algorithm_1(calm, factor)
    assert {each.number: each.step for each in events} == ends
    assert len(set(ends.values())) > 2, "some are pruned, at several rungs"
    reported = reports_of(events)
    assert len({each[1:] for each in reported}) == len(reported), "each step once"
    store = open_store(calm.home)
    rows = store.trials(SWEEP)
    for row in rows:
        last = ends[row.number]
        assert row.state == (TrialState.COMPLETED if last == PLAN else TrialState.PRUNED)
        assert row.charged_iterations == last
        assert store.ledger.reservation(row.trial_id).state == "closed"
    reasons = {row.reason for row in rows if row.state == TrialState.PRUNED}
    assert all("of its bracket that came to step" in reason for reason in reasons)
    # Its driver dies again and again, with one report that it has not seen.
    rough = a_virtual_sweep(tmp_path / "rough", seed, factor, trials)
    # (Who comes last of its bracket and goes on is then taken up by the one that comes back.)
    assert reports_of(rough.run(crash_at=range(2, 1000, 3))) == reported
    again = open_store(rough.home)
    assert rung_table(again) == rung_table(store)
    assert [row.state for row in again.trials(SWEEP)] == [row.state for row in rows]
    for each in (store, again):
        assert each.ledger.verify().ok
        each.ledger.close()
    # What is proposed while trials run fills the brackets as what is listed does.
    proposed = a_virtual_sweep(tmp_path / "proposed", seed, factor, trials, listed=2)
    assert {each.number: each.step for each in proposed.run(crash_at=(5, 9))} == ends


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data(), st.integers(0, 1000), st.integers(2, 4), st.integers(1, 14))
def test_every_sweep_ends_whoever_is_missing(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    seed: int,
    factor: int,
    trials: int,
) -> None:
    some = st.sets(st.integers(0, trials - 1), max_size=trials)
    refused = data.draw(some)
    diverging = data.draw(some) - refused
    diverge = {number: EVERY * data.draw(st.integers(1, REPORTS - 1)) for number in diverging}
    sweep = a_virtual_sweep(
        tmp_path_factory.mktemp("sweep"),
        seed,
        factor,
        trials,
        refused=refused,
        diverge=diverge,
        listed=data.draw(st.none() | st.integers(0, trials)),
    )
    sweep.workers = data.draw(st.integers(1, 5))
    sweep.run(crash_at=data.draw(st.sets(st.integers(1, 40), max_size=3)))
    store = open_store(sweep.home)
    states = {row.number: row.state for row in store.trials(SWEEP)}
    assert [*states] == [*range(trials)]
    assert {number for number, state in states.items() if state == "REJECTED"} == refused
    assert set(states.values()) <= {"REJECTED", "COMPLETED", "PRUNED", "DIVERGED"}
    brackets = hyperband.one_round(EVERY, PLAN, factor)
    came: dict[tuple[range, int], list[bool]] = {}
    for row in rung_table(store):
        bracket = hyperband.bracket_of(row.number, brackets)
        assert row.rung in bracket.rungs
        came.setdefault((bracket.numbers, row.rung), []).append(row.goes_on)
    for there in came.values():
        assert sum(there) == max(1, len(there) // factor)
    store.ledger.close()
