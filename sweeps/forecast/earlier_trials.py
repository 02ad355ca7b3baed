"""What earlier trials took, out of the rows: when they began, reported and ended.

Only a trial's first attempt is looked at, and only if nothing broke it off: whoever goes on from
a checkpoint begins in another way. Trials count whose workers had the same resources. Where a
worker had several at a time, each of them took its share of that time.
"""

import collections
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from sweeps.admission import Plan
from sweeps.database.states import AttemptEnd
from sweeps.database.store import Store
from sweeps.database.tables import attempts, checkpoints, reading, reports, sweeps, trials
from sweeps.forecast.measured import Measured, family_of
from trainer.config import TrialConfig
from trainer.errors import ConfigError

_NEWEST = 1000
_WHOLE = (AttemptEnd.ENDED, AttemptEnd.PAUSED)


def earlier_trials(plan: Plan, store: Store) -> list[Measured]:
    """The newest trials that tell what those of a plan will take.

    Args:
        plan: The plan.
        store: The database.

    Raises:
        DatabaseError: If the database fails.
    """
    wanted = {family_of(one.config) for one in plan.admitted if one.config is not None}
    resources = plan.spec.resources.model_dump(mode="json")
    with reading(store.ledger.engine) as connection:
        rows = connection.execute(
            sa.select(
                trials.c.trial_id,
                trials.c.trial_config,
                attempts.c.started_at,
                attempts.c.ended_at,
                attempts.c.worker,
                sweeps.c.spec,
            )
            .join(attempts, attempts.c.trial_id == trials.c.trial_id)
            .join(sweeps, sweeps.c.sweep_id == trials.c.sweep_id)
            .where(
                sweeps.c.dataset_fingerprint == plan.dataset.fingerprint,
                trials.c.parent_trial_id.is_(None),
                attempts.c.number == 1,
                attempts.c.end.in_(_WHOLE),
            )
            .order_by(attempts.c.started_at.desc())
            .limit(_NEWEST)
        ).all()
        told = {
            row.trial_id: config
            for row in rows
            if not _selects(row.spec)
            and _same_resources(row.spec.get("resources", {}), resources)
            and (config := _config_if(row.trial_config, wanted)) is not None
        }
        times = _by_trial(connection, reports, list(told))
        places = _by_trial(connection, checkpoints, list(told))
    together = _together([row for row in rows if row.trial_id in told])
    found: list[Measured] = []
    for row in rows:
        config = told.get(row.trial_id)
        if config is None:
            continue
        reported = [each for each in times[row.trial_id] if each.reported_at <= row.ended_at]
        if reported:
            whole = _measured(config, row, reported, places[row.trial_id])
            found.append(whole.shared(together[row.trial_id]))
    return found


def _selects(spec: dict[str, Any]) -> bool:
    """Whether it is a private selection: how long its trials took, nobody may reckon."""
    return spec["privacy"]["policy"] == "private_selection"


def _same_resources(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    theirs = {"trials_per_worker": 1, **theirs}  # those of earlier versions
    names = ("cpus_per_trial", "gpus_per_trial", "trials_per_worker")
    return all(theirs.get(name) == ours[name] for name in names)


def _together(spans: Sequence[Any]) -> dict[str, float]:
    """How many of some trials a worker had at a time while it had one of them, on average."""
    of_worker: dict[str, list[Any]] = collections.defaultdict(list)
    for span in spans:
        of_worker[span.worker].append(span)
    found: dict[str, float] = {}
    for theirs in of_worker.values():
        start = np.array([span.started_at for span in theirs])
        end = np.array([span.ended_at for span in theirs])
        for span in theirs:
            overlap = np.minimum(end, span.ended_at) - np.maximum(start, span.started_at)
            secs = max(span.ended_at - span.started_at, 1e-9)
            found[span.trial_id] = max(1.0, float(overlap.clip(0).sum()) / secs)
    return found


def _config_if(stored: Any, wanted: set[Hashable]) -> TrialConfig | None:
    try:
        config = TrialConfig.from_json(stored)
    except ConfigError:  # of another version
        return None
    return config if family_of(config) in wanted else None


def _by_trial(
    connection: sa.Connection, table: sa.Table, trial_ids: Sequence[str]
) -> dict[str, list[sa.Row[Any]]]:
    query = sa.select(table).where(table.c.trial_id.in_(trial_ids)).order_by(table.c.step)
    found: dict[str, list[sa.Row[Any]]] = collections.defaultdict(list)
    for row in connection.execute(query):
        found[row.trial_id].append(row)
    return found


def _measured(
    config: TrialConfig,
    attempt: Any,
    reported: Sequence[sa.Row[Any]],
    written: Sequence[sa.Row[Any]],
) -> Measured:
    first, last = reported[0], reported[-1]
    if last.step > first.step:
        step_secs = (last.reported_at - first.reported_at) / (last.step - first.step)
        start_secs = attempt.ended_at - attempt.started_at - step_secs * last.step
    else:  # nothing tells the one from the other
        step_secs = (attempt.ended_at - attempt.started_at) / last.step
        start_secs = 0.0
    sizes = (_size(Path(row.location)) for row in reversed(written) if "://" not in row.location)
    return Measured(
        config=config,
        start_secs=max(start_secs, 0.0),
        step_secs=max(step_secs, 0.0),
        checkpoint_bytes=next(filter(None, sizes), None),
        where=attempt.worker.rpartition(":")[0] or "another machine",
    )


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
