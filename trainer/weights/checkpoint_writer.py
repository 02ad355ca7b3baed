"""Checkpoints in the background: training waits for the copy from the device, not for the disk.

One is written at a time. Once it is durable somebody may be told, who may stop the trial by
raising; only then are older ones removed. So at any moment a whole checkpoint that was told of is
there, and one more should the newest turn out damaged.
"""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from trainer.weights.checkpoints import save_checkpoint

LOGGER = logging.getLogger("trainer")

OnCheckpoint = Callable[[int, Path], None]
"""Called with a step and the directory of its checkpoint, once that is durably in place, in the
thread that drives the trial. Raises to stop the trial."""


def checkpoint_path(checkpoint_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoint_dir / f"step-{step:08d}"


def checkpoints_in(checkpoint_dir: Path) -> list[Path]:
    """The checkpoints in a directory, whole or not, the newest first."""
    return sorted(checkpoint_dir.glob("step-*"), reverse=True)


class _Pending(NamedTuple):
    """A checkpoint that is being written."""

    step: int
    path: Path
    written: Future[None]


class CheckpointWriter:
    """Writes the checkpoints of a trial and keeps the newest few; a context manager.

    One writer at a time may use a directory. What a killed one left unfinished there is removed.

    Args:
        checkpoint_dir: Where they go; None writes none.
        keep: How many are kept, >= 1. Those of steps beyond the newest are left alone.
        on_checkpoint: See `OnCheckpoint`; None tells nobody.
    """

    def __init__(
        self,
        checkpoint_dir: Path | None,
        *,
        keep: int = 2,
        on_checkpoint: OnCheckpoint | None = None,
    ) -> None:
        self._dir, self._keep, self._on_checkpoint = checkpoint_dir, keep, on_checkpoint
        self._executor = ThreadPoolExecutor(1, "checkpoint") if checkpoint_dir else None
        self._pending: _Pending | None = None

    def save(self, contents: Callable[[], dict[str, Any]]) -> None:
        """Writes a checkpoint, after the one before.

        Args:
            contents: Gives `save_checkpoint`'s arguments but the path; called at once.

        Raises:
            CheckpointError: The one before could not be written.
            Exception: What ``on_checkpoint`` raised for the one before.
        """
        if self._executor is None or self._dir is None:
            return
        self.finish()
        arguments = contents()
        step = arguments["step"]
        path = checkpoint_path(self._dir, step)
        written = self._executor.submit(save_checkpoint, path, **arguments)
        self._pending = _Pending(step, path, written)

    def finish(self) -> None:
        """Waits until what was saved is durable, and tells of it.

        Raises:
            CheckpointError: It could not be written.
            Exception: What ``on_checkpoint`` raised; older checkpoints are then all still there.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.written.result()
        if self._on_checkpoint is not None:
            self._on_checkpoint(pending.step, pending.path)
        assert self._executor is not None
        self._executor.submit(self._remove_older, pending.path)

    def poll(self) -> None:
        """As `finish`, if there is nothing to wait for."""
        if self._pending is not None and self._pending.written.done():
            self.finish()

    def _remove_older(self, newest: Path) -> None:
        kept = [path for path in checkpoints_in(newest.parent) if path <= newest]
        for older in kept[self._keep :]:
            # Under this name half of one looks like none.
            removed = older.with_name(f".{older.name}.removed")
            shutil.rmtree(removed, ignore_errors=True)
            older.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)

    def __enter__(self) -> "CheckpointWriter":
        for left in [] if self._dir is None else self._dir.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        except Exception:
            if error is None or isinstance(error, GeneratorExit):
                raise
            # Why the trial ends is the error that came first.
            LOGGER.warning("the last checkpoint is not to be relied on", exc_info=True)
        finally:
            if self._executor is not None:
                self._executor.shutdown()
