"""The process that drives what a client starts: the command line, in a session of its own.

So nothing of it is lost with the notebook's kernel or with an interrupt there; and if it dies,
any other driver goes on.
"""

import os
import subprocess
import sys
from pathlib import Path

from cluster import LOCAL
from sweeps.database.store import Store
from sweeps.home import HOME_VARIABLE, Home

_DELIVERY_SECS = 60.0


class DriverProcess:
    """Drives a sweep that is recorded, from where its rows say that it is.

    Args:
        sweep_id: The sweep.
        store: The database.
        home: State.
        address: Of Ray: ``local`` for one of its own, else of a cluster, which then drives.
    """

    def __init__(self, sweep_id: str, store: Store, home: Home, address: str) -> None:
        store.reopen(sweep_id)
        self._log = home.driver_log(sweep_id).with_name("command.log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        detach = [] if address == LOCAL else ["--detach"]
        arguments = ["resume", sweep_id, "--address", address, *detach]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sweeps.cli", *arguments],
                env={**os.environ, HOME_VARIABLE: str(home.path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._hands_over = address != LOCAL

    def why_gone(self) -> str:
        """Why it drives no more, in the words that it ended with; empty while it may."""
        code = self._process.poll()
        if code is None or (code == 0 and self._hands_over):
            return ""
        said = _last_line(self._log)
        return said or f"its driver ended with exit code {code}"

    def is_coming(self) -> bool:
        """Whether it is there, driving or about to."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Waits for its end once the sweep has ended: MLflow gets the last of it meanwhile."""
        try:
            self._process.wait(_DELIVERY_SECS)
        except subprocess.TimeoutExpired:
            return


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
