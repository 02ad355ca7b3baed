"""A worker's private selection: trials run in secret, one after the other; the winner is shown.

    begin an attempt -> charge all of it -> train the trials -> release the winner, forget the rest

Nothing leaves this process before the winner does: Tune hears of no report, the database's rows
stay as they are, nothing is logged or printed (`sweeps.unseen`), and what is needed to go on after
a crash lies in `secrets/` alone (`sweeps.selection_folder`). One worker runs all trials, on all
devices that it was given: two workers would show by their comings and goings how many trials there
are and how long each takes.

A trial that a crash interrupts goes on from its checkpoint. Where its noise cannot be repeated
(another machine, another version) it takes steps again with new noise and pays nothing for that:
nobody has seen the old ones, so what the trial releases has the distribution that was paid for.
"""

import dataclasses
import logging
import os
import socket
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from sweeps.admission import describe_dataset, num_units
from sweeps.database.attempts import MAX_LOST
from sweeps.database.selecting import SelectionAssignment, Winner
from sweeps.database.states import TrialState, Wish
from sweeps.database.store import Store
from sweeps.errors import DatabaseError, FencedError, PlaceError, StoreError, SweepError
from sweeps.home import Home
from sweeps.log_file import LogFile
from sweeps.search.selection_draws import DrawnTrial, SelectionDraws
from sweeps.selection_folder import Progress, SelectionFolder, last_step
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.user_models import check_model_allowed
from sweeps.worker import TrialRun
from trainer.config import TrialConfig
from trainer.errors import CheckpointError, DatasetError, ModelError, OutOfMemory
from trainer.mechanism.branch import Branch
from trainer.reporting import TrialReport, releasable

if TYPE_CHECKING:
    from trainer.pack import Pack

_LOG = logging.getLogger(__name__)
_PATIENCE_SECS = 60.0
# Errors that speak of the sweep as a whole, and of no trial.
_TELL_OF_NO_TRIAL = (SweepError, DatasetError, ModelError, OutOfMemory)
_NO_ROOM = (
    "a checkpoint cannot be kept or read; what was said of it is not shown, for it may tell of a "
    "trial that stays secret. Is there room on the disk, and can the place of checkpoints be "
    "reached?"
)


