"""Empties the outbox in the background, so that a sweep never waits for who is told of it.

Nothing that goes wrong here reaches the sweep, and nothing is lost by it: what is not delivered
stays in the database. Nor does it take the sweep's time: the more a delivery has computed, the
longer the pause after it, in which more comes together for the next.
"""

import logging
import threading
import time
from types import TracebackType
from typing import Protocol, Self

from sweeps.errors import RefusedError

_log = logging.getLogger(__name__)
_FIRST_RETRY_SECS = 0.25
_LAST_RETRY_SECS = 5.0
_MAX_SHARE = 0.02  # of one core
_MAX_PAUSE_SECS = 60.0
_MAX_SECS = 1.0  # of one delivery: a sweep of thousands of trials has as many runs to create


class Deliverer(Protocol):
    """Takes messages out of the outbox."""

    def deliver(self, *, max_secs: float | None = None) -> int:
        """Delivers what is pending, for so long at most; says how many messages that were."""
        ...

    def count_undelivered(self) -> int:
        """How many messages are pending."""
        ...


class OutboxThread:
    """Delivers until the block ends, then what is left, within a bound.

    While the block runs it computes 2 % of the time at most, as long as pauses of a minute are
    enough for that; the first delivery, which imports MLflow, comes on top.

    No failure of a delivery reaches the block: what could not be delivered stays in the outbox,
    and whoever delivers next takes it.

    Args:
        writer: Delivers.
        first_after_secs: How long to wait with the first delivery, which imports MLflow: a sweep
            that begins needs the processor.
        every_secs: Between two deliveries, at least.
        max_backoff_secs: Longest pause after failures.
        flush_secs: How long the end of the block may wait for the last delivery.

    Attributes:
        last_error: Why the latest delivery failed; None if it did not.
        remaining: Messages left when the block ended; None before, or if it is not known.
    """

    def __init__(
        self,
        writer: Deliverer,
        *,
        first_after_secs: float = 15.0,
        every_secs: float = 1.0,
        max_backoff_secs: float = 30.0,
        flush_secs: float = 60.0,
    ) -> None:
        self.last_error: Exception | None = None
        self.remaining: int | None = None
        self._writer = writer
        self._first_after_secs = first_after_secs
        self._every_secs = every_secs
        self._max_backoff_secs = max_backoff_secs
        self._flush_secs = flush_secs
        self._stop = threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        try:
            self._thread.join(self._flush_secs)
        finally:
            self._given_up.set()
        if self._thread.is_alive() and self.last_error is None:
            self.last_error = TimeoutError(f"no answer within {self._flush_secs:g} s")
        self.remaining = self._count()

    def _run(self) -> None:
        pause = self._every_secs
        is_first = True
        self._stop.wait(self._first_after_secs)
        while not self._stop.is_set():
            begin = time.thread_time()
            delivered = self._deliver(_MAX_SECS)
            computed = 0.0 if is_first else time.thread_time() - begin
            is_first = False
            pause = self._every_secs if delivered else min(2 * pause, self._max_backoff_secs)
            self._stop.wait(max(pause, min(computed / _MAX_SHARE, _MAX_PAUSE_SECS)))
        deadline = time.monotonic() + self._flush_secs
        pause = _FIRST_RETRY_SECS
        while not self._given_up.is_set() and time.monotonic() < deadline:
            self._deliver()
            if isinstance(self.last_error, RefusedError) or self._count() == 0:
                return
            self._given_up.wait(pause)
            pause = min(2 * pause, _LAST_RETRY_SECS)

    def _deliver(self, max_secs: float | None = None) -> bool:
        try:
            self._writer.deliver(max_secs=max_secs)
        except Exception as error:  # whatever it is, the sweep goes on
            _log.debug("delivery failed", exc_info=True)
            self.last_error = error
            return False
        self.last_error = None
        return True

    def _count(self) -> int | None:
        try:
            return self._writer.count_undelivered()
        except Exception as error:  # the database may be what is away
            self.last_error = error
            return None
