"""Which sweep and which trials a person means: by name, or the newest, the best, the pruned."""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.errors import CommandError, StoreError
from sweeps.report.results import SweepResults, read_results


def sweep_id_of(store: Store, given: str | None) -> str:
    """The sweep that a person named, or the newest.

    Raises:
        StoreError: If there is no such sweep, or none at all.
    """
    if given is not None:
        return str(store.sweep(given).sweep_id)
    newest = store.sweeps()
    if not newest:
        raise StoreError("the ledger holds no sweep yet; start one with `dp-sweeps run`")
    return str(newest[0].sweep_id)


def results_of(store: Store, sweep_id: str | None) -> SweepResults:
    """A sweep's results; the newest sweep's for None.

    Raises:
        StoreError: If there is no such sweep, or none at all.
    """
    return read_results(store, sweep_id_of(store, sweep_id))


def trial_row(store: Store, trial_id: str) -> sa.Row[Any]:
    """A trial's row.

    Raises:
        StoreError: If there is none of this id.
    """
    row = store.trial(trial_id)
    if row is None:
        raise StoreError(f"trial {trial_id!r}: not in the ledger; `dp-sweeps show` lists them")
    return row


def chosen_trials(
    store: Store, sweep_id: str, names: Sequence[str], top: int | None, pruned: bool
) -> list[str] | None:
    """The trials of a sweep that a person wants to go on.

    Args:
        store: The database.
        sweep_id: The sweep.
        names: Their ids or numbers.
        top: Else, how many of those that were pruned, the best first.
        pruned: Else, whether all of those.

    Returns:
        Their ids; None where nothing of this is given.

    Raises:
        CommandError: More than one of these is given.
        StoreError: There is no such trial.
    """
    if (bool(names) + (top is not None) + pruned) > 1:
        raise CommandError("--trial, --top and --pruned: allowed is one of them")
    if names:
        return [_named(store, sweep_id, name) for name in names]
    if top is None and not pruned:
        return None
    best_first = read_results(store, sweep_id).best_first
    found = [trial.trial_id for trial in best_first if trial.state is TrialState.PRUNED]
    if not found:
        raise StoreError(f"sweep {sweep_id}: no trial of it was pruned")
    return found[:top]


def _named(store: Store, sweep_id: str, name: str) -> str:
    for row in store.trials(sweep_id):
        if name in (row.trial_id, str(row.number)):
            return str(row.trial_id)
    raise StoreError(
        f"--trial {name!r}: not in sweep {sweep_id}; `dp-sweeps show` lists its trials"
    )
