"""A trial that goes on from another's checkpoint, as a row that the budget has decided on.

What the checkpoint's parameters have cost counts once: it is the *prefix* of the fork's request,
beside which the fork pays for its own steps. So two forks of one checkpoint share its cost in the
ledger, and each still says what its own parameters cost in all.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

import accounting
from accounting import Mechanism
from accounting.ledger.lookup import find_reservation
from accounting.ledger.records import Request, Reservation
from accounting.ledger.transaction import LedgerTransaction
from accounting.mechanism import composed
from sweeps.database import rows
from sweeps.database.states import TrialState
from sweeps.database.tables import branches, checkpoints, finite_or_none, sweeps, trials
from sweeps.errors import StoreError
from sweeps.limits import check_limit
from trainer.config import TrialConfig
from trainer.training.plan import mechanism_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewFork:
    """A fork that somebody wants.

    Attributes:
        parent_trial_id: The trial to go on from.
        from_step: The step of its checkpoint; None for the newest.
        config: The fork's hyperparameters, to show.
        trial_config: What the trainer gets; steps are counted on from the parent's, so its
            ``iterations`` is the step at which the fork ends.
        dataset_fingerprint: Of the data that is there now.
        exempt: Whether somebody asked for it by name, so that no scheduler may prune it.
    """

    parent_trial_id: str
    from_step: int | None
    config: Mapping[str, Any]
    trial_config: TrialConfig
    dataset_fingerprint: str
    exempt: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fork:
    """What a budget said of a fork.

    Attributes:
        trial_id: The fork; of one that was refused, what it would have been.
        sweep_id: Its sweep, the same as its parent's.
        number: Its place there.
        parent_trial_id: The trial that it goes on from.
        parent_step: The step of that trial's checkpoint.
        iterations: The step at which it is to end.
        new_iterations: What it would be charged for.
        epsilon: What had been spent on the checkpoint's parameters.
        epsilon_after: Spent on its own in the end; None where no finite bound is known.
        refusal: Why it may not run; empty if it may.
    """

    trial_id: str
    sweep_id: str
    number: int
    parent_trial_id: str
    parent_step: int
    iterations: int
    new_iterations: int
    epsilon: float
    epsilon_after: float | None
    refusal: str

    @property
    def admitted(self) -> bool:
        """Whether it may run."""
        return not self.refusal


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusedFork:
    """A fork that may not run, to be shown.

    Attributes:
        parent_trial_id: The trial that it was to go on from.
        parent_step: The step of that trial's checkpoint.
        config: The fork's hyperparameters.
        epsilon: What would have been spent on its parameters in the end; None where no finite
            bound is known, or nobody asked.
        reason: Why it may not run.
    """

    parent_trial_id: str
    parent_step: int
    config: Mapping[str, Any]
    epsilon: float | None
    reason: str


def fork(transaction: LedgerTransaction, new: NewFork) -> Fork:
    """Decides on a fork, and makes it a trial if it is admitted.

    Raises:
        StoreError: If there is no such trial or checkpoint, or nothing can go on from it.
        accounting.AccountingError: If the data is not that of the budget.
    """
    connection = transaction.connection
    parent = rows.locked_trial(connection, new.parent_trial_id)
    privacy = _privacy(connection, parent.sweep_id)
    if privacy["policy"] == "private_selection":
        raise StoreError(
            f"trial {parent.trial_id}: under private_selection no trial goes on from another, for "
            "only the winner may ever be seen"
        )
    step = _checkpoint_step(connection, parent, new.from_step)
    _check_may_begin(new, step)
    paid = find_reservation(connection, parent.trial_id)
    assert paid is not None  # it has run
    number, trial_id = rows.next_name(connection, parent.sweep_id)
    request = Request(
        request_id=trial_id,
        mechanism=mechanism_of(new.trial_config).after(new.trial_config.iterations - step),
        prefix=spent_by(connection, paid, step),
    )
    after, refusal = _decide(transaction, privacy, paid, request, new.dataset_fingerprint)
    decision = Fork(
        trial_id=trial_id,
        sweep_id=parent.sweep_id,
        number=number,
        parent_trial_id=parent.trial_id,
        parent_step=step,
        iterations=new.trial_config.iterations,
        new_iterations=request.size,
        epsilon=_epsilon(request.prefix, new.trial_config),
        epsilon_after=finite_or_none(after),
        refusal=refusal,
    )
    if decision.admitted:
        connection.execute(
            trials.insert().values(
                trial_id=trial_id,
                sweep_id=parent.sweep_id,
                number=number,
                state=TrialState.ADMITTED,
                reason="",
                config=dict(new.config),
                trial_config=new.trial_config.to_json(),
                planned_iterations=request.size,
                planned_epsilon=decision.epsilon_after,
                charged_iterations=0,
                parent_trial_id=parent.trial_id,
                parent_step=step,
                exempt=new.exempt,
                microbatch_size=parent.microbatch_size,
            )
        )
        rows.tell(connection, parent.sweep_id, trial_id, "trial_start", {})
    return decision


def record_refused(connection: sa.Connection, refused: RefusedFork) -> None:
    """Records a fork that may not run as a trial that was rejected."""
    parent = rows.locked_trial(connection, refused.parent_trial_id)
    number, trial_id = rows.next_name(connection, parent.sweep_id)
    connection.execute(
        trials.insert().values(
            trial_id=trial_id,
            sweep_id=parent.sweep_id,
            number=number,
            state=TrialState.REJECTED,
            reason=refused.reason,
            config=dict(refused.config),
            planned_iterations=int(refused.config["iterations"]) - refused.parent_step,
            planned_epsilon=refused.epsilon,
            charged_iterations=0,
            parent_trial_id=parent.trial_id,
            parent_step=refused.parent_step,
        )
    )


def spent_by(connection: sa.Connection, paid: Reservation, step: int) -> tuple[Mechanism, ...]:
    """What a trial had spent on its parameters when they had taken some steps.

    Every branch that began before counts as far as it has come by then, whether or not the
    parameters descend from it: never too little.

    Args:
        connection: Of the transaction.
        paid: The trial's reservation, which says what it had itself begun with.
        step: Steps behind the parameters.
    """
    assert isinstance(paid.mechanism, Mechanism)
    began = connection.execute(
        sa.select(branches.c.start_step, branches.c.charged_step)
        .where(branches.c.trial_id == paid.request_id, branches.c.start_step < step)
        .order_by(branches.c.number)
    ).all()
    taken = [min(row.charged_step, step) - row.start_step for row in began]
    # One mechanism each: where noise is correlated, each branch costs whole groups of steps.
    return (*paid.request.prefix, *(paid.mechanism.after(count) for count in taken if count))


def _privacy(connection: sa.Connection, sweep_id: str) -> Mapping[str, Any]:
    """The privacy section of a sweep's specification."""
    spec = connection.scalar(sa.select(sweeps.c.spec).where(sweeps.c.sweep_id == sweep_id))
    assert spec is not None
    return spec["privacy"]


