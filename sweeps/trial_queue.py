"""Which trial comes next: what is under way, promoted, listed, admitted after all, or proposed.

Steps that a trial gives back go first to those that the budget refused, in their order, then to
what a search proposes. As long as trials run they may give steps back, so a sweep with refused
ones is not over before the last has ended; those that wait at rungs keep what they have not run,
and are pruned when nothing but them and refused ones is left.
"""

import contextlib
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any

import sqlalchemy as sa

from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store
from sweeps.errors import DatabaseError
from sweeps.proposals import Proposals
from sweeps.schedule import Schedule
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.stopping import why_to_stop
from trainer.config import TrialConfig
from trainer.training.plan import shape_of


class TrialQueue:
    """Hands out the trials of a sweep one by one, or by several of one shape.

    Args:
        spec: The sweep's specification.
        sweep_id: The sweep.
        store: The driver's own.
        waiting: Rows of trials that are there already, in the order in which they start.
        schedule: Says first whether they go on, for nobody may have seen their last report.
        proposals: What comes after these; None for nothing.
        limit: How many trials to hand out at most.

    Attributes:
        stopped: Once a rule of the specification's stop section holds, which; else empty. From
            then on a trial is handed out only if it has begun, or a person asked for it.
    """

    def __init__(
        self,
        spec: SweepSpec,
        sweep_id: str,
        store: Store,
        *,
        waiting: Sequence[sa.Row[Any]],
        schedule: Schedule,
        proposals: Proposals | None,
        limit: int,
    ) -> None:
        self._spec, self._sweep_id, self._store = spec, sweep_id, store
        self._waiting = deque(waiting)
        self._schedule = schedule
        self._proposals = proposals
        self._left = limit
        self._in_hand = 0
        self.stopped = ""

    def take(self) -> str | None:
        """The next trial; None where there is none now, of which `is_over` says more."""
        if self.is_over():
            return None
        found = None
        while found is None and self._waiting and self._waiting[0].state != TrialState.ADMITTED:
            trial_id = self._waiting[0].trial_id
            found = trial_id if self._schedule.may_be_taken_up(trial_id) else None
            self._waiting.popleft()  # after that, for the database may be away
        if found is None and not self.stopped:
            more = self._more_to_come()
            found = self._schedule.promote(self._sweep_id, more_to_come=more)
        if found is None and self._waiting:
            found = self._waiting.popleft().trial_id
        elif found is None and not self.stopped:
            admitted = self._admitted_after_all()
            if not admitted and self._proposals is not None:
                # One proposal at a time: whoever asks has trials to look after meanwhile.
                admitted = self._proposals.propose()
            for trial_id in admitted:
                row = self._store.trial(trial_id)
                assert row is not None
                self._waiting.append(row)
            found = self._waiting.popleft().trial_id if self._waiting else None
        if found is not None:
            self._left -= 1
            self._in_hand += 1
        return found

    def take_pack(self, size: int, workers: int) -> list[str]:
        """The next trials of one shape, as many as are there now.

        Args:
            size: How many at most, >= 1.
            workers: Among how many those that wait are shared out, so that none is idle, >= 1.
        """
        if self._proposals is None:
            size = min(size, max(1, -(-len(self._waiting) // workers)))
        pack: list[str] = []
        shapes: set[Hashable] = set()
        while len(pack) < size:
            try:
                found = self.take()
            except Exception:
                if not pack:
                    raise
                break  # those that were taken are to run; whatever it is comes again
            if found is None:
                break
            row = self._row(found) if size > 1 else None
            if row is not None and row.trial_config is not None:
                shapes.add(shape_of(TrialConfig.from_json(row.trial_config)))
                if len(shapes) > 1:  # it comes next
                    self._waiting.appendleft(row)
                    self._left += 1
                    self._in_hand -= 1
                    break
            pack.append(found)
        return pack

    def _row(self, trial_id: str) -> sa.Row[Any] | None:
        with contextlib.suppress(DatabaseError):  # one of another shape is slow, and not wrong
            return self._store.trial(trial_id)
        return None

    def put_down(self, count: int = 1) -> None:
        """Is told when nobody works any more on some trials that were handed out."""
        self._in_hand -= count

    def is_over(self) -> bool:
        """Whether no other trial comes, for now at least."""
        row = self._store.sweep(self._sweep_id)
        if not self._left or row.wish or row.state != SweepState.RUNNING:
            return True
        return self.is_empty()

    def is_empty(self) -> bool:
        """Whether nothing is left to run, whatever state the sweep is in."""
        if not self.stopped:
            self.stopped = why_to_stop(self._spec, self._sweep_id, self._store)
        if self.stopped:
            self._waiting = deque(row for row in self._waiting if not begins_by_itself(row))
            self._proposals = None
        if self._waiting or self._more_to_come():
            return False
        return bool(self.stopped) or not (self._may_be_promoted() or self._may_be_admitted())

    def why_over(self) -> str:
        """What a person has to know of why no other trial comes; empty for nothing."""
        return self.stopped or (self._proposals and self._proposals.end()) or ""

    def _may_be_promoted(self) -> bool:
        # What others report may promote one that waits.
        return self._schedule.promotes and (
            self._in_hand > 0 or self._schedule.promotable(self._sweep_id) is not None
        )

    def _may_be_admitted(self) -> bool:
        # What others give back may admit one that was refused.
        refused, sweep_id = self._store.refused, self._sweep_id
        return self._wants_refused() and (
            self._in_hand > 0
            or refused.fitting(sweep_id) is not None
            or bool(self._store.rungs.waiting(sweep_id))
        )

    def _admitted_after_all(self) -> Sequence[str]:
        if not self._wants_refused():
            return ()
        refused, sweep_id = self._store.refused, self._sweep_id
        # What is dear to find out comes last: as long as trials run there is nothing to prune.
        if not (self._in_hand or self._more_to_come()) and refused.fitting(sweep_id) is None:
            self._store.rungs.prune_waiting(sweep_id)
        return refused.admit(sweep_id)

    def _wants_refused(self) -> bool:
        if self._spec.privacy.policy != "open" or not self._store.refused.is_any(self._sweep_id):
            return False
        # All that were listed are wanted; of what was proposed, as many as the search is to run.
        return self._proposals is None or not self._proposals.is_complete()

    def _more_to_come(self) -> bool:
        return self._proposals is not None and self._proposals.end() is None


def begins_by_itself(row: sa.Row[Any]) -> bool:
    """Whether a trial that may run has not begun yet, and nobody asked for it by name."""
    return row.state == TrialState.ADMITTED and not row.exempt
