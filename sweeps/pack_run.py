"""A worker's trials, several at a time: they take their steps as one program (`trainer.pack`).

Each is a `TrialRun` of its own, with its own attempt, charges, checkpoints and end; here they are
only asked in turn. One that ends, or is taken away, leaves the others as they are.
"""

from collections.abc import Sequence

from sweeps.database.store import Store
from sweeps.home import Home
from sweeps.worker import TrialRun
from trainer.reporting import TrialReport


class PackRun:
    """Trials in this process.

    Args:
        store: The database.
        home: Where state lives.
        trial_ids: The trials.
        width: For how many the program is made; 1 runs each alone, in its turn.
        kind: How each of them is run.
    """

    def __init__(
        self,
        store: Store,
        home: Home,
        trial_ids: Sequence[str],
        width: int,
        kind: type[TrialRun] = TrialRun,
    ) -> None:
        self._pack = None
        if width > 1:
            from trainer.pack import Pack  # JAX: only here, in the worker's environment

            self._pack = Pack(width)
        self._runs = {trial_id: kind(store, home, trial_id, self._pack) for trial_id in trial_ids}

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be done here."""
        return not self._runs

    def next_reports(self) -> dict[str, TrialReport]:
        """Runs to where at least one trial reports, and records it.

        Returns:
            The reports, by trial, at most one of each; none if nothing more is to be done.
        """
        found: dict[str, TrialReport] = {}
        while self._runs and not found:
            for trial_id, run in list(self._runs.items()):
                report = run.next_report()
                if report is not None:
                    found[trial_id] = report
                if run.is_down:
                    del self._runs[trial_id]
            if self._pack is not None and not found:
                self._pack.run()
        return found

    def close(self) -> None:
        """Puts all trials down, as `TrialRun.close`."""
        for run in self._runs.values():
            run.close()
        self._runs.clear()
