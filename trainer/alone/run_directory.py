"""What a run leaves behind, in one directory that one process at a time works in.

checkpoints/     the newest two checkpoints
secrets/         the roots of noise keys while the run can be gone on with; 0700
charges.json     what has been spent (`trainer.alone.charges`)
config.json      the configuration, with everything that the file left out
reports.jsonl    a line per report
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from trainer.config import TrialConfig
from trainer.durability import write_durably
from trainer.errors import RunError
from trainer.weights.checkpoint_writer import checkpoints_in

_LOCK = ".lock"


class RunDirectory:
    """A run's directory; nothing is created by looking.

    Args:
        path: The directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.secrets = path / "checkpoints", path / "secrets"
        self.charges, self.config = path / "charges.json", path / "config.json"
        self.reports = path / "reports.jsonl"

    @contextlib.contextmanager
    def taken(self, *, resume: bool, how_to_resume: str) -> Generator[None]:
        """Keeps the directory for this process, and makes it where a run begins.

        Args:
            resume: Whether a run goes on; else one begins.
            how_to_resume: The command that would go on with what is there.

        Raises:
            RunError: There is a run and none goes on, or the other way round; or another process
                works in it; or it cannot be made.
        """
        begun = self.path.is_dir() and any(self.path.iterdir())
        if begun and not resume:
            raise RunError(
                f"{self.path}: holds a run already. To go on with it: {how_to_resume}; to begin "
                "another: --out with another directory"
            )
        if resume and not begun:
            raise RunError(f"{self.path}: holds no run to go on with; leave --resume out to begin")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.secrets.mkdir(mode=0o700, exist_ok=True)
            lock = open(self.path / _LOCK, "w")  # noqa: SIM115
        except OSError as error:
            raise RunError(f"{self.path}: cannot be made: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(f"{self.path}: another process works in it") from None
            yield

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint, if there is one; whether it is whole is not looked at."""
        return next(iter(checkpoints_in(self.checkpoints)), None)

    def save_config(self, config: TrialConfig) -> None:
        """Keeps the configuration."""
        write_durably(self.config, json.dumps(config.to_json(), indent=1) + "\n")

    def add_report(self, line: str) -> None:
        """Adds a line to the reports; a line that a crash cut short is ended first."""
        with open(self.reports, "a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(f"{line}\n".encode())

    def last_report(self) -> dict[str, Any] | None:
        """The last report that was kept whole, if there is one."""
        last = None
        if self.reports.is_file():
            for line in self.reports.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    last = json.loads(line)
        return last

    def discard(self) -> None:
        """Removes what a run left that was charged nothing: it never began."""
        for path in (self.checkpoints, self.secrets):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.charges, self.config, self.reports, self.path / _LOCK):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.path.rmdir()
