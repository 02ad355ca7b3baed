"""A small private selection, and a worker of it that is a process of its own.

    python -m tests.sweeps.small_selection NUMBER STEP

takes the selection up in the home that the environment names, and kills itself as `kill -9` would
when trial NUMBER has noted in its own charges that it has come to STEP.
"""

import os
import signal
import sys

from sweeps.admission import prepare_dataset
from sweeps.database.store import open_store
from sweeps.home import Home
from sweeps.search.selection_draws import SelectionDraws
from sweeps.selection_folder import Progress, SelectionFolder
from sweeps.selection_run import SelectionRun
from sweeps.service import make_plan, record
from tests.sweeps.selections import UNITS, paid_for, text_of
from trainer.alone.charges import FileCharges

STEPS, EVERY = 12, 4


class Selection:
    """A recorded selection, its home, and what it will draw."""

    def __init__(self, home, store, trial_id, spec):
        self.home, self.store, self.trial_id, self.spec = home, store, trial_id, spec

    @property
    def folder(self):
        return SelectionFolder(self.home.secrets_dir, self.trial_id)

    @property
    def progress(self):
        progress = self.folder.read()
        assert progress is not None
        return progress

    @property
    def draws(self):
        return SelectionDraws(self.progress.secret, self.spec, paid_for(self.spec), UNITS)

    @property
    def row(self):
        row = self.store.trial(self.trial_id)
        assert row is not None
        return row

    @property
    def sweep_id(self):
        return str(self.row.sweep_id)

    def run_on(self):
        """Takes it up; gives what the worker tells Tune, which is nothing or the winner."""
        with SelectionRun(self.store, self.home, self.trial_id) as run:
            return run.next_report()

    def end(self):
        """Takes it up, and gives the winner."""
        report = self.run_on()
        assert report is not None
        return report


def submitted(path, data_dir, secret=None, *law, **more):
    """A selection that is recorded, with a secret of one's own if one is given."""
    home = Home.from_environment({"DP_SWEEPS_HOME": str(path / "home")})
    home.create()
    home.data_dir.symlink_to(data_dir)
    spec_path = path / "spec.yaml"
    spec_path.write_text(text_of(*law, **more))
    plan = make_plan(spec_path, home)
    prepare_dataset(plan.spec, home.data_dir)
    store = open_store(home)
    sweep_id = record(plan, store)
    trial_id = f"{sweep_id}-0000"
    if secret is not None:
        folder = SelectionFolder(home.secrets_dir, trial_id)
        with folder.held(0.0):
            folder.write(Progress(secret=secret))
    return Selection(home, store, trial_id, plan.spec)


def _main(number, stop_at):
    charge = FileCharges.charge

    def charge_and_die(self, branch, step):
        total = charge(self, branch, step)
        if step == stop_at and self._path.parent.name == f"trial-{number}":
            os.kill(os.getpid(), signal.SIGKILL)
        return total

    FileCharges.charge = charge_and_die  # pyright: ignore[reportAttributeAccessIssue]
    home = Home.from_environment()
    store = open_store(home)
    (sweep,) = store.sweeps()
    (trial,) = store.trials(sweep.sweep_id)
    with SelectionRun(store, home, trial.trial_id) as run:
        run.next_report()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
