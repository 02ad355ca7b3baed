"""A sweep that is recorded: where it is, what it has to show, and what may be asked of it."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from cluster import LOCAL
from sweeps import driver
from sweeps.choosing import chosen_trials
from sweeps.client.documents import Results
from sweeps.client.driving import DriverProcess
from sweeps.client.progress import progress_line, text_progress
from sweeps.database.forking import Fork
from sweeps.database.readmission import Readmission
from sweeps.database.states import Wish
from sweeps.database.store import Store
from sweeps.errors import CommandError
from sweeps.forks import new_fork
from sweeps.home import Home
from sweeps.report.files import report_files
from sweeps.report.results import read_results
from sweeps.report.status import Status, read_status
from sweeps.verification import Verification, verify
from sweeps.watching import wait_for_end


class Sweep:
    """A sweep in the ledger; `sweeps.client.Client` gives it.

    Every method raises `sweeps.errors.StoreError` if what it asks for is not allowed where the
    sweep or the trial is, and `sweeps.errors.DatabaseError` if the database fails.

    Args:
        sweep_id: The sweep.
        store: The database.
        home: State.

    Attributes:
        sweep_id: Its id.
    """

    def __init__(self, sweep_id: str, store: Store, home: Home) -> None:
        self.sweep_id = sweep_id
        self._store, self._home = store, home
        self._driver: DriverProcess | None = None

    @property
    def state(self) -> str:
        """RUNNING, PAUSED, COMPLETED, FAILED or CANCELLED."""
        return str(self._store.sweep(self.sweep_id).state)

    def status(self) -> Status:
        """Who drives it, how its trials stand, what MLflow has yet to get."""
        return read_status(self._store, self.sweep_id)

    def results(self) -> Results:
        """What it has to show now."""
        summary = read_results(self._store, self.sweep_id)
        return Results(summary=summary, report=report_files(self._home, self.sweep_id))

    def wait(self, *, progress: bool = True) -> Results:
        """Waits until it no longer runs. An interrupt only stops the waiting.

        Args:
            progress: Whether a line on standard error says how far it is.

        Raises:
            SweepError: Nobody drives it any more; the message says why and what goes on.
        """
        show = text_progress(self.sweep_id, self._store) if progress else lambda: None
        if (own := self._driver) is None:
            wait_for_end(self.sweep_id, self._store, on_look=show)
        else:
            wait_for_end(
                self.sweep_id,
                self._store,
                on_look=show,
                why_gone=own.why_gone,
                is_coming=own.is_coming,
            )
            own.wait()
        return self.results()

    def drive(self, address: str = LOCAL) -> None:
        """Has it driven from where it is, unless somebody drives it; does not wait.

        Args:
            address: Of Ray; ``local`` starts one on this machine.
        """
        if not self._store.is_driven(self.sweep_id):
            self._driver = DriverProcess(self.sweep_id, self._store, self._home, address)

    def pause(self) -> None:
        """Sets it aside: running trials go to their next report, and wait there."""
        driver.ask(self.sweep_id, Wish.PAUSE, self._store, self._home)

    def stop(self) -> None:
        """Ends it in order: running trials go to their ends, no other begins."""
        driver.ask(self.sweep_id, Wish.STOP, self._store, self._home)

    def cancel(self, trial: str | int | None = None) -> None:
        """Ends it, or one trial of it, now. What was spent stays spent; the rest is free again."""
        if trial is None:
            driver.cancel(self.sweep_id, self._store, self._home)
        else:
            driver.cancel_trial(self._trial(trial), self._store, self._home)

    def resume(
        self,
        trials: Sequence[str | int] = (),
        *,
        top: int | None = None,
        pruned: bool = False,
        iterations: int | None = None,
        dry_run: bool = False,
        address: str = LOCAL,
    ) -> list[Readmission]:
        """Goes on with it where it was interrupted, or with trials that had ended; does not wait.

        Args:
            trials: Ids or numbers of trials that are to go on.
            top: Else, how many of those that were pruned, the best first.
            pruned: Else, whether all of those.
            iterations: Where they end; None for where they were to end at first.
            dry_run: Whether to decide in the same way and change nothing.
            address: Of Ray.

        Returns:
            What the budget said of each of these trials; empty where none is named.
        """
        names = [str(name) for name in trials]
        chosen = chosen_trials(self._store, self.sweep_id, names, top, pruned)
        if chosen is None and (iterations or dry_run):
            given = "iterations" if iterations else "dry_run"
            raise CommandError(f"{given}: allowed with trials, top or pruned")
        decisions: list[Readmission] = []
        if chosen is not None:
            decisions = self._store.readmit(dict.fromkeys(chosen, iterations), dry_run=dry_run)
        if not dry_run and (chosen is None or any(each.admitted for each in decisions)):
            self.drive(address)
        return decisions

    def fork(
        self,
        trial: str | int,
        changes: Mapping[str, Any] | None = None,
        *,
        from_step: int | None = None,
        iterations: int | None = None,
        dry_run: bool = False,
        address: str = LOCAL,
    ) -> Fork:
        """Goes on from a trial's checkpoint as another trial of this sweep; does not wait.

        Args:
            trial: The id or the number of the trial to go on from.
            changes: Other values for fields of the search space.
            from_step: Of which checkpoint; None for the newest.
            iterations: The step to end at; None for where the trial was to end.
            dry_run: Whether to decide in the same way and change nothing.
            address: Of Ray.

        Returns:
            What the budget said of it.

        Raises:
            SpecError: A change is not allowed.
            CommandError: Nothing is changed, or a key is none of the search space.
        """
        if not changes and iterations is None:
            raise CommandError(
                "changes: allowed is at least one, or iterations; `resume` goes on with a trial "
                "as it is"
            )
        new = new_fork(
            self._store,
            self._home,
            self._trial(trial),
            changes or {},
            from_step=from_step,
            iterations=iterations,
        )
        decision = self._store.fork(new, dry_run=dry_run)
        if decision.admitted and not dry_run:
            self.drive(address)
        return decision

    def logs(self, trial: str | int) -> str:
        """What a trial's workers said; empty before they said anything."""
        path = self._home.trial_log(self.sweep_id, self._trial(trial))
        if not path.exists():
            return ""
        return path.read_text(encoding="utf-8", errors="replace")

    def verify(self, *, with_mlflow: bool = True) -> Verification:
        """Holds steps, charges, reports, checkpoints, ledger and MLflow to each other."""
        return verify(self._store, self._home, self.sweep_id, with_mlflow=with_mlflow)

    def _trial(self, name: str | int) -> str:
        (trial_id,) = chosen_trials(self._store, self.sweep_id, [str(name)], None, False) or ("",)
        return trial_id

    def __repr__(self) -> str:
        return f"Sweep({self.sweep_id}: {self.state})"

    def _repr_html_(self) -> str:
        line = progress_line(read_results(self._store, self.sweep_id))
        return f"<div><b>{html.escape(self.state)}</b> {html.escape(line)}</div>"
