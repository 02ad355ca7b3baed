"""How much of a budget is spent, reserved and free."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, get_args

import sqlalchemy as sa

from accounting.account import Account, Tally
from accounting.accountants import epsilon_of_list
from accounting.errors import AccountingError
from accounting.ledger.lookup import budget_row, load_account, read_shares
from accounting.ledger.records import Budget, ReservationState, budget_of
from accounting.ledger.tables import reservations
from accounting.renyi import epsilon_of_rdp, parts_rdp
from accounting.terms import LIST_POLICIES, BudgetTerms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """Spent, reserved and free, of a budget or of a team's share of it.

    Under `per_trial` nothing adds up, so `limit` is what each trial may cost by itself, `spent`
    is 0, and `together` says what all trials cost as one list.

    Attributes:
        spent: What can no longer be given back.
        reserved: What is promised and may yet be given back.
        limit: What may be taken.
        unit: "epsilon", or "rdp" under `open`.
        epsilon: Epsilon of what is spent and reserved, at `delta`.
        epsilon_spent: Epsilon of what is spent, at `delta`.
        delta: The delta of the limit.
        together: Under `per_trial`, epsilon of all that was charged as if it were one list that
            had been declared beforehand, infinite if unknown; None under the others.
    """

    spent: float
    reserved: float
    limit: float
    unit: str
    epsilon: float
    epsilon_spent: float
    delta: float
    together: float | None = None

    @property
    def free(self) -> float:
        """What may still be taken."""
        return max(0.0, self.limit - self.spent - self.reserved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetStatus:
    """A budget and how much of it is taken.

    Attributes:
        budget: The budget.
        level: Of the whole.
        teams: Of each team's share; empty where the budget is not divided.
        counts: Reservations by state.
        closed_list: Whether the declared list is closed (see `accounting.account`).
    """

    budget: Budget
    level: Level
    teams: dict[str, Level]
    counts: dict[str, int]
    closed_list: bool

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data."""

        def level(value: Level) -> dict[str, Any]:
            numbers = {**dataclasses.asdict(value), "free": value.free}
            infinite = [name for name, number in numbers.items() if number == math.inf]
            return {**numbers, **dict.fromkeys(infinite)}  # JSON has no infinity

        return {
            **self.budget.to_json(),
            "level": level(self.level),
            "teams": {team: level(value) for team, value in self.teams.items()},
            "reservations": self.counts,
            "closed_list": self.closed_list,
        }


def read_status(connection: sa.Connection, name: str) -> BudgetStatus:
    """Returns a budget's status.

    Raises:
        LedgerError: There is no such budget.
    """
    account = load_account(connection, name)
    count = sa.func.count()
    query = (
        sa.select(reservations.c.state, count)
        .where(reservations.c.budget == name)
        .group_by(reservations.c.state)
    )
    counts: dict[str, int] = dict.fromkeys(get_args(ReservationState), 0)
    counts.update((state, number) for state, number in connection.execute(query))
    undivided = Account(account.terms, state=account.state)
    undivided.tallies = account.tallies
    teams = {
        team: _level(account, account.tally(team), share)
        for team, share in sorted(account.fractions.items())
    }
    lists = account.terms.policy in LIST_POLICIES
    if lists and teams:
        level = _sum(account.terms, teams.values())
    else:
        level = _level(account, undivided.tally(""), 1.0)
    return BudgetStatus(
        budget=budget_of(budget_row(connection, name), read_shares(connection, name)),
        level=level,
        teams=teams,
        counts=counts,
        closed_list=lists and undivided.tally("").begun,
    )


def _sum(terms: BudgetTerms, levels: Iterable[Level]) -> Level:
    """The teams' lists together, by basic composition: each may depend on the others' results."""
    levels = list(levels)
    spent = math.fsum(level.spent for level in levels)
    reserved = math.fsum(level.reserved for level in levels)
    return Level(
        spent=spent,
        reserved=reserved,
        limit=terms.epsilon,
        unit="epsilon",
        epsilon=spent + reserved,
        epsilon_spent=spent,
        delta=terms.delta,
    )


def _level(account: Account, tally: Tally, share: float) -> Level:
    terms = account.terms
    if terms.policy == "open":
        spent = parts_rdp(tally.charged, terms.order)
        taken = parts_rdp(tally.committed, terms.order)
        return Level(
            spent=spent,
            reserved=max(0.0, taken - spent),
            limit=terms.rdp_limit * share,
            unit="rdp",
            epsilon=epsilon_of_rdp(taken, terms.delta, terms.order),
            epsilon_spent=epsilon_of_rdp(spent, terms.delta, terms.order),
            delta=terms.delta,
        )
    if terms.policy == "per_trial":
        try:
            together = epsilon_of_list(+tally.charged, delta=terms.delta)
        except AccountingError:  # It decides nothing.
            together = math.inf
        return Level(
            spent=0.0,
            reserved=0.0,
            limit=terms.epsilon,
            unit="epsilon",
            epsilon=0.0,
            epsilon_spent=0.0,
            delta=terms.delta,
            together=together,
        )
    delta = terms.delta * share
    cost = account.cost(tally, (), delta) if share else 0.0
    spent = cost if tally.begun else 0.0
    return Level(
        spent=spent,
        reserved=cost - spent,
        limit=terms.epsilon * share,
        unit="epsilon",
        epsilon=cost,
        epsilon_spent=spent,
        delta=delta,
    )
