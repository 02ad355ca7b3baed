"""A worker's trial: taken up from the database, run report by report, and put down again.

Nothing here knows Ray. Whatever happens to the process, the rows say how far the trial is: its
steps are charged before they are seen, its checkpoints are recorded once they are whole, and
whoever takes it up next begins a new attempt, by which this one is fenced.
"""

import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from sweeps.checkpoint_places import CheckpointPlaces
from sweeps.database.attempts import Assignment, Attempt
from sweeps.database.states import TrialState, Wish
from sweeps.database.store import Store
from sweeps.database.tables import METRICS
from sweeps.errors import DatabaseError, FencedError, HaltedError, PlaceError
from sweeps.home import Home
from sweeps.log_file import LogFile
from sweeps.user_models import check_model_allowed
from trainer.errors import CheckpointError, OutOfMemory, PackTooLarge
from trainer.mechanism.branch import Branch
from trainer.reporting import TrialReport, releasable

if TYPE_CHECKING:
    from trainer.pack import Pack

_LOG = logging.getLogger(__name__)
_LOOK_EVERY_SECS = 2.0
_DATABASE_PATIENCE_SECS = 60.0
_LONGEST_PAUSE_SECS = 5.0
_MAX_REASON_CHARS = 500

_T = TypeVar("_T")


