"""Which trial comes next: those that wait, and then what the sweep's search proposes."""

from collections import deque
from collections.abc import Sequence

from sweeps.database.states import SweepState
from sweeps.database.store import Store
from sweeps.proposals import Proposals


class TrialQueue:
    """Hands out the trials of a sweep one by one.

    Args:
        sweep_id: The sweep.
        store: The driver's own.
        waiting: Trials that are there already, in the order in which they start.
        proposals: What comes after these; None for nothing.
        limit: How many trials to hand out at most.
    """

    def __init__(
        self,
        sweep_id: str,
        store: Store,
        *,
        waiting: Sequence[str],
        proposals: Proposals | None,
        limit: int,
    ) -> None:
        self._sweep_id, self._store = sweep_id, store
        self._waiting = deque(waiting[:limit])
        self._proposals = proposals
        self._left = limit

    def take(self) -> str | None:
        """The next trial; None where there is none now, of which `is_over` says more."""
        if self.is_over:
            return None
        found = None
        if self._waiting:
            found = self._waiting.popleft()
        elif self._proposals is not None:
            # One proposal at a time: whoever asks has trials to look after meanwhile.
            found = self._proposals.propose()
        self._left -= found is not None
        return found

    @property
    def is_over(self) -> bool:
        """Whether no other trial comes, for now at least."""
        row = self._store.sweep(self._sweep_id)
        if not self._left or row.wish or row.state != SweepState.RUNNING:
            return True
        return not self._waiting and (self._proposals is None or self._proposals.end() is not None)
