"""A sweep on a virtual clock: made-up workers run recorded curves, and only the rows are real.

Each worker takes one trial at a time from the queue that the driver uses, and reports as much
later as the trial's pace says. Nothing sleeps: the next report is the one whose time comes first.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa

from sweeps.database.admitting import NewTrial
from sweeps.database.attempts import Attempt
from sweeps.database.states import TrialState
from sweeps.database.store import NewSweep, Store, open_store
from sweeps.database.tables import reading, rungs, trials
from sweeps.home import Home
from sweeps.proposals import Proposals
from sweeps.schedule import Schedule
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.trial_queue import TrialQueue
from tests.sweeps.database.small_sweep import (
    PLAN,
    SWEEP,
    a_branch,
    a_sweep,
    a_trial,
    go_to,
    row_of,
)
from tests.sweeps.spec.spec_text import GOOD_DATA

EVERY = 10
REPORTS = PLAN // EVERY
SPACE = {**GOOD_DATA["search_space"], "iterations": PLAN}


class Event(NamedTuple):
    """A trial was taken up at a step, or reported one."""

    time: float
    what: str
    number: int
    step: int


@dataclasses.dataclass
class VirtualSweep:
    """One sweep, to its end.

    Attributes:
        home: Where its database is.
        scheduler: The section of the specification.
        curves: By trial, the utility at each of `REPORTS` reports, `EVERY` steps apart.
        paces: By trial, the time from one report to the next.
        workers: How many there are.
        on_report: Told of every report before it is decided on: number, step, utility.
        diverge: By trial, the step at which it diverges.
        refused: Those that the budget refuses.
        listed: So many are there from the beginning, the rest is proposed; None for all.
        sweep: As it is submitted.
        sweep_id: Its id.
    """

    home: Home
    scheduler: Mapping[str, Any]
    curves: Sequence[Sequence[float]]
    paces: Sequence[float]
    workers: int
    on_report: Callable[[int, int, float], None] = lambda *_: None
    diverge: Mapping[int, int] = dataclasses.field(default_factory=dict[int, int])
    refused: Collection[int] = ()
    listed: int | None = None
    sweep: NewSweep = dataclasses.field(default_factory=a_sweep)
    sweep_id: str = SWEEP

    def create(self, store: Store) -> None:
        """Records the sweep, with what is listed of it."""
        listed = len(self.curves) if self.listed is None else self.listed
        store.create_sweep(self.sweep, [self.new_trial(number) for number in range(listed)])

    def spec(self, store: Store) -> SweepSpec:
        """What a driver reads."""
        policy = self.sweep.terms.policy
        accountant = {"accountant": "rdp"} if policy == "open" else {}
        privacy = {**GOOD_DATA["privacy"], "policy": policy, **accountant}
        text = {**GOOD_DATA, "search_space": SPACE, "report_every_steps": EVERY}
        return SweepSpec.model_validate({**text, "privacy": privacy, "scheduler": self.scheduler})

    def new_trial(self, number: int) -> NewTrial:
        """A trial, as admission leaves it."""
        refused = number in self.refused
        return a_trial(number, TrialState.REJECTED if refused else TrialState.ADMITTED)

    def run(self, crash_at: Collection[int] = ()) -> list[Event]:
        """Everything that happens, in order.

        Args:
            crash_at: After so many reports the driver dies with all that it knows, before it has
                seen the last one. What the workers had under way is as far with the next driver.
        """
        store = open_store(self.home)
        self.create(store)
        queue, schedule = self._driver(store)
        steps: dict[str, int] = {}
        begun_at: dict[str, int] = {}
        attempts: dict[str, Attempt] = {}
        due: dict[str, float] = {}  # when those that run report next
        before_crash: dict[str, float] = {}
        events: list[Event] = []
        now, reports = 0.0, 0
        while True:
            while len(due) < self.workers and (trial_id := queue.take()) is not None:
                number = _number(trial_id)
                begun_at[trial_id] = row_of(store, trial_id).parent_step or 0
                steps.setdefault(trial_id, begun_at[trial_id])
                if trial_id not in before_crash:
                    events.append(Event(now, "taken up", number, steps[trial_id]))
                due[trial_id] = before_crash.pop(trial_id, now + self.paces[number])
                attempts[trial_id] = store.attempts.begin(trial_id)
            before_crash.clear()
            if not due:
                if queue.is_over():
                    break
                continue
            now, number, trial_id = min((at, _number(name), name) for name, at in due.items())
            del due[trial_id]
            reports += 1
            step = steps[trial_id] = steps[trial_id] + EVERY
            utility = self.curves[number][step // EVERY - 1]
            events.append(Event(now, "reported", number, step))
            end = TrialState.COMPLETED if step == PLAN else None
            end = TrialState.DIVERGED if step == self.diverge.get(number) else end
            branch = a_branch(1, begun_at[trial_id])
            go_to(store, attempts[trial_id], step, accuracy=utility, branch=branch, end=end)
            store.attempts.checkpoint(attempts[trial_id], step, f"/nowhere/{step}")
            self.on_report(number, step, utility)
            if reports in crash_at:
                if end is None:
                    due[trial_id] = now + self.paces[number]
                before_crash, due = due, {}
                store.ledger.close()
                store = open_store(self.home)
                store.take_over(self.sweep_id, "another")
                queue, schedule = self._driver(store)
                continue
            if end is None and schedule.decide(trial_id):
                if store.attempts.is_to_wait(attempts[trial_id]):
                    store.attempts.wait(attempts[trial_id])
                else:
                    due[trial_id] = now + self.paces[number]
            if trial_id not in due:
                queue.put_down()
        assert not store.runnable(self.sweep_id)
        store.ledger.close()
        return events

    def _driver(self, store: Store) -> tuple[TrialQueue, Schedule]:
        spec = self.spec(store)
        schedule = Schedule(spec, store, self.home)
        # As much of it as a queue asks for.
        proposals = cast("Proposals", _Proposed(self, store))
        queue = TrialQueue(
            spec,
            self.sweep_id,
            store,
            waiting=store.runnable(self.sweep_id),
            schedule=schedule,
            proposals=None if self.listed is None else proposals,
            limit=1000,
        )
        return queue, schedule


class _Proposed:
    """Proposes the trials that were not listed, in order."""

    def __init__(self, sweep: VirtualSweep, store: Store) -> None:
        self._sweep, self._store = sweep, store

    def end(self) -> str | None:
        return "" if self._next == len(self._sweep.curves) else None

    def propose(self) -> list[str]:
        if self.end() is not None:
            return []
        new = self._sweep.new_trial(self._next)
        return self._store.add_trials(SWEEP, [new], budget=None, team="")

    @property
    def _next(self) -> int:
        return len(self._store.trials(SWEEP))


def _number(trial_id: str) -> int:
    return int(trial_id.rpartition("-")[2])


class RungRow(NamedTuple):
    """A decision."""

    number: int
    rung: int
    step: int
    utility: float | None
    goes_on: bool


def rung_table(store: Store) -> list[RungRow]:
    """What was decided in a sweep, in the order in which it was."""
    columns = (trials.c.number, rungs.c.rung, rungs.c.step, rungs.c.utility, rungs.c.goes_on)
    query = sa.select(*columns).join(trials, trials.c.trial_id == rungs.c.trial_id)
    with reading(store.ledger.engine) as connection:
        return [RungRow(*row) for row in connection.execute(query.order_by(rungs.c.decided_at))]
