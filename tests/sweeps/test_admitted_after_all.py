"""Trials that the budget refused run once others have given steps back: which, when, how many."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from accounting import Mechanism
from accounting.renyi import epsilon_of_rdp, step_rdp
from sweeps.database.states import TrialState, Wish
from sweeps.database.store import Store, open_store
from sweeps.driver import is_anything_left
from sweeps.home import HOME_VARIABLE, Home
from sweeps.search import asha, tpe
from sweeps.trial_queue import TrialQueue
from tests.sweeps.database.small_sweep import PLAN, SWEEP, sweep_holding
from tests.sweeps.search.virtual_sweep import EVERY, REPORTS, Event, VirtualSweep
from tests.sweeps.test_proposals import SPEC, branch, queue_of, ran, submitted

FACTOR = 2


def a_virtual_sweep(
    folder: Path, seed: int, *, trials: int = 14, holds: float = 4.25, promotion: bool = False
) -> VirtualSweep:
    """Trials of which the budget admits a few at first."""
    rng = random.Random(seed)
    return VirtualSweep(
        home=Home.from_environment({HOME_VARIABLE: str(folder)}),
        scheduler={
            "name": "async_hyperband",
            "grace_period": EVERY,
            "reduction_factor": FACTOR,
            "promotion": promotion,
        },
        curves=[[rng.random() for _ in range(REPORTS)] for _ in range(trials)],
        paces=[rng.randrange(1, 6) for _ in range(trials)],
        workers=3,
        sweep=sweep_holding(holds),
    )


def reference(sweep: VirtualSweep, holds: float) -> list[Event]:
    """The same in memory, with a budget that counts steps."""
    left = round(holds * PLAN)
    admitted: list[int] = []
    refused: list[int] = []
    for number in range(len(sweep.curves)):
        (admitted if left >= PLAN else refused).append(number)
        left -= PLAN * (left >= PLAN)
    steps = [0] * len(sweep.curves)
    rungs: dict[int, list[float]] = {rung: [] for rung in asha.milestones(EVERY, PLAN, FACTOR)}
    due: dict[int, float] = {}
    events: list[Event] = []
    now = 0.0
    while True:
        while len(due) < sweep.workers and (admitted or (refused and left >= PLAN)):
            if admitted:
                number = admitted.pop(0)
            else:
                number = refused.pop(0)
                left -= PLAN
            events.append(Event(now, "taken up", number, 0))
            due[number] = now + sweep.paces[number]
        if not due:
            return events
        now, number = min((at, number) for number, at in due.items())
        del due[number]
        step = steps[number] = steps[number] + EVERY
        events.append(Event(now, "reported", number, step))
        utility = sweep.curves[number][step // EVERY - 1]
        goes_on = step < PLAN
        if goes_on and step in rungs:
            goes_on = asha.goes_on(utility, rungs[step], FACTOR)
            rungs[step].append(utility)
        if goes_on:
            due[number] = now + sweep.paces[number]
        else:
            left += PLAN - step


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_of_pruned_trials_admit_refused_ones_whatever_crashes(
    tmp_path: Path, seed: int
) -> None:
    calm = a_virtual_sweep(tmp_path / "calm", seed)
    events = calm.run()
    assert events == reference(calm, 4.25)
    begun = {event.number for event in events}
    assert len(begun) > 4, "others gave back what they had not run"
    store = open_store(calm.home)
    for row in store.trials(SWEEP):
        assert (row.state == TrialState.REJECTED) == (row.number not in begun)
        assert bool(row.reason) == (row.state != TrialState.COMPLETED)
    level = store.ledger.status(SWEEP).level
    assert 0 < level.spent <= level.limit
    assert level.reserved == 0
    assert store.refused.fitting(SWEEP) is None, "nothing that would fit was left out"
    kinds = [entry.kind for entry, _ in store.ledger.entries()]
    assert kinds.count("reserved") == 4
    assert kinds.count("reserved_later") == len(begun) - 4
    assert "refused_again" not in kinds, "nobody asks in vain"
    rough = a_virtual_sweep(tmp_path / "rough", seed)
    assert rough.run(crash_at=range(2, 1000, 3)) == events
    again = open_store(rough.home)
    for each in (store, again):
        assert each.ledger.verify().ok
        each.ledger.close()


def test_those_that_wait_at_rungs_make_room_when_nothing_else_does(tmp_path: Path) -> None:
    """Each that waits keeps a whole trial's steps; the budget holds four."""
    sweep = a_virtual_sweep(tmp_path, 3, holds=4.0, promotion=True)
    events = sweep.run()
    store = open_store(sweep.home)
    assert len({event.number for event in events}) > 8
    assert store.refused.fitting(SWEEP) is None
    assert not store.rungs.waiting(SWEEP) or not store.refused.is_any(SWEEP)
    pruned = [row for row in store.trials(SWEEP) if row.state == TrialState.PRUNED]
    assert pruned
    assert all("was never among the best" in row.reason for row in pruned)
    assert store.ledger.verify().ok
    store.ledger.close()