class SelectionRun(TrialRun):
    """One private selection in this process.

    Args:
        store: The database.
        home: Where state lives.
        trial_id: The trial that stands for the selection.
    """

    def __init__(
        self, store: Store, home: Home, trial_id: str, pack: "Pack | None" = None
    ) -> None:
        super().__init__(store, home, trial_id, pack)
        self._store, self._selections = store, store.selections
        self._folder = SelectionFolder(home.secrets_dir, trial_id)
        self._progress: Progress
        self._branch: Branch | None = None

    def _next_report(self) -> TrialReport | None:
        """Runs all of the selection; gives the winner's last report."""
        given = self._take_up()
        with self._folder.held(_PATIENCE_SECS):
            report = self._run(given)
        self.close()
        return report

    def _run(self, given: SelectionAssignment) -> TrialReport | None:
        self._progress = self._kept(given)
        draws = self._draws(given)
        if not given.has_begun:  # last, for what goes wrong before it costs nothing
            self._ask(lambda: self._selections.begin(self._held))
        from sweeps.unseen import unseen  # JAX: only here, in the worker's environment

        reason = ""
        try:
            with unseen(self._folder.cache):
                over = self._train_all(draws)
                winner = self._winner(draws) if over else None
        except (CheckpointError, PlaceError):
            # A disk is full or a store is away, most likely: nothing is lost yet.
            over, winner, reason = False, None, _NO_ROOM
        if over:
            return self._release(given, winner)
        self._ask(lambda: self._attempts.pause(self._held, reason))
        return None

    # -- beginning ----------------------------------------------------------------------------

    def _take_up(self) -> SelectionAssignment:
        worker = f"{socket.gethostname()}:{os.getpid()}"
        self._attempt = self._ask(lambda: self._attempts.begin(self._trial_id, worker=worker))
        given = self._ask(lambda: self._selections.assignment(self._trial_id))
        self._sweep_id = given.sweep_id
        self._log = LogFile(self._home.trial_log(given.sweep_id, self._trial_id))
        _LOG.info("trial %s: attempt %d on %s", self._trial_id, self._attempt.number, worker)
        return given

    def _kept(self, given: SelectionAssignment) -> Progress:
        """Where the selection is; of one that begins, its secret is drawn.

        Raises:
            SweepError: If it has begun and its secret is gone, or too many workers died over it.
        """
        if not given.has_begun:
            return self._folder.begin()
        progress = self._folder.read()
        if progress is None:
            raise SweepError(
                "the secret of its private selection is gone from this machine's secrets; to draw "
                "the number of its trials again would be another selection, so it has failed, and "
                "what it cost stays spent"
            )
        lost = self._ask(lambda: self._selections.lost_since(self._held, progress.attempt))
        if lost >= MAX_LOST:
            raise StoreError(f"{lost} workers died over it without getting any further")
        return progress

    def _draws(self, given: SelectionAssignment) -> SelectionDraws:
        spec = SweepSpec.model_validate(given.spec)
        check_model_allowed(spec.model.name)
        dataset = describe_dataset(spec, self._home.data_dir)
        if dataset.fingerprint != given.dataset_fingerprint:
            raise SweepError(f"its data set {dataset.name} has changed since the sweep began")
        units = num_units(spec, dataset)
        return SelectionDraws(self._progress.secret, spec, given.selection, units)

    # -- training -----------------------------------------------------------------------------

    def _train_all(self, draws: SelectionDraws) -> bool:
        """Trains what is left; False if somebody asked for a pause."""
        while self._progress.number < draws.count:
            if not self._train(draws.trial(self._progress.number)):
                return False
        return True

    def _train(self, trial: DrawnTrial) -> bool:
        """Trains one trial to its end; False if somebody asked for a pause."""
        while True:
            config = self._fitting(trial.config)
            try:
                with closing(self._reports_of(config)) as reports:
                    for report in reports:
                        if not self._goes_on(report):
                            return False
                return True
            except OutOfMemory as error:
                if error.microbatch_size <= 1:
                    raise
                self._keep(microbatch_size=error.microbatch_size // 2)
            except CheckpointError:
                if self._branch is not None or not self._progress.curve:
                    raise
                # What is there of it cannot be gone on with, and nobody has seen it.
                self._folder.forget(self._progress.number)
                self._keep(curve=())

    def _fitting(self, config: TrialConfig) -> TrialConfig:
        size = self._progress.microbatch_size
        if size is None:
            return config
        clipping = dataclasses.replace(config.clipping, microbatch_size=size)
        return dataclasses.replace(config, clipping=clipping)

    def _reports_of(self, config: TrialConfig) -> Generator[TrialReport]:
        from trainer.alone.charges import FileCharges, charged_terms
        from trainer.loop import trial_reports
        from trainer.weights.checkpoint_writer import checkpoint_path, checkpoints_in
        from trainer.weights.checkpoints import first_readable

        place = self._folder.trial(self._progress.number)
        place.mkdir(mode=0o700, exist_ok=True)
        path = place / "charges.json"
        charges = FileCharges(path, charged_terms(config), create=not path.exists())
        self._branch = None

        def charge(branch: Branch, step: int) -> int:
            self._branch = branch
            return charges.charge(branch, step)

        # One further on would leave the report between out of the curve.
        directory, reported = place / "checkpoints", last_step(self._progress.curve)
        newest = checkpoint_path(directory, reported)
        own = first_readable(each for each in checkpoints_in(directory) if each <= newest)
        begins_at = 0 if own.manifest is None else own.manifest.step
        curve = tuple(each for each in self._progress.curve if each["step"] <= begins_at)
        self._keep(curve=curve)
        return trial_reports(
            config,
            data_home=self._home.data_dir,
            checkpoint_dir=directory,
            resume_from=own.path,
            known_branches=charges.branches,
            secrets_dir=place / "keys",
            charge=charge,
            on_step=self._look,
            num_devices=None,  # Ray shows a worker what it was given, and no more
        )

    def _goes_on(self, report: TrialReport) -> bool:
        """Notes a report; False if somebody asked for a pause and the trial has not ended."""
        curve = (*self._progress.curve, releasable(report))
        progress = dataclasses.replace(self._progress, curve=curve, attempt=self._held.number)
        if report.outcome != "running":
            assert self._branch is not None  # it is charged
            self._write(progress.with_ended(self._branch.branch_id))
            return True
        self._write(progress)
        return self._ask(lambda: self._selections.wish(self._sweep_id)) is not Wish.PAUSE

    def _keep(self, **changes: Any) -> None:
        self._write(dataclasses.replace(self._progress, **changes))

    def _write(self, progress: Progress) -> None:
        self._folder.write(progress)
        self._progress = progress

    # -- ending -------------------------------------------------------------------------------

    def _winner(self, draws: SelectionDraws) -> Winner | None:
        """The best trial, its checkpoint where those of any trial are; None if there was none."""
        from trainer.weights.checkpoint_writer import checkpoint_path
        from trainer.weights.checkpoints import write_anew

        best, attempt = self._progress.best, self._held.number
        if best is None:
            return None
        drawn, step = draws.trial(best.number), last_step(best.curve)
        # Anew, for the time at which the first was written would tell which of them it was.
        directory = self._home.checkpoint_dir(self._sweep_id, self._trial_id)
        written = checkpoint_path(directory / f"attempt-{attempt:04d}", step)
        write_anew(checkpoint_path(self._folder.trial(best.number) / "checkpoints", step), written)
        return Winner(
            setting=dataclasses.asdict(drawn.setting),
            config=drawn.shown,
            trial_config=drawn.config,
            branch_id=best.branch_id,
            curve=best.curve,
            location=self._places.put(written, self._sweep_id, self._trial_id, attempt),
        )

    def _release(self, given: SelectionAssignment, winner: Winner | None) -> TrialReport | None:
        try:
            self._ask(lambda: self._selections.release(self._held, winner))
        except FencedError:
            if winner is not None:
                self._places.remove(winner.location)
            raise
        self._folder.remove()
        if winner is None:
            return None
        last: dict[str, Any] = {"eval_accuracy": None, "eval_loss": None, **winner.curve[-1]}
        last["epsilon"] = given.epsilon
        return TrialReport(**last)

    def _fail(self, error: Exception) -> None:
        """Ends the selection, and says why only as far as that tells of no trial."""
        what = type(error).__name__
        if isinstance(error, _TELL_OF_NO_TRIAL):
            what = f"{what}: {error}"
        else:
            what += (
                " in one of its trials; what it said is not shown, for it may tell of a trial "
                "that stays secret. The same specification under declared, on data that need no "
                "protection, shows it"
            )
        _LOG.error("trial %s failed: %s", self._trial_id, what)
        if self._attempt is None:
            return  # it did not even begin, and the rows say why
        try:
            self._ask(lambda: self._attempts.fail(self._held, what))
        except (FencedError, DatabaseError):
            _LOG.exception("trial %s: its failure could not be recorded", self._trial_id)

    def _tidy(self) -> None:
        super()._tidy()
        try:
            row = self._ask(lambda: self._store.trial(self._trial_id))
        except DatabaseError as error:  # its driver does it
            _LOG.info("%s", error)
            return
        if row is not None and TrialState(row.state).is_finished:
            self._folder.remove()
