"""A trial that had ended, or waits, and is to go on, as a budget decides on it.

What it had not run is reserved again, and what is added to it too; what it has cost is paid. One
that waits, at a rung say, has kept what is reserved for it, and needs no decision but for more.
"""

import dataclasses

from accounting import BudgetExceeded
from accounting.ledger.lookup import find_reservation
from accounting.ledger.transaction import LedgerTransaction
from sweeps.database import rows
from sweeps.database.attempts import furthest_step, planned_epsilon, spent_epsilon
from sweeps.database.states import TrialState
from sweeps.errors import StoreError
from trainer.config import TrialConfig
from trainer.errors import ConfigError

_S = TrialState
_MAY_GO_ON = {_S.PRUNED, _S.PAUSED, _S.CANCELLED, _S.FAILED, _S.COMPLETED}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Readmission:
    """What a budget said of a trial that is to go on.

    Attributes:
        trial_id: The trial.
        sweep_id: Its sweep.
        number: Its place there.
        state: Where it was.
        step: How far it had come.
        iterations: The step at which it is to end.
        new_iterations: What it would be charged for beyond what it has been.
        epsilon: Spent on it so far.
        epsilon_after: Spent on it in the end; None where no finite bound is known.
        refusal: Why it may not go on; empty if it may.
    """

    trial_id: str
    sweep_id: str
    number: int
    state: TrialState
    step: int
    iterations: int
    new_iterations: int
    epsilon: float
    epsilon_after: float | None
    refusal: str

    @property
    def admitted(self) -> bool:
        """Whether it may go on."""
        return not self.refusal


def readmit(transaction: LedgerTransaction, trial_id: str, end: int | None) -> Readmission:
    """Has the budget decide on one trial, and lets it go on if it is admitted.

    Args:
        transaction: The caller's.
        trial_id: The trial.
        end: The step at which it is to end; None keeps the one it has.

    Raises:
        StoreError: If it cannot go on, or has nothing left to do.
    """
    connection = transaction.connection
    trial = rows.locked_trial(connection, trial_id)
    state = TrialState(trial.state)
    if rows.selects(connection, trial.sweep_id):
        raise StoreError(
            f"trial {trial_id}: under private_selection nothing that has ended goes on, for what "
            "was paid for is one winner; `dp-sweeps run` with another budget pays for another"
        )
    if state not in _MAY_GO_ON or trial.trial_config is None:
        raise StoreError(
            f"trial {trial_id}: is {state}; allowed to go on are PRUNED, PAUSED, CANCELLED, "
            "FAILED and COMPLETED ones"
        )
    config = TrialConfig.from_json(trial.trial_config)
    step = furthest_step(connection, trial)
    iterations = config.iterations if end is None else end
    if config.mechanism.bands > 1 and iterations != config.iterations:
        raise StoreError(
            f"trial {trial_id}: --iterations {iterations}: allowed is {config.iterations}, for "
            "how its noise is correlated depends on how long it is"
        )
    # One that did not complete may have paid for its last step and not shown it.
    if iterations < step or (iterations == step and state is TrialState.COMPLETED):
        raise StoreError(
            f"trial {trial_id}: has taken {step} steps; allowed is --iterations with more"
        )
    try:
        config = dataclasses.replace(config, iterations=iterations)
    except ConfigError as error:
        raise StoreError(f"trial {trial_id}: {error}") from error
    new_iterations = iterations - step
    wanted = trial.charged_iterations + new_iterations
    before = find_reservation(connection, trial_id)
    assert before is not None  # it is written with the trial
    after, answer = None, None
    refusal = rows.beyond_limit(connection, trial, before, wanted)
    if not refusal:
        answer = transaction.extend(trial_id, wanted)
    if isinstance(answer, BudgetExceeded):
        refusal = str(answer)
    elif answer is not None:
        after = planned_epsilon(answer, config)
        waits = state is TrialState.PAUSED  # so MLflow has not heard of an end
        rows.set_trial(
            connection,
            trial_id,
            state=state if waits else TrialState.ADMITTED,
            reason="",
            exempt=True,
            trial_config=config.to_json(),
            config={**trial.config, "iterations": iterations},
            planned_iterations=answer.reserved,
            planned_epsilon=after,
        )
        if not waits:
            rows.tell(connection, trial.sweep_id, trial_id, "trial_resume", {})
    return Readmission(
        trial_id=trial_id,
        sweep_id=trial.sweep_id,
        number=trial.number,
        state=state,
        step=step,
        iterations=iterations,
        new_iterations=new_iterations,
        epsilon=spent_epsilon(before, config),
        epsilon_after=after,
        refusal=refusal,
    )
