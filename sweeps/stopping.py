"""Whether a sweep has come to where its specification says that no other trial begins.

Everything is read from the rows, so that a sweep which was interrupted stops where it would have.
"""

import time
from collections.abc import Iterator, Sequence

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.spec.sweep_spec import SweepSpec

_HAS_RUN = (TrialState.COMPLETED, TrialState.PRUNED)


def why_to_stop(spec: SweepSpec, sweep_id: str, store: Store) -> str:
    """The rule of the stop section that holds, in words; empty if none does.

    Args:
        spec: The sweep's specification.
        sweep_id: The sweep.
        store: The driver's own.

    Raises:
        StoreError: If there is no such sweep.
    """
    return next(_holding(spec, sweep_id, store), "")


def _holding(spec: SweepSpec, sweep_id: str, store: Store) -> Iterator[str]:
    rules = spec.stop
    if rules.utility is not None:
        best = store.best_utility(sweep_id)
        if best is not None and best >= rules.utility:
            yield f"stop.utility: {best:.4f} was reached, of {rules.utility:g}"
    if rules.trials is not None:
        ended = sum(row.state in _HAS_RUN for row in store.trials(sweep_id))
        if ended >= rules.trials:
            yield f"stop.trials: {ended} have run"
    if rules.epsilon is not None or rules.budget_left is not None:
        yield from _of_budget(spec, sweep_id, store)
    if rules.time_budget_s is not None or rules.accelerator_hours is not None:
        times = store.attempt_times(sweep_id)
        yield from _of_time(spec, times, time.time())


def _of_budget(spec: SweepSpec, sweep_id: str, store: Store) -> Iterator[str]:
    rules, privacy = spec.stop, spec.privacy
    status = store.ledger.status(privacy.budget or sweep_id)
    level = status.teams.get(privacy.team or "", status.level)
    if rules.epsilon is not None and level.epsilon_spent >= rules.epsilon:
        yield f"stop.epsilon: {level.epsilon_spent:.4g} is spent, of {rules.epsilon:g}"
    left = 1.0 - (level.spent + level.reserved) / level.limit
    if rules.budget_left is not None and left <= rules.budget_left:
        yield f"stop.budget_left: {left:.4g} of the budget is left, of {rules.budget_left:g}"


def _of_time(
    spec: SweepSpec, times: Sequence[tuple[str, float, float | None]], now: float
) -> Iterator[str]:
    rules, resources = spec.stop, spec.resources
    spans = sorted((start, now if end is None else end) for _, start, end in times)
    busy = busy_secs(spans)
    if rules.time_budget_s is not None and busy >= rules.time_budget_s:
        yield f"stop.time_budget_s: trials have run for {busy:.0f} s, of {rules.time_budget_s:g}"
    devices = resources.gpus_per_trial or resources.cpus_per_trial
    of_workers: dict[str, list[tuple[float, float]]] = {}
    for worker, start, end in sorted(times, key=lambda each: each[1]):
        of_workers.setdefault(worker, []).append((start, now if end is None else end))
    # A worker may have several trials at once.
    hours = sum(map(busy_secs, of_workers.values())) * devices / 3600
    if rules.accelerator_hours is not None and hours >= rules.accelerator_hours:
        yield f"stop.accelerator_hours: {hours:.3g} are spent, of {rules.accelerator_hours:g}"


def busy_secs(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of some spans of time lasts, by their starts in order, in seconds."""
    total, covered = 0.0, float("-inf")
    for start, end in spans:
        total += max(end - max(start, covered), 0.0)
        covered = max(covered, end)
    return total
