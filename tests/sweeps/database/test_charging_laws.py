"""The laws of charging hold in any order of what workers, drivers and people do."""

import dataclasses
import tempfile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sweeps.database.attempts import MAX_LOST, Attempt
from sweeps.database.states import TrialState
from sweeps.database.store import open_store
from sweeps.errors import FencedError, OverspentError, StoreError
from sweeps.home import HOME_VARIABLE, Home
from tests.sweeps.database.small_sweep import METRICS, PLAN, TRIAL, a_branch, a_sweep, a_trial
from trainer.mechanism.branch import Branch


@dataclasses.dataclass
class Held:
    """An attempt as the model knows it."""

    attempt: Attempt
    charged_before: int
    end: str | None = None


class Charging(RuleBasedStateMachine):
    """Attempts begin, charge, report and end in any order, beside a model of what they may."""

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory()
        home = Home.from_environment({HOME_VARIABLE: self._directory.name})
        self.store = open_store(home)
        self.store.create_sweep(a_sweep(), [a_trial(0)])
        self.held: list[Held] = []
        self.branches: dict[Branch, int] = {}  # with the step that each was charged for
        self.reported: set[tuple[int, int]] = set()
        self.ended = False

    def teardown(self) -> None:
        self.store.ledger.close()
        self._directory.cleanup()

    @property
    def total(self) -> int:
        return sum(step - branch.start_step for branch, step in self.branches.items())

    @property
    def furthest(self) -> int:
        return max(self.branches.values(), default=0)

    def lost(self) -> int:
        """How many of the latest attempts were lost for nothing, if another begins now."""
        number = 0
        for held in reversed(self.held):
            if held.charged_before != self.total:
                break
            number += held.end in (None, "lost")
        return number

    def may_write(self, held: Held) -> bool:
        return not self.ended and held is self.held[-1] and held.end is None

    @precondition(lambda self: not self.ended)
    @rule()
    def begin(self) -> None:
        if self.lost() >= MAX_LOST:
            with pytest.raises(StoreError, match="died over it"):
                self.store.attempts.begin(TRIAL)
            self.ended = True
            return
        if self.held and self.held[-1].end is None:
            self.held[-1].end = "lost"
        self.held.append(Held(self.store.attempts.begin(TRIAL), self.total))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 3), lineage=st.integers(0, 2), step=st.integers(0, PLAN + 5))
    def charge(self, which: int, lineage: int, step: int) -> None:
        """The newest attempt for 0, an older one for more; likewise with branches."""
        if self.branches:
            known = list(self.branches)
            self._charge(which, known[-1 - lineage % len(known)], step)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 3), start=st.integers(0, PLAN), more=st.integers(0, 30))
    def charge_new_branch(self, which: int, start: int, more: int) -> None:
        self._charge(which, a_branch(len(self.branches) + 1, start), start + more)

    def _charge(self, which: int, branch: Branch, step: int) -> None:
        held = self.held[-1 - which % len(self.held)]
        reached = max(step, self.branches.get(branch, branch.start_step))
        gained = reached - self.branches.get(branch, branch.start_step)
        ask = lambda: self.store.attempts.charge(held.attempt, branch, step)
        if not self.may_write(held):
            with pytest.raises(FencedError):
                ask()
        elif branch not in self.branches and branch.start_step > self.furthest:
            with pytest.raises(StoreError, match="cannot begin at step"):
                ask()
        elif self.total + gained > PLAN:
            with pytest.raises(OverspentError):
                ask()
        else:
            expected = self.total + gained
            assert ask() == expected
            self.branches[branch] = reached

    @precondition(lambda self: self.held and self.branches)
    @rule(which=st.integers(0, 1), lineage=st.integers(0, 1), step=st.integers(0, PLAN))
    def report(self, which: int, lineage: int, step: int) -> None:
        held = self.held[-1 - which % len(self.held)]
        number = len(self.branches) - lineage % len(self.branches)
        branch = list(self.branches)[number - 1]
        ask = lambda: self.store.attempts.report(held.attempt, branch.branch_id, step, METRICS)
        if not self.may_write(held) or step > self.branches[branch]:
            with pytest.raises(StoreError):
                ask()
        else:
            ask()
            self.reported.add((number, step))

    @precondition(lambda self: self.held and not self.ended)
    @rule(which=st.integers(0, 1))
    def pause(self, which: int) -> None:
        held = self.held[-1 - which % len(self.held)]
        if self.may_write(held):
            self.store.attempts.pause(held.attempt)
            held.end = "paused"
        else:
            with pytest.raises(FencedError):
                self.store.attempts.pause(held.attempt)

    @rule()
    def take_over(self) -> None:
        self.store.take_over("s-1", "host:1")
        if self.held and self.held[-1].end is None and not self.ended:
            self.held[-1].end = "interrupted"

    @precondition(lambda self: not self.ended)
    @rule(odds=st.integers(0, 9))
    def end(self, odds: int) -> None:
        if odds == 0:
            assert self.store.end_trial(TRIAL, TrialState.CANCELLED)
            self.ended = True

    @invariant()
    def the_rows_are_the_model(self) -> None:
        (row,) = self.store.trials("s-1")
        assert row.charged_iterations == self.total <= PLAN
        assert self.store.ledger.reservation(TRIAL).charged == self.total
        reports = self.store.reports("s-1")
        assert {(report.branch, report.step) for report in reports} == self.reported
        told = [each for each in self.store.outbox.undelivered() if each.kind == "metrics"]
        assert len(told) == len(self.reported)


@pytest.mark.slow
def test_charges_keep_their_laws_in_any_order() -> None:
    run_state_machine_as_test(
        Charging,
        settings=settings(
            derandomize=True,
            database=None,
            deadline=None,
            max_examples=25,
            stateful_step_count=25,
        ),
    )