@pytest.mark.parametrize("crash_at", [(), range(2, 1000, 3)])
def test_brackets_are_halved_without_those_that_come_later(
    tmp_path: Path, crash_at: Sequence[int]
) -> None:
    sweep = a_virtual_sweep(tmp_path, 4)
    sweep.scheduler = {"name": "hyperband", "grace_period": EVERY, "reduction_factor": FACTOR}
    events = sweep.run(crash_at)
    assert len({event.number for event in events}) > 4
    store = open_store(sweep.home)
    assert not store.rungs.waiting(SWEEP)
    assert store.refused.fitting(SWEEP) is None
    assert store.ledger.verify().ok
    store.ledger.close()


def test_to_wait_in_vain_is_not_to_have_anything_left(tmp_path: Path) -> None:
    sweep = a_virtual_sweep(tmp_path, 3, trials=3, holds=9.0, promotion=True)
    sweep.run()
    store = open_store(sweep.home)
    spec, home = sweep.spec(store), sweep.home
    assert store.rungs.waiting(SWEEP)
    assert not is_anything_left(spec, SWEEP, store, home), "no Ray need be started for them"
    store.ledger.close()


# -- a search that learns --------------------------------------------------------------------

OPEN: dict[str, Any] = {"privacy": {**SPEC["privacy"], "policy": "open"}}
NOISE = 1.0


def learning(store_holds: float, **search: Any):
    """A search whose budget holds so many trials of 20 steps."""
    space = {**SPEC["search_space"], "noise_multiplier": NOISE}
    spec, sweep_id, store, home = submitted(
        **OPEN, search_space=space, search={**SPEC["search"], "n_startup_trials": 1, **search}
    )
    first = f"{sweep_id}-0000"
    one = store.ledger.reservation(first).verdict.requested
    holds = store.ledger.budget(sweep_id).terms.rdp_limit / one
    # Somebody else's trial takes the rest.
    mechanism = reserved(store, first)
    rest = round((holds - store_holds) * mechanism.iterations)
    store.ledger.reserve(sweep_id, mechanism.after(rest), request_id="rest")
    return spec, sweep_id, store, home


def reserved(store: Store, trial_id: str) -> Mechanism:
    mechanism = store.ledger.reservation(trial_id).mechanism
    assert isinstance(mechanism, Mechanism)
    return mechanism


def taken(queue: TrialQueue) -> str:
    trial_id = queue.take()
    assert trial_id is not None
    return trial_id


def pruned_at(store: Store, trial_id: str, step: int) -> None:
    attempt = store.attempts.begin(trial_id)
    store.attempts.charge(attempt, branch(1), step)
    store.end_trial(trial_id, TrialState.PRUNED, "why")


