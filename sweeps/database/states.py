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
        return self not in _UNFINISHED

    @property
    def may_run(self) -> bool:
        """Whether a worker may take the trial up."""
        return self in _MAY_RUN

    def may_become(self, state: "TrialState") -> bool:
        """Whether ``state`` may follow directly."""
        return state in _NEXT[self]


class SweepState(enum.StrEnum):
    """Where a sweep is. All but RUNNING wait for somebody to resume it, or for nothing."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"


class Wish(enum.StrEnum):
    """What somebody asked of a running sweep."""

    NONE = ""
    PAUSE = "pause"
    """Running trials go to their next checkpoint and wait there."""
    STOP = "stop"
    """Running trials go to their end; no other begins."""
    INTERRUPT = "interrupt"
    """All is left where it is, at once."""


class AttemptEnd(enum.StrEnum):
    """How an attempt at a trial ended."""

    ENDED = "ended"
    """The trial ended with it."""
    PAUSED = "paused"
    OUT_OF_MEMORY = "out_of_memory"
    LOST = "lost"
    """Its worker died alone, or its node."""
    INTERRUPTED = "interrupted"
    """Its driver died, and its worker with it."""


_S = TrialState
_UNFINISHED = frozenset({_S.QUEUED, _S.ADMITTED, _S.RUNNING, _S.PAUSED})
_MAY_RUN = frozenset({_S.ADMITTED, _S.RUNNING, _S.PAUSED})
_NEXT: dict[TrialState, frozenset[TrialState]] = {
    _S.QUEUED: frozenset({_S.ADMITTED, _S.REJECTED, _S.CANCELLED}),
    _S.ADMITTED: frozenset({_S.RUNNING, _S.FAILED, _S.CANCELLED}),
    _S.RUNNING: frozenset(
        {_S.PRUNED, _S.PAUSED, _S.COMPLETED, _S.DIVERGED, _S.FAILED, _S.CANCELLED}
    ),
    _S.PAUSED: frozenset({_S.RUNNING, _S.PRUNED, _S.CANCELLED}),
    # To ADMITTED: by a budget that is asked again.
    _S.REJECTED: frozenset({_S.ADMITTED}),
    # To ADMITTED: by who resumes it.
    _S.PRUNED: frozenset({_S.ADMITTED}),
    _S.COMPLETED: frozenset({_S.ADMITTED}),
    _S.DIVERGED: frozenset(),
    _S.FAILED: frozenset({_S.ADMITTED}),
    _S.CANCELLED: frozenset({_S.ADMITTED}),
}
