"""Ctrl-C once asks a run to stop well; twice ends it at once.

The signal is heard by a thread, because the main thread may be deep inside a compiled program for
minutes and Python would run no handler before it returns.
"""

import os
import signal
import socket
import threading
from collections.abc import Callable
from types import TracebackType

INTERRUPTED = 130


class Interrupts:
    """Listens to SIGINT; a context manager, for the main thread.

    Args:
        on_first: Called from another thread at the first one.
        on_second: Called from another thread at the second, before the process ends.
    """

    def __init__(self, on_first: Callable[[], None], on_second: Callable[[], None]) -> None:
        self.requested = False
        self._on_first, self._on_second = on_first, on_second
        self._hear, self._tell = socket.socketpair()
        self._tell.setblocking(False)
        self._listener = threading.Thread(target=self._listen, name="interrupts", daemon=True)

    def __enter__(self) -> "Interrupts":
        self._wakeup_before = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
        self._handler_before = signal.signal(signal.SIGINT, lambda number, frame: None)
        self._listener.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGINT, self._handler_before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._tell.close()  # ends the thread
        self._listener.join()
        self._hear.close()

    def _listen(self) -> None:
        while received := self._hear.recv(1):
            if received[0] != signal.SIGINT:
                continue
            if self.requested:
                self._on_second()
                # What was charged is durable and what is half written is not used, so there is
                # nothing to clean up; and the main thread may not answer for long.
                os._exit(INTERRUPTED)
            self.requested = True
            self._on_first()