def test_a_search_that_was_refused_waits_for_steps_while_trials_run():
    spec, sweep_id, store, home = learning(1.5, num_samples=3, max_refused=2)
    queue = queue_of(spec, sweep_id, store, home)
    first = taken(queue)
    assert first == f"{sweep_id}-0000"
    assert [queue.take() for _ in range(5)] == [None] * 5
    assert [row.state for row in store.trials(sweep_id)] == ["ADMITTED", *["REJECTED"] * 2], (
        "two refusals are enough"
    )
    assert not queue.is_over(), "the first may give steps back"
    pruned_at(store, first, 5)
    queue.put_down()
    assert not queue.is_over()
    assert queue.take() == f"{sweep_id}-0001", "the budget refused it first"
    # Its last two were not both refused any more, so it goes on, until they are again.
    assert [queue.take() for _ in range(5)] == [None] * 5
    states = [row.state for row in store.trials(sweep_id)]
    assert states.count("REJECTED") == 2
    ran(store, f"{sweep_id}-0001", 0.5)
    queue.put_down()
    assert queue.is_over()
    assert "the search has ended" in queue.why_over()
    assert not is_anything_left(spec, sweep_id, store, home)
    # Others of the same budget give back: whoever resumes the sweep goes on with it.
    store.ledger.settle("rest")
    assert is_anything_left(spec, sweep_id, store, home)
    assert queue_of(spec, sweep_id, store, home).take() == f"{sweep_id}-0002"


def test_no_more_run_than_the_search_is_to_run():
    spec, sweep_id, store, home = learning(2.25, num_samples=2, max_refused=3)
    queue = queue_of(spec, sweep_id, store, home)
    first = taken(queue)
    store.ledger.reserve(sweep_id, reserved(store, first), request_id="other")
    assert queue.take() is None
    assert [row.state for row in store.trials(sweep_id)] == ["ADMITTED", "REJECTED"]
    store.ledger.settle("other")
    assert queue.take() == f"{sweep_id}-0001"
    store.ledger.settle("rest")
    queue = queue_of(spec, sweep_id, store, home)
    assert queue.take() is not None
    assert queue.take() is not None
    assert queue.is_over(), "both run, and there is room for more"
    assert len(store.trials(sweep_id)) == 2


def test_once_the_sweep_is_told_to_stop_nothing_is_asked_again():
    spec, sweep_id, store, home = learning(1.5, num_samples=9, max_refused=1)
    queue = queue_of(spec, sweep_id, store, home)
    first = taken(queue)
    assert queue.take() is None
    pruned_at(store, first, 5)
    store.set_wish(sweep_id, Wish.STOP)
    assert queue.take() is None
    assert queue.is_over()
    store.set_wish(sweep_id, Wish.NONE)
    stopped = spec.model_copy(update={"stop": spec.stop.model_copy(update={"trials": 1})})
    queue = queue_of(stopped, sweep_id, store, home)
    assert queue.take() is None
    assert queue.is_over()
    assert queue.why_over().startswith("stop.trials")
    assert [row.state for row in store.trials(sweep_id)] == ["PRUNED", "REJECTED"]


def test_a_search_learns_by_how_much_a_proposal_was_too_dear_for_what_is_left(monkeypatch):
    spec, sweep_id, store, home = learning(1.5, num_samples=9, max_refused=9)
    queue = queue_of(spec, sweep_id, store, home)
    first = taken(queue)
    assert queue.take() is None
    told = []
    monkeypatch.setattr(
        tpe, "propose", lambda _spec, tried, _number: told.append(tried) or tried[0].values
    )
    assert queue.take() is None
    (_, refused), terms = told[0], store.ledger.budget(sweep_id).terms
    mechanism = reserved(store, first)
    # Half a trial is free, so the budget would have had to be half a trial larger.
    needed = terms.rdp_limit + 0.5 * 20 * step_rdp(mechanism.step, terms.order)
    larger = epsilon_of_rdp(needed, terms.delta, terms.order) / terms.epsilon - 1
    assert refused.outcome == "refused"
    assert refused.excess == pytest.approx(larger, rel=0.1)
    assert 0 < refused.excess < 1
    # What is left counts as it is now, not as it was then.
    store.ledger.reserve(sweep_id, mechanism.after(8), request_id="more")
    assert queue.take() is None
    assert told[1][1].excess > refused.excess
