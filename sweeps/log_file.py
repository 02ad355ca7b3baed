"""What a process says of its trial or its sweep, in a file of its own for `dp-sweeps logs`.

The trainer's messages are about the program (what was loaded, what did not fit in memory, a
traceback) and never about examples, gradients or losses.
"""

import logging
from pathlib import Path
from typing import Self

_LOGGERS = ("sweeps", "trainer")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LogFile:
    """Appends what this process logs to a file, until it is closed.

    Args:
        path: The file; it and its folder are made if need be.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(path, encoding="utf-8", delay=True)
        self._handler.setFormatter(logging.Formatter(_FORMAT))
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.setLevel(logging.INFO)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops appending."""
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
        self._handler.close()
