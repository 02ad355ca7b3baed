"""The states of sweeps and trials, and the ways between them."""

import enum


class TrialState(enum.StrEnum):
    """Where a trial is. Ended states are final until somebody resumes the trial."""

    QUEUED = "QUEUED"
    ADMITTED = "ADMITTED"
    REJECTED = "REJECTED"
    RUNNING = "RUNNING"
    PRUNED = "PRUNED"
    PAUSED = "PAUSED"
    COMPLETED = "COMPLETED"
    DIVERGED = "DIVERGED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_finished(self) -> bool:
        """Whether nothing will happen to the trial by itself any more."""
        return not _NEXT[self]

    def may_become(self, state: "TrialState") -> bool:
        """Whether ``state`` may follow directly."""
        return state in _NEXT[self]


class SweepState(enum.StrEnum):
    """Where a sweep is."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


_S = TrialState
_NEXT: dict[TrialState, frozenset[TrialState]] = {
    _S.QUEUED: frozenset({_S.ADMITTED, _S.REJECTED, _S.CANCELLED}),
    _S.ADMITTED: frozenset({_S.RUNNING, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset(
        {_S.PRUNED, _S.PAUSED, _S.COMPLETED, _S.DIVERGED, _S.FAILED, _S.CANCELLED}
    ),
    _S.PAUSED: frozenset({_S.RUNNING, _S.CANCELLED}),
    _S.REJECTED: frozenset(),
    _S.PRUNED: frozenset(),
    _S.COMPLETED: frozenset(),
    _S.DIVERGED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}
