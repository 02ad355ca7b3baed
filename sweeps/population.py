"""Population based training on a sweep: who makes room at a perturbation, and for what.

The population comes to each perturbation together: who is there first waits, as under HyperBand.
Then each trial in the lower quantile is pruned, and a fork of one in the upper quantile takes its
place, as a trial of its own: with its own branch of noise, and admitted by the budget before it
exists. What follows depends on the rows and on ``search.seed`` alone.
"""

import logging
import random
import sys
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from sweeps.database.forking import RefusedFork
from sweeps.database.gatherings import Came, Gathering
from sweeps.database.store import Store
from sweeps.errors import CommandError, StoreError
from sweeps.forks import new_fork
from sweeps.home import Home
from sweeps.search import pbt
from sweeps.spec.scheduler_spec import PbtSpec
from sweeps.spec.sweep_spec import SweepSpec

_LOG = logging.getLogger(__name__)


class Population:
    """Decides on all trials of a sweep once they have gathered.

    Args:
        spec: A specification whose scheduler is `PbtSpec`.
        store: The driver's own.
        home: Where built-in data sets are kept.
    """

    def __init__(self, spec: SweepSpec, store: Store, home: Home) -> None:
        assert isinstance(spec.scheduler, PbtSpec)
        self._scheduler, self._seed = spec.scheduler, spec.search.seed
        self._store, self._home = store, home
        most = int(spec.search_space.iterations.bounds()[1])
        interval = self._scheduler.perturbation_interval
        self._perturbations = range(interval, most, interval)

    def rungs_of(self, trial: sa.Row[Any]) -> list[int]:
        """Where a trial waits for the others, in steps."""
        return [rung for rung in self._perturbations if rung > (trial.parent_step or 0)]

    def promotable(self, sweep_id: str) -> str | None:
        """A trial of which something is to be decided now; None if there is none."""
        for gathering in self._gathered(sweep_id):
            return next(trial.trial_id for trial in gathering.there if trial.waits)
        return None

    def promote(self, sweep_id: str, *, more_to_come: bool) -> str | None:
        """Makes the next decision on a population that has gathered.

        Those in the lower quantile come first, for the others' checkpoints are there as long as
        these wait.

        Args:
            sweep_id: The sweep.
            more_to_come: Never: the population is there from the beginning.

        Returns:
            The id of the trial that may run in consequence: a fork, or one that goes on. None if
            there is none now.

        Raises:
            accounting.AccountingError: If the data is not that of the sweep.
        """
        assert not more_to_come
        for gathering in self._gathered(sweep_id):
            there = gathering.there
            utilities = [trial.utility for trial in there]
            fraction = self._scheduler.quantile_fraction
            lower, upper = pbt.quantiles(utilities, fraction)
            best = [there[place] for place in upper]
            for trial in (there[place] for place in lower if there[place].waits):
                if found := self._exploit(gathering, trial, best):
                    return found
            for trial in (each for each in there if each.waits):
                if self._store.gatherings.go_on(trial.trial_id, gathering.rung):
                    return trial.trial_id
        return None

    def _gathered(self, sweep_id: str) -> list[Gathering]:
        return self._store.gatherings.found(sweep_id, lambda _: range(sys.maxsize))

    def _exploit(self, gathering: Gathering, trial: Came, best: Sequence[Came]) -> str | None:
        """Has a fork of one of the best take a trial's place, or lets the trial go on.

        Gives the id of whichever may run; None if the trial does not wait any more.
        """
        gatherings, rung = self._store.gatherings, gathering.rung
        rng = random.Random(f"{self._seed}/{trial.number}/{rung}")
        parent = rng.choice(best)
        changes = self._explored(parent, rng)
        why = (
            f"eval_accuracy {trial.utility:.4f} at step {trial.step} was in the lower quantile of "
            f"the {len(gathering.there)} trials at step {rung}"
        )
        try:
            new = new_fork(self._store, self._home, parent.trial_id, changes, exempt=False)
            return gatherings.replace(trial.trial_id, rung, new, why)
        except StoreError as error:  # whoever had it waited before it had a checkpoint
            _LOG.warning("trial %s goes on: %s", trial.trial_id, error)
            return trial.trial_id if gatherings.go_on(trial.trial_id, rung) else None
        except CommandError as error:  # less noise than quantile clipping needs, say
            refused = RefusedFork(
                parent_trial_id=parent.trial_id,
                parent_step=parent.step,
                config={**self._config_of(parent), **changes},
                epsilon=None,
                reason=str(error.__cause__ or error),
            )
            return gatherings.keep(trial.trial_id, rung, refused)

    def _explored(self, parent: Came, rng: random.Random) -> dict[str, Any]:
        mutations = self._scheduler.hyperparam_mutations.given()
        values = self._config_of(parent)
        return pbt.explore(values, mutations, self._scheduler.resample_probability, rng)

    def _config_of(self, trial: Came) -> dict[str, Any]:
        row = self._store.trial(trial.trial_id)
        assert row is not None  # it came there
        return row.config
