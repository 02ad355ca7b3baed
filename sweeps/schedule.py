"""Whether a trial goes on: a sweep's scheduler, as rules that are asked and rows that remember.

It holds nothing itself, so whoever drives the sweep next decides alike.
"""

from collections.abc import Sequence

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.halving import Halving
from sweeps.home import Home
from sweeps.population import Population
from sweeps.search import asha, median
from sweeps.spec.scheduler_spec import (
    AsyncHyperBandSpec,
    HyperBandSpec,
    MedianStoppingRuleSpec,
    PbtSpec,
)
from sweeps.spec.sweep_spec import SweepSpec


class Schedule:
    """Decides on the trials of a sweep.

    Args:
        spec: The sweep's specification.
        store: The driver's own.
        home: Where built-in data sets are kept.
    """

    def __init__(self, spec: SweepSpec, store: Store, home: Home) -> None:
        self._spec, self._store = spec.scheduler, store
        self._max_iterations = int(spec.search_space.iterations.bounds()[1])
        # What decides on many at once, where each waits for the others.
        self._together: Halving | Population | None = None
        if isinstance(self._spec, HyperBandSpec):
            self._together = Halving(spec, store)
        elif isinstance(self._spec, PbtSpec):
            self._together = Population(spec, store, home)

    @property
    def promotes(self) -> bool:
        """Whether trials wait at rungs until they may go on."""
        if isinstance(self._spec, AsyncHyperBandSpec):
            return self._spec.promotion
        return self._together is not None

    def promotable(self, sweep_id: str) -> str | None:
        """Which trial that waits at a rung may go on first, if no more trials come."""
        if self._together is not None:
            return self._together.promotable(sweep_id)
        return self._store.rungs.promotable(sweep_id, self._best) if self.promotes else None

    def promote(self, sweep_id: str, *, more_to_come: bool = False) -> str | None:
        """Lets the first trial go on that waits at a rung and may, or one run in its place.

        Args:
            sweep_id: The sweep.
            more_to_come: Whether its search goes on, for whose trials others may have to wait.

        Returns:
            The trial's id; None if there is none now.
        """
        if self._together is not None:
            return self._together.promote(sweep_id, more_to_come=more_to_come)
        return self._store.rungs.promote(sweep_id, self._best) if self.promotes else None

    def _best(self, utilities: Sequence[float]) -> list[int]:
        assert isinstance(self._spec, AsyncHyperBandSpec)
        return asha.best(utilities, self._spec.reduction_factor)

    def may_be_taken_up(self, trial_id: str) -> bool:
        """Whether a trial that nobody works on goes on now; one that is to wait is set aside."""
        return self.decide(trial_id) and not self._store.rungs.set_aside(trial_id)

    def decide(self, trial_id: str) -> bool:
        """Makes the decisions on a trial that its reports ask for and nobody has made yet.

        Returns:
            False if it is pruned. One that is to wait at a rung is set aside by its worker.

        Raises:
            StoreError: If there is no such trial.
            DatabaseError: If the database fails; what was not decided is decided the next time.
        """
        spec, rungs = self._spec, self._store.rungs
        if isinstance(spec, AsyncHyperBandSpec):
            factor = spec.reduction_factor

            def goes_on(utility: float, others: Sequence[float]) -> bool:
                if spec.promotion:
                    return len(others) in asha.best([*others, utility], factor)
                return asha.goes_on(utility, others, factor)

            state = rungs.decide(
                trial_id,
                asha.milestones(spec.grace_period, self._max_iterations, factor),
                goes_on,
                may_wait=spec.promotion,
            )
        elif self._together is not None:
            trial = self._store.trial(trial_id)
            milestones = [] if trial is None else self._together.rungs_of(trial)
            state = rungs.decide(trial_id, milestones, lambda _, __: False, may_wait=True)
        elif isinstance(spec, MedianStoppingRuleSpec):
            fewest = spec.min_samples_required
            state = rungs.decide_by_means(
                trial_id,
                spec.grace_period,
                lambda best, means: median.goes_on(best, means, fewest),
            )
        else:
            return True
        return state is not TrialState.PRUNED
