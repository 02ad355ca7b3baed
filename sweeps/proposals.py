"""A search that goes on while its trials run: each proposal is admitted before it is a trial.

Whatever was proposed is a row with what became of it, refused or not, and that is all that the
search knows. So it has no state to lose, and whoever drives the sweep next goes on with it.
"""

import functools
from collections.abc import Callable, Sequence
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
        return self._end(self._rows())

    def is_complete(self) -> bool:
        """Whether as many were admitted as the search is to run."""
        return self._is_complete(self._rows())

    def propose(self) -> str | None:
        """Proposes a configuration; gives the trial's id if it is admitted.

        None if it was refused, or nothing more is proposed.

        Raises:
            StoreError: If the sweep does not run.
            SweepError: If the data set is not the one that the sweep began with.
        """
        rows = self._rows()
        if self._end(rows) is not None:
            return None
        from sweeps.search.tpe import propose  # Optuna takes a while to import

        last = self._store.last_reports(self._sweep_id)
        excess = self._excess_fn()
        tried = [_tried(row, last.get(row.trial_id), excess) for row in rows]
        setting = hyperparameters(propose(self._spec, tried, len(rows)))
        privacy = self._spec.privacy
        trial_id, state = self._store.add_trial(
            self._sweep_id,
            new_trial(self._sweep_id, self._proposer(len(rows), setting)),
            budget=privacy.budget,
            team=privacy.team or "",
        )
        return trial_id if state is TrialState.ADMITTED else None

    def _rows(self) -> list[sa.Row[Any]]:
        """What was proposed so far; forks were asked for by a person."""
        return [row for row in self._store.trials(self._sweep_id) if row.setting is not None]

    def _is_complete(self, rows: Sequence[sa.Row[Any]]) -> bool:
        admitted = sum(row.state != TrialState.REJECTED for row in rows)
        return admitted >= self._search.num_samples

    def _end(self, rows: Sequence[sa.Row[Any]]) -> str | None:
        if self._is_complete(rows):
            return ""
        refused = [row.state == TrialState.REJECTED for row in rows]
        most = self._search.max_refused
        if len(rows) < most or not all(refused[-most:]):
            return None
        return (
            f"the search has ended: its last {most} proposals (search.max_refused) were all "
            f"refused, the last for this reason: {rows[-1].reason}"
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


def _tried(
    row: sa.Row[Any], last: sa.Row[Any] | None, excess: Callable[[sa.Row[Any]], float]
) -> Tried:
    """What a search learns from a trial.

    Args:
        row: The trial.
        last: Its last report, if it has one.
        excess: How far one that was refused is over its limit.
    """
    state = TrialState(row.state)
    if state is TrialState.REJECTED:
        over = min(max(excess(row), _LITTLE), _FAR)
        return Tried(values=row.setting, outcome="refused", excess=over)
    outcome: Outcome = "failed"
    if state is TrialState.PAUSED and last is not None:
        outcome = "pruned"  # at a rung, as long as it waits there
    elif not state.is_finished:
        outcome = "running"
    elif state in _SAYS_SOMETHING:
        outcome = _SAYS_SOMETHING[state]
    return Tried(
        values=row.setting,
        outcome=outcome,
        utility=None if last is None else last.eval_accuracy,
        epsilon=None if last is None else last.epsilon,
        step=0 if last is None else last.step,
    )
