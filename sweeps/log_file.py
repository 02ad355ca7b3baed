"""What a process says of its trial or its sweep, in a file of its own for `dp-sweeps logs`.

The trainer's messages are about the program (what was loaded, what did not fit in memory, a
traceback) and never about examples, gradients or losses.
"""

import logging
from contextlib import suppress
from pathlib import Path
from typing import Self

_LOGGERS = ("sweeps", "trainer")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogFile:
    """Appends what this process logs to a file, and to nothing else, until it is closed.

    A file that cannot be written holds nobody up.

    Args:
        path: The file; it and its folder are made if need be.

    Attributes:
        listens: Whether it appends, true at first: another's turn may be none of its business.
    """

    def __init__(self, path: Path) -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = _Handler(path, encoding="utf-8", delay=True)
        self._handler.setFormatter(logging.Formatter(_FORMAT))
        self.listens = True
        self._handler.addFilter(lambda _: self.listens)
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops appending."""
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.removeHandler(self._handler)
            logger.propagate = not logger.handlers  # there may be other files
        with suppress(OSError):
            self._handler.close()


class _Handler(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the disk may be full, and that is told elsewhere."""
