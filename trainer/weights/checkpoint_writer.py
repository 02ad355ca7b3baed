"""Checkpoints in the background: training waits for the copy from the device, not for the disk.

One is written at a time; saving the next waits for it.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.weights.checkpoints import save_checkpoint


def checkpoint_path(checkpoint_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoint_dir / f"step-{step:08d}"


class CheckpointWriter:
    """Writes the checkpoints of a trial and keeps the newest; a context manager.

    Args:
        checkpoint_dir: Where they go; None writes none.
    """

    def __init__(self, checkpoint_dir: Path | None) -> None:
        self._dir = checkpoint_dir
        self._executor = ThreadPoolExecutor(1, "checkpoint") if checkpoint_dir else None
        self._pending: Future[None] | None = None

    def save(self, contents: Callable[[], dict[str, Any]]) -> None:
        """Writes a checkpoint, after the one before.

        Args:
            contents: Gives `save_checkpoint`'s arguments but the path; called at once.

        Raises:
            OSError: The one before could not be written.
        """
        if self._executor is None:
            return
        self.finish()
        self._pending = self._executor.submit(self._write, contents())

    def finish(self) -> None:
        """Waits until what was saved is whole.

        Raises:
            OSError: It could not be written.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, contents: dict[str, Any]) -> None:
        assert self._dir is not None
        newest = checkpoint_path(self._dir, contents["step"])
        save_checkpoint(newest, **contents)
        for older in self._dir.glob("step-*"):
            if older < newest:
                shutil.rmtree(older, ignore_errors=True)

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