class TrialRun:
    """One trial in this process.

    Args:
        store: The database.
        home: Where state lives.
        trial_id: The trial.
        pack: The trials with which it takes its steps; None for nobody.
    """

    def __init__(
        self, store: Store, home: Home, trial_id: str, pack: "Pack | None" = None
    ) -> None:
        self._attempts = store.attempts
        self._home = home
        self._places = CheckpointPlaces(home)
        self._trial_id = trial_id
        self._pack = pack
        self._attempt: Attempt | None = None
        self._reports: Generator[TrialReport | None] | None = None
        self._waits = False
        self._sweep_id, self._branch_id = "", ""
        self._has_begun = False
        self._looked_at = 0.0
        self._last_step = 0
        # The checkpoint of that step, until it is recorded with the report of it.
        self._last_checkpoint: str | None = None
        # What the trial's own end made superfluous; None as long as it has not ended here.
        self._superseded: Sequence[str] | None = None
        self._log: LogFile | None = None
        self._is_down = False

    @property
    def is_down(self) -> bool:
        """Whether the trial has been put down."""
        return self._is_down

    def next_report(self) -> TrialReport | None:
        """Runs to the next report, and records it.

        Returns:
            The report; None if nothing more is to be done here: the trial has been taken away or
            put aside, or has ended, or the database is away. The rows say which. None also if it
            waits for its pack to run; it is not down then.
        """
        if self._is_down:
            return None
        self._listen(True)
        try:
            return self._next_report()
        except (FencedError, HaltedError) as error:
            _LOG.info("%s", error)
        except DatabaseError:
            _LOG.exception("trial %s: left where it is", self._trial_id)
        except Exception as error:
            self._fail(error)
        finally:
            self._listen(self._pack is None)
        self.close()
        return None

    def _listen(self, listens: bool) -> None:
        """Whether what this process says now is about this trial."""
        if self._log is not None:
            self._log.listens = listens

    def close(self) -> None:
        """Puts the trial down; its last checkpoint is whole then, and recorded."""
        if self._is_down:
            return
        self._is_down = True
        self._listen(True)
        reports, self._reports = self._reports, None
        try:
            if reports is not None:
                reports.close()
        except FencedError as error:
            _LOG.info("%s", error)
        except Exception:  # the one before it stands
            _LOG.exception("trial %s: its last checkpoint is lost", self._trial_id)
        self._tidy()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _tidy(self) -> None:
        """Removes what a trial no longer needs once it has ended, whoever ended it."""
        if self._attempt is None:
            return
        try:
            if self._superseded is None:
                self._superseded = self._ask(
                    lambda: self._attempts.forget_old_checkpoints(self._held)
                )
            self._remove(self._superseded)
        except (FencedError, DatabaseError) as error:
            _LOG.info("%s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_report(self) -> TrialReport | None:
        # What was decided on the last report is in the rows by now.
        if self._reports is not None and not self._waits:
            if self._ask(lambda: self._attempts.is_to_wait(self._held)):
                self.close()
                self._ask(lambda: self._attempts.wait(self._held))
                return None
            if self._pack is not None:  # one that was pruned; of itself Tune would stop a pack
                self._ask(lambda: self._attempts.check_holds(self._held))
        while True:
            try:
                if self._reports is None:
                    self._reports = self._begin()
                report = next(self._reports)
            except OutOfMemory as error:
                if error.microbatch_size <= 1:
                    raise
                _LOG.warning("%s; again with fewer at a time", error)
                self._reports = None
                self._ask(
                    lambda size=error.microbatch_size // 2: self._attempts.out_of_memory(
                        self._held, size
                    )
                )
                continue
            except PackTooLarge as error:
                _LOG.warning("%s; going on alone", error)
                self._reports = self._pack = None
                self._ask(lambda: self._attempts.out_of_memory(self._held))
                continue
            except (CheckpointError, PlaceError) as error:
                if isinstance(error, CheckpointError) and not self._has_begun:
                    raise
                # A disk is full or a store is away, most likely: others would fail alike, and
                # nothing is lost yet.
                self._ask(lambda why=str(error): self._attempts.pause(self._held, why))
                return None
            break
        self._waits = report is None
        if report is None:
            return None
        wish = self._record(report)
        if report.outcome != "running":
            assert self._reports is not None
            next(self._reports, None)  # nothing of it is needed again
            self.close()
        elif wish is Wish.PAUSE:
            self.close()
            self._ask(lambda: self._attempts.pause(self._held))
            return None
        return report

    @property
    def _held(self) -> Attempt:
        assert self._attempt is not None
        return self._attempt

    def _begin(self) -> Generator[TrialReport | None]:
        from trainer import loop  # JAX: only here, in the worker's environment
        from trainer.weights.checkpoints import first_readable

        worker = f"{socket.gethostname()}:{os.getpid()}"
        self._attempt = self._ask(lambda: self._attempts.begin(self._trial_id, worker=worker))
        given: Assignment = self._ask(lambda: self._attempts.assignment(self._trial_id))
        check_model_allowed(given.config.model.name)
        self._log = self._log or LogFile(self._home.trial_log(given.sweep_id, self._trial_id))
        _LOG.info("trial %s: attempt %d on %s", self._trial_id, self._attempt.number, worker)
        own = first_readable(map(self._places.get, given.checkpoints))
        fork_from = None
        if given.fork_from is not None and own.path is None:
            fork_from = first_readable(map(self._places.get, given.fork_from)).path
            if fork_from is None:
                raise CheckpointError("the checkpoint to fork from is gone or damaged")
        for reason in own.passed_over:
            _LOG.warning("%s", reason)
        self._sweep_id, self._last_step = given.sweep_id, given.config.iterations
        self._looked_at = time.monotonic()
        directory = self._home.checkpoint_dir(given.sweep_id, self._trial_id)
        run: Callable[..., Generator[TrialReport | None]] = loop.trial_reports
        if self._pack is not None:
            run = functools.partial(loop.packed_reports, self._pack)
        return run(
            given.config,
            data_home=self._home.data_dir,
            checkpoint_dir=directory / f"attempt-{self._attempt.number:04d}",
            resume_from=own.path,
            fork_from=fork_from,
            known_branches=given.branches,
            spent_before=given.spent_before,
            secrets_dir=self._home.secrets_dir,
            charge=self._charge,
            on_step=self._look,
            on_checkpoint=self._checkpoint,
            num_devices=None,  # Ray shows a worker what it was given, and no more
        )

    def _charge(self, branch: Branch, step: int) -> int:
        self._branch_id, self._has_begun = branch.branch_id, True
        return self._ask(lambda: self._attempts.charge(self._held, branch, step))

    def _checkpoint(self, step: int, path: Path) -> None:
        location = self._places.put(path, self._sweep_id, self._trial_id, self._held.number)
        if step == self._last_step:
            self._last_checkpoint = location
            return
        try:
            old = self._ask(lambda: self._attempts.checkpoint(self._held, step, location))
        except FencedError:  # nobody will ever know of it
            self._places.remove(location)
            raise
        self._remove(old)

    def _remove(self, locations: Sequence[str]) -> None:
        for location in locations:
            self._places.remove(location)

    def _look(self, _step: int) -> None:
        """Ends a trial that somebody took away, some seconds later at most."""
        if time.monotonic() - self._looked_at > _LOOK_EVERY_SECS:
            self._looked_at = time.monotonic()
            self._ask(lambda: self._attempts.check_holds(self._held))

    def _record(self, report: TrialReport) -> Wish:
        released = releasable(report)
        metrics = {name: released[name] for name in METRICS if name in released}
        end, reason = None, ""
        if report.outcome == "completed":
            end = TrialState.COMPLETED
        elif report.outcome == "diverged":
            end = TrialState.DIVERGED
            reason = f"the parameters were no longer finite at step {report.step}"
        # Fenced may also be who has recorded it and lost the answer: so it stays where it is.
        last, self._last_checkpoint = self._last_checkpoint, None
        told = self._ask(
            lambda: self._attempts.report(
                self._held,
                self._branch_id,
                report.step,
                metrics,
                end=end,
                reason=reason,
                checkpoint=last,
            )
        )
        self._superseded = None if end is None else told.superseded
        return told.wish

    def _fail(self, error: Exception) -> None:
        _LOG.error("trial %s failed", self._trial_id, exc_info=error)
        summary = f"{type(error).__name__}: {error}".strip()[:_MAX_REASON_CHARS]
        if self._attempt is None:
            return  # it did not even begin, and the rows say why
        hint = f"`dp-sweeps logs {self._trial_id}` says more"
        try:
            self._ask(lambda: self._attempts.fail(self._held, f"{summary} ({hint})"))
        except (FencedError, DatabaseError):
            _LOG.exception("trial %s: its failure could not be recorded", self._trial_id)

    def _ask(self, request: Callable[[], _T]) -> _T:
        """Asks the database, again and again if it is away for a while."""
        deadline = time.monotonic() + _DATABASE_PATIENCE_SECS
        pause = 0.1
        while True:
            try:
                return request()
            except DatabaseError as error:
                if time.monotonic() + pause > deadline:
                    raise
                _LOG.warning("%s; asking again", error)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECS)
