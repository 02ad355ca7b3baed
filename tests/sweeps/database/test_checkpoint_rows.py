"""Which checkpoints a trial goes on from: whole ones, reported ones, and few."""

import pytest
import sqlalchemy as sa

from sweeps.database.states import TrialState
from sweeps.database.store import Store
from sweeps.database.tables import checkpoints, reading, trials, writing
from sweeps.errors import FencedError, StoreError
from tests.sweeps.database.small_sweep import (
    TRIAL,
    a_branch,
    charged,
    everything,
    go_to,
    run_to,
)

CHILD = "s-1-001"


def steps_of(store: Store) -> list[int]:
    """Steps of the checkpoints that the rows hold."""
    query = sa.select(checkpoints.c.step).where(checkpoints.c.trial_id == TRIAL)
    with reading(store.ledger.engine) as connection:
        return list(connection.scalars(query.order_by(checkpoints.c.step)))


def offered(store: Store, trial_id: str = TRIAL) -> list[str]:
    return list(store.attempts.assignment(trial_id).checkpoints)


def fork(store: Store, step: int) -> None:
    """Makes one trial a fork of the other at a step."""
    with writing(store.ledger.engine) as connection:
        change = trials.update().where(trials.c.trial_id == CHILD)
        connection.execute(change.values(parent_trial_id=TRIAL, parent_step=step))


def test_a_checkpoint_is_offered_once_its_step_is_reported(full: Store) -> None:
    attempt = run_to(full, 10)
    full.attempts.charge(attempt, a_branch(), 20)
    full.attempts.checkpoint(attempt, 10, "/10")
    full.attempts.checkpoint(attempt, 20, "/20")
    assert offered(full) == ["/10"], "from 20 on nobody would ever report that step"
    go_to(full, attempt, 20)
    assert offered(full) == ["/20", "/10"]


def test_the_newest_attempts_is_offered_first(full: Store) -> None:
    for number in (1, 2):
        attempt = run_to(full, 10)
        assert full.attempts.checkpoint(attempt, 10, f"/{number}") == []
    assert offered(full) == ["/2", "/1"]


def test_a_checkpoint_is_recorded_once(engine: sa.Engine, full: Store) -> None:
    attempt = run_to(full, 10)
    full.attempts.checkpoint(attempt, 10, "/10")
    before = everything(engine)
    assert full.attempts.checkpoint(attempt, 10, "/10") == []
    assert everything(engine) == before


def test_the_newest_two_are_kept_while_a_trial_runs(full: Store) -> None:
    attempt = full.attempts.begin(TRIAL)
    given_back = []
    for step in (10, 20, 30, 40):
        go_to(full, attempt, step)
        given_back += full.attempts.checkpoint(attempt, step, f"/{step}")
    assert given_back == ["/10", "/20"]
    assert steps_of(full) == [30, 40]


@pytest.mark.parametrize("state", [TrialState.PRUNED, TrialState.CANCELLED])
def test_of_an_ended_trial_one_is_kept_though_it_comes_late(
    full: Store, state: TrialState
) -> None:
    attempt = full.attempts.begin(TRIAL)
    for step in (10, 20):
        go_to(full, attempt, step)
        full.attempts.checkpoint(attempt, step, f"/{step}")
    go_to(full, attempt, 30)
    full.end_trial(TRIAL, state)
    assert full.attempts.checkpoint(attempt, 30, "/30") == ["/20", "/10"]
    assert offered(full) == ["/30"]


def test_a_paused_trials_worker_may_record_its_last(full: Store) -> None:
    attempt = run_to(full, 10)
    full.attempts.pause(attempt)
    full.attempts.checkpoint(attempt, 10, "/10")
    assert offered(full) == ["/10"]


@pytest.mark.parametrize("ended", [False, True], ids=["running", "ended"])
def test_an_older_attempts_checkpoint_is_refused(
    engine: sa.Engine, full: Store, ended: bool
) -> None:
    old = run_to(full, 10)
    new = run_to(full, 20)
    if ended:
        full.attempts.fail(new, "why")
    before = everything(engine)
    with pytest.raises(FencedError):
        full.attempts.checkpoint(old, 10, "/10")
    assert everything(engine) == before


# -- forks -----------------------------------------------------------------------------------


def test_what_a_fork_began_with_is_kept(full: Store) -> None:
    attempt = run_to(full, 10)
    full.attempts.checkpoint(attempt, 10, "/10")
    fork(full, 10)
    for step in (20, 30, 40):
        go_to(full, attempt, step)
        full.attempts.checkpoint(attempt, step, f"/{step}")
    full.end_trial(TRIAL, TrialState.PRUNED)
    assert full.attempts.checkpoint(attempt, 50, "/50") == ["/40", "/30"]
    assert steps_of(full) == [10, 50]
    assert list(full.attempts.assignment(CHILD).fork_from or ()) == ["/10"]
    assert offered(full, CHILD) == []


def test_a_trial_that_is_no_fork_has_no_parent(full: Store) -> None:
    given = full.attempts.assignment(TRIAL)
    assert (given.fork_from, given.spent_before) == (None, ())


def test_a_fork_pays_from_its_parents_step_on(full: Store) -> None:
    fork(full, 10)
    attempt = full.attempts.begin(CHILD)
    with pytest.raises(StoreError, match="cannot begin at step 11"):
        full.attempts.charge(attempt, a_branch(1, 11), 12)
    assert full.attempts.charge(attempt, a_branch(1, 10), 25) == 15
    assert charged(full, CHILD) == 15
