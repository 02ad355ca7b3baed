"""Budgets, their accounts and reservations, looked up in the database."""

from collections.abc import Generator, Sequence
from typing import Any

import sqlalchemy as sa

from accounting import _validate
from accounting.account import Account, Tally
from accounting.errors import LedgerError
from accounting.ledger.records import Reservation, request_from_text, reservation_of, terms_of
from accounting.ledger.tables import budgets, journal, reservations, shares, tallies
from accounting.mechanism import step_from_key
from accounting.selection import Selection

# Built once: building a statement takes as long as running it.
_LAST = sa.select(sa.func.max(journal.c.seq)).scalar_subquery()
_BUDGET = sa.select(
    budgets,
    sa.exists().where(shares.c.budget == budgets.c.name).label("divided"),
    # The journal's end, which whoever decides will need.
    _LAST.label("last_seq"),
    sa.select(journal.c.hash).where(journal.c.seq == _LAST).scalar_subquery().label("last_hash"),
).where(budgets.c.name == sa.bindparam("name"))
_SHARES = sa.select(shares.c.team, shares.c.millionths).where(
    shares.c.budget == sa.bindparam("name")
)
_TALLIES = sa.select(
    tallies.c.team, tallies.c.step_key, tallies.c.committed, tallies.c.charged
).where(tallies.c.budget == sa.bindparam("name"))
_SELECTIONS = (
    sa.select(reservations.c.team, reservations.c.request, reservations.c.charged)
    .where(
        reservations.c.budget == sa.bindparam("name"),
        reservations.c.state.in_(("open", "closed")),
    )
    .order_by(reservations.c.request_id)
)
_RESERVATION = sa.select(reservations).where(
    reservations.c.request_id == sa.bindparam("request_id")
)
_RESERVATIONS = sa.select(reservations).where(
    reservations.c.request_id.in_(sa.bindparam("request_ids", expanding=True))
)
_IDS_AT_A_TIME = 500  # SQLite takes so many values in one statement


def budget_row(connection: sa.Connection, name: str) -> sa.Row[Any]:
    """Returns a budget's row, with `divided`: whether teams have shares.

    Raises:
        InvalidPrivacyParameter: It cannot be the name of a budget.
        LedgerError: There is no such budget.
    """
    name = _validate.name("budget", name)
    row = connection.execute(_BUDGET, {"name": name}).one_or_none()
    if row is None:
        raise LedgerError(f"budget {name!r}: not in the ledger; see `dp-sweeps budget list`")
    return row


def read_shares(connection: sa.Connection, name: str) -> dict[str, int]:
    """Returns the millionths of a budget by team."""
    return {row.team: row.millionths for row in connection.execute(_SHARES, {"name": name})}


def load_account(connection: sa.Connection, name: str) -> Account:
    """Returns a budget with all that is taken from it.

    Raises:
        LedgerError: There is no such budget.
    """
    return account_of(connection, budget_row(connection, name))


def account_of(connection: sa.Connection, row: sa.Row[Any]) -> Account:
    """Returns the account of a budget whose row was read in the same transaction."""
    name = row.name
    divided = read_shares(connection, name) if row.divided else {}
    account = Account(terms_of(row), state=row.state, shares=divided)
    for team, key, committed, charged in connection.execute(_TALLIES, {"name": name}):
        tally = account.tallies.setdefault(team, Tally())
        step = step_from_key(key)
        tally.committed[step] = committed
        tally.charged[step] = charged
        tally.begun |= charged > 0
    if account.terms.policy == "private_selection":
        for team, request, charged in connection.execute(_SELECTIONS, {"name": name}):
            tally = account.tallies.setdefault(team, Tally())
            selection, _ = request_from_text(request)
            assert isinstance(selection, Selection)
            tally.selections.append(selection)
            tally.begun |= charged > 0
    return account


def find_reservation(connection: sa.Connection, request_id: str) -> Reservation | None:
    """Returns a reservation, or None where there is none of that name."""
    row = connection.execute(_RESERVATION, {"request_id": request_id}).one_or_none()
    return None if row is None else reservation_of(row)


def find_reservations(
    connection: sa.Connection, request_ids: Sequence[str]
) -> Generator[Reservation]:
    """Yields those of some reservations that are there."""
    for start in range(0, len(request_ids), _IDS_AT_A_TIME):
        some = request_ids[start : start + _IDS_AT_A_TIME]
        for row in connection.execute(_RESERVATIONS, {"request_ids": some}):
            yield reservation_of(row)
