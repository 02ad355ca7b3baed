"""HyperBand on a sweep: who goes on from a rung, once its whole bracket has come there."""

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from sweeps.database.gatherings import Came, Gathering
from sweeps.database.store import Store
from sweeps.search import hyperband
from sweeps.spec.scheduler_spec import HyperBandSpec
from sweeps.spec.sweep_spec import SweepSpec


class Halving:
    """Decides on brackets that have gathered at a rung.

    Args:
        spec: A specification whose scheduler is `HyperBandSpec`.
        store: The driver's own.
    """

    def __init__(self, spec: SweepSpec, store: Store) -> None:
        assert isinstance(spec.scheduler, HyperBandSpec)
        self._factor = spec.scheduler.reduction_factor
        self._gatherings = store.gatherings
        self._brackets = hyperband.one_round(
            spec.scheduler.grace_period or spec.report_every_steps,
            int(spec.search_space.iterations.bounds()[1]),
            self._factor,
        )

    def rungs_of(self, trial: sa.Row[Any]) -> list[int]:
        """Where a trial waits for the others of its bracket, in steps."""
        return [*hyperband.bracket_of(trial.number, self._brackets).rungs]

    def promotable(self, sweep_id: str) -> str | None:
        """Which trial may go on first, if no more trials come; None if none may now."""
        for _, best, _ in self._decided(sweep_id, more_to_come=False):
            if waiting := [trial for trial in best if trial.waits]:
                return waiting[0].trial_id
        return None

    def promote(self, sweep_id: str, *, more_to_come: bool) -> str | None:
        """Prunes who is not among the best of its bracket, and lets the first of these go on.

        Args:
            sweep_id: The sweep.
            more_to_come: Whether trials may yet be added to the last bracket.

        Returns:
            The id of the trial that goes on; None if none may now.
        """
        promoted = None
        for gathering, best, rest in self._decided(sweep_id, more_to_come=more_to_come):
            for trial in (each for each in rest if each.waits):
                reason = (
                    f"eval_accuracy {trial.utility:.4f} at step {trial.step} was not among the "
                    f"best {len(best)} of the {len(gathering.there)} of its bracket that came to "
                    f"step {gathering.rung}"
                )
                self._gatherings.prune(trial.trial_id, gathering.rung, reason)
            for trial in (each for each in best if each.waits):
                if promoted is None and self._gatherings.go_on(trial.trial_id, gathering.rung):
                    promoted = trial.trial_id
        return promoted

    def _decided(
        self, sweep_id: str, *, more_to_come: bool
    ) -> Iterator[tuple[Gathering, list[Came], list[Came]]]:
        """Each gathering with its best, the very best first, and with the rest."""

        def group_of(number: int) -> range:
            return hyperband.bracket_of(number, self._brackets).numbers

        for gathering in self._gatherings.found(sweep_id, group_of, more_to_come=more_to_come):
            there = gathering.there
            places = hyperband.best([trial.utility for trial in there], self._factor)
            rest = [trial for place, trial in enumerate(there) if place not in places]
            yield gathering, [there[place] for place in places], rest
