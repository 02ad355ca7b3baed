"""Whether a trial goes on: a sweep's scheduler, as rules that are asked and rows that remember.

It holds nothing itself, so whoever drives the sweep next decides alike.
"""

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.search import asha, median
from sweeps.spec.scheduler_spec import AsyncHyperBandSpec, MedianStoppingRuleSpec
from sweeps.spec.sweep_spec import SweepSpec


class Schedule:
    """Decides on the trials of a sweep.

    Args:
        spec: The sweep's specification.
        store: The driver's own.
    """

    def __init__(self, spec: SweepSpec, store: Store) -> None:
        self._spec, self._store = spec.scheduler, store
        self._max_iterations = int(spec.search_space.iterations.bounds()[1])

    def decide(self, trial_id: str) -> bool:
        """Makes the decisions on a trial that its reports ask for and nobody has made yet.

        Returns:
            Whether the trial goes on, as far as the scheduler is concerned.

        Raises:
            StoreError: If there is no such trial.
            DatabaseError: If the database fails; what was not decided is decided the next time.
        """
        spec, rungs = self._spec, self._store.rungs
        if isinstance(spec, AsyncHyperBandSpec):
            factor = spec.reduction_factor
            state = rungs.decide(
                trial_id,
                asha.milestones(spec.grace_period, self._max_iterations, factor),
                lambda utility, others: asha.goes_on(utility, others, factor),
            )
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
