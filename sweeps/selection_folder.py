"""What a private selection has to remember while it runs, and nobody may ever read.

    secrets/selections/<trial id>/     0700
      progress.json                    0600: the secret of its draws, the trial under way, the best
      lock                             held by the one worker that may write here
      trial-<n>/                       of the trial under way and of the best: checkpoints, keys
      cache/                           compiled programs, from whose names follow batch sizes

Everything of a trial that lost is removed as soon as it has lost, and the folder with all that is
in it as soon as the winner is released, or the selection has ended in any other way. Without it a
selection cannot go on: drawing anew would be another selection, which has to be paid for.
"""

import dataclasses
import fcntl
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from sweeps.errors import HaltedError, SweepError
from sweeps.search.selection_draws import SECRET_BYTES
from trainer.durability import sync, write_durably

_LOOK_AGAIN_SECS = 0.2

Curve = tuple[Mapping[str, Any], ...]
"""What a trial has reported, as `trainer.reporting.releasable` gives it, by step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Best:
    """The best trial so far.

    Attributes:
        number: Which it is.
        curve: Its reports.
        branch_id: Of its noise.
    """

    number: int
    curve: Curve
    branch_id: str

    @property
    def score(self) -> float:
        """What it is compared by."""
        return score(self.curve[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a selection is.

    Attributes:
        secret: Of its draws (`sweeps.search.selection_draws`).
        number: The trial under way; those before it have ended.
        curve: What that trial has reported.
        microbatch_size: What fitted into memory; None as long as nothing failed to.
        attempt: The attempt that got further last.
        best: Of the trials that have ended; None before the first has.
    """

    secret: bytes = dataclasses.field(repr=False)
    number: int = 0
    curve: Curve = ()
    microbatch_size: int | None = None
    attempt: int = 0
    best: Best | None = None

    def with_ended(self, branch_id: str) -> Self:
        """After the end of the trial under way, all of whose reports are in `curve`.

        Of two that are as good the first stays the best: the trials are drawn independently of
        each other, so which of them came first says nothing of the data.
        """
        ended = Best(number=self.number, curve=self.curve, branch_id=branch_id)
        better = self.best is None or ended.score > self.best.score
        best = ended if better else self.best
        return dataclasses.replace(self, number=self.number + 1, curve=(), best=best)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for `from_json`."""
        return {**dataclasses.asdict(self), "secret": self.secret.hex()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Progress":
        """What `to_json` wrote."""
        fields, best = dict(data), data["best"]
        fields["secret"] = bytes.fromhex(data["secret"])
        fields["curve"] = tuple(data["curve"])
        if best is not None:
            fields["best"] = Best(
                number=best["number"], curve=tuple(best["curve"]), branch_id=best["branch_id"]
            )
        return cls(**fields)


def score(report: Mapping[str, Any]) -> float:
    """What trials are compared by: the accuracy at the end; -inf of one that diverged."""
    accuracy = report.get("eval_accuracy")
    if report["outcome"] != "completed" or accuracy is None or not math.isfinite(accuracy):
        return -math.inf
    return float(accuracy)


def last_step(curve: Curve) -> int:
    """The step of the last report; 0 before the first."""
    return int(curve[-1]["step"]) if curve else 0


class SelectionFolder:
    """The folder of one private selection; one process at a time may use it (`held`).

    Args:
        secrets_dir: Where secrets are kept.
        trial_id: The selection's.
    """

    def __init__(self, secrets_dir: Path, trial_id: str) -> None:
        self._path = secrets_dir / "selections" / trial_id

    @property
    def cache(self) -> Path:
        """For what would tell which programs were compiled."""
        return self._path / "cache"

    def trial(self, number: int) -> Path:
        """Where a trial keeps its checkpoints and its keys."""
        return self._path / f"trial-{number}"

    @contextmanager
    def held(self, patience_secs: float) -> Generator[None]:
        """The right to use the folder; it ends with the block or the process.

        A worker that was replaced needs a moment to find out, and must not write meanwhile.

        Args:
            patience_secs: How long to wait for another.

        Raises:
            HaltedError: If another process keeps it.
            SweepError: If the folder cannot be made.
        """
        try:
            for folder in (self._path.parent.parent, self._path.parent, self._path):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                sync(folder.parent)
            descriptor = os.open(self._path / "lock", os.O_CREAT | os.O_WRONLY, 0o600)
        except OSError as error:
            raise self._refusal(f"cannot be made: {error.strerror}") from None
        deadline = time.monotonic() + patience_secs
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise HaltedError(f"{self._path}: another process uses it") from None
                    time.sleep(_LOOK_AGAIN_SECS)
            yield
        finally:
            os.close(descriptor)

    def begin(self) -> Progress:
        """Draws the secret, once: what is there already stays.

        Raises:
            SweepError: It cannot be kept.
        """
        if (kept := self.read()) is not None:
            return kept
        progress = Progress(secret=secrets.token_bytes(SECRET_BYTES))
        self.write(progress)
        return progress

    def read(self) -> Progress | None:
        """How far the selection is; None where nothing is kept here.

        Raises:
            SweepError: What is kept cannot be read, or is damaged.
        """
        try:
            text = self._file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._refusal(f"cannot be read: {error.strerror}") from None
        try:
            return Progress.from_json(json.loads(text))
        except (ValueError, TypeError, KeyError):  # their messages may quote it
            raise self._refusal("is damaged") from None

    def write(self, progress: Progress) -> None:
        """Makes it durable how far the selection is, and removes what has lost.

        Raises:
            SweepError: It cannot be written.
        """
        try:
            write_durably(self._file, json.dumps(progress.to_json()), mode=0o600)
        except OSError as error:
            raise self._refusal(f"cannot be written: {error.strerror}") from None
        needed = {progress.number, progress.best and progress.best.number}
        for path in self._path.glob("trial-*"):
            if path.name not in {f"trial-{number}" for number in needed}:
                shutil.rmtree(path, ignore_errors=True)

    def forget(self, number: int) -> None:
        """Removes what a trial has kept, so that it begins anew."""
        shutil.rmtree(self.trial(number), ignore_errors=True)

    def remove(self) -> None:
        """Removes all of it; also what somebody who was killed over that has left."""
        gone = self._path.with_name(f".{self._path.name}.{secrets.token_hex(4)}.removed")
        with suppress(OSError):  # first from where a worker that lives on would write
            self._path.rename(gone)
        for path in self._path.parent.glob(f".{self._path.name}.*.removed"):
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            self._path.parent.rmdir()

    @property
    def _file(self) -> Path:
        return self._path / "progress.json"

    def _refusal(self, what: str) -> SweepError:
        return SweepError(f"what its private selection has to remember, {self._path}, {what}")
