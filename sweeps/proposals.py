"""A search that goes on while its trials run: each proposal is admitted before it is a trial.

Whatever was proposed is a row with what became of it, refused or not, and that is all that the
search knows. So it has no state to lose, and whoever drives the sweep next goes on with it.

A configuration may be several rows, its repeats. The search learns from them together: the mean of
those that have finished, and the worst of how they did.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from accounting.renyi import epsilon_of_rdp
from sweeps.admission import Proposer, describe_dataset
from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.errors import SweepError
from sweeps.home import Home
from sweeps.limits import limit_of
from sweeps.search.tried import Outcome, Tried
from sweeps.search_space import hyperparameters
from sweeps.service import new_trial
from sweeps.spec.search_spec import OptunaSpec
from sweeps.spec.sweep_spec import SweepSpec

# By how much a trial that was refused is taken to be over its limit at least: it was, then.
_LITTLE = 0.01
# By how much at most: where no bound is known at all.
_FAR = 1e6
# Of several repeats the worst counts; while none has finished, they run.
_WORST_FIRST: tuple[Outcome, ...] = ("diverged", "pruned", "completed", "running", "failed")
_SAYS_SOMETHING: dict[TrialState, Outcome] = {
    TrialState.COMPLETED: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.DIVERGED: "diverged",
}


class Proposals:
    """What a sweep's search proposes beyond what was listed.

    Args:
        spec: A specification whose search is `OptunaSpec`.
        sweep_id: Its sweep.
        store: The driver's own.
        home: Where built-in data sets are kept.
    """

    def __init__(self, spec: SweepSpec, sweep_id: str, store: Store, home: Home) -> None:
        assert isinstance(spec.search, OptunaSpec)
        self._spec, self._search = spec, spec.search
        self._sweep_id, self._store, self._home = sweep_id, store, home

    def end(self) -> str | None:
        """Why nothing more is proposed, in words for a person; None while something is."""
        return self._end(self._configurations())

    def is_complete(self) -> bool:
        """Whether as many were admitted as the search is to run."""
        return self._is_complete(self._configurations())

    def propose(self) -> list[str]:
        """Proposes a configuration; gives the ids of its trials, as many as it has repeats.

        None of them if it was refused, or nothing more is proposed.

        Raises:
            StoreError: If the sweep does not run.
            SweepError: If the data set is not the one that the sweep began with.
        """
        proposed = self._configurations()
        if self._end(proposed) is not None:
            return []
        from sweeps.search.tpe import propose  # Optuna takes a while to import

        last = self._store.last_reports(self._sweep_id)
        excess = self._excess_fn()
        tried = [_tried(repeats, last, excess) for repeats in proposed]
        setting = hyperparameters(propose(self._spec, tried, len(proposed)))
        privacy = self._spec.privacy
        repeats = self._proposer(0, setting).repeated(self._search.repeats)
        return self._store.add_trials(
            self._sweep_id,
            [new_trial(self._sweep_id, proposal) for proposal in repeats],
            budget=privacy.budget,
            team=privacy.team or "",
        )

    def _configurations(self) -> list[list[sa.Row[Any]]]:
        """What was proposed so far, each with its repeats; forks were asked for by a person."""
        found: dict[str, list[sa.Row[Any]]] = {}
        for row in self._store.trials(self._sweep_id):
            if row.setting is not None:
                found.setdefault(row.repeat_of or row.trial_id, []).append(row)
        return list(found.values())

    def _is_complete(self, proposed: Sequence[Sequence[sa.Row[Any]]]) -> bool:
        admitted = sum(not _is_refused(repeats) for repeats in proposed)
        return admitted >= self._search.num_samples

    def _end(self, proposed: Sequence[Sequence[sa.Row[Any]]]) -> str | None:
        if self._is_complete(proposed):
            return ""
        refused = [_is_refused(repeats) for repeats in proposed]
        most = self._search.max_refused
        if len(proposed) < most or not all(refused[-most:]):
            return None
        return (
            f"the search has ended: its last {most} proposals (search.max_refused) were all "
            f"refused, the last for this reason: {proposed[-1][-1].reason}"
        )

    @functools.cached_property
    def _proposer(self) -> Proposer:
        dataset = describe_dataset(self._spec, self._home.data_dir)
        if dataset.fingerprint != self._store.sweep(self._sweep_id).dataset_fingerprint:
            raise SweepError(
                f"sweep {self._sweep_id}: its data set {dataset.name} has changed since it began"
            )
        budget = self._store.ledger.budget(self._spec.privacy.budget or self._sweep_id)
        return Proposer(self._spec, dataset, budget.terms)

    def _excess_fn(self) -> Callable[[sa.Row[Any]], float]:
        """How far a trial that was refused is over its limit, as things are now, in epsilon."""
        privacy = self._spec.privacy
        limit = limit_of(privacy.model_dump(mode="json")).epsilon
        account = self._store.ledger.account(privacy.budget or self._sweep_id)
        terms, is_open = account.terms, account.terms.policy == "open"
        free = account.free_rdp(privacy.team or "") if is_open else 0.0

        def excess(row: sa.Row[Any]) -> float:
            if is_open and row.needed_rdp is not None:  # by how much the budget was too small
                total = terms.rdp_limit + row.needed_rdp - free
                return epsilon_of_rdp(total, terms.delta, terms.order) / terms.epsilon - 1.0
            return _FAR if row.planned_epsilon is None else row.planned_epsilon / limit - 1.0

        return excess


def _is_refused(repeats: Sequence[sa.Row[Any]]) -> bool:
    return all(row.state == TrialState.REJECTED for row in repeats)


def _tried(
    repeats: Sequence[sa.Row[Any]],
    last: Mapping[str, sa.Row[Any]],
    excess: Callable[[sa.Row[Any]], float],
) -> Tried:
    """What a search learns from a configuration.

    Args:
        repeats: Its trials.
        last: The last reports of trials that have one.
        excess: How far one that was refused is over its limit.
    """
    setting = repeats[0].setting
    if _is_refused(repeats):
        over = min(max(excess(repeats[0]), _LITTLE), _FAR)
        return Tried(values=setting, outcome="refused", excess=over)
    outcomes: list[Outcome] = [
        _outcome(TrialState(row.state), row.trial_id in last) for row in repeats
    ]
    outcome: Outcome = next(worst for worst in _WORST_FIRST if worst in outcomes)
    if outcome not in _SAYS_SOMETHING.values():
        return Tried(values=setting, outcome=outcome)
    told = [
        last.get(row.trial_id)
        for row, one in zip(repeats, outcomes, strict=True)
        if one in _SAYS_SOMETHING.values()
    ]

    def of_all(field: str, summary: Callable[[list[float]], float]) -> float | None:
        numbers: list[Any] = [getattr(report, field, None) for report in told]
        return None if None in numbers else summary(numbers)

    return Tried(
        values=setting,
        outcome=outcome,
        utility=of_all("eval_accuracy", statistics.fmean),
        epsilon=of_all("epsilon", max),
        step=min(0 if report is None else report.step for report in told),
    )


def _outcome(state: TrialState, has_reported: bool) -> Outcome:
    """What has become of one trial."""
    if state is TrialState.PAUSED and has_reported:
        return "pruned"  # at a rung, as long as it waits there
    return _SAYS_SOMETHING.get(state, "failed") if state.is_finished else "running"