def _checkpoint_step(connection: sa.Connection, parent: sa.Row[Any], from_step: int | None) -> int:
    recorded = connection.scalars(
        sa.select(checkpoints.c.step)
        .where(checkpoints.c.trial_id == parent.trial_id)
        .distinct()
        .order_by(checkpoints.c.step)
    ).all()
    if not recorded:
        raise StoreError(
            f"trial {parent.trial_id}: is {parent.state} and has no checkpoint to go on from"
        )
    if from_step is None:
        return recorded[-1]
    if from_step not in recorded:
        listed = ", ".join(map(str, recorded))
        raise StoreError(
            f"trial {parent.trial_id}: --from-step {from_step}: allowed is a step of which there "
            f"is a checkpoint: {listed}"
        )
    return from_step


def _check_may_begin(new: NewFork, step: int) -> None:
    config = new.trial_config
    if config.mechanism.bands > 1:
        raise StoreError(
            f"trial {new.parent_trial_id}: mechanism.bands={config.mechanism.bands}: allowed to "
            "fork are trials with 1, for noise that is correlated is that of a whole trial, from "
            "its first step"
        )
    if config.iterations <= step:
        raise StoreError(
            f"trial {new.parent_trial_id}: --iterations {config.iterations}: allowed is more than "
            f"the {step} steps of its checkpoint, since it is the step to end at"
        )


def _decide(
    transaction: LedgerTransaction,
    privacy: Mapping[str, Any],
    paid: Reservation,
    request: Request,
    dataset_fingerprint: str,
) -> tuple[float, str]:
    """Epsilon of a fork with all that it begins with, and why it may not run, if so."""
    assert isinstance(request.mechanism, Mechanism)
    own = check_limit(privacy, request.mechanism, request.prefix)
    if not own.admitted:
        return own.epsilon, own.reason
    (answer,) = transaction.reserve(
        paid.budget, [request], team=paid.team, dataset_fingerprint=dataset_fingerprint
    )
    return own.epsilon, "" if answer.state == "open" else answer.verdict.reason


def _epsilon(spent: tuple[Mechanism, ...], config: TrialConfig) -> float:
    return accounting.epsilon_of_list(
        composed(spent), delta=config.target_delta, accountant=config.accountant
    )
