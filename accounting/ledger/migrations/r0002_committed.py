"""How much of a reservation counts against its budget, which an extension has to know."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Adds the column, with what the other columns say so far."""
    op.add_column(
        "ledger_reservations",
        sa.Column("committed", sa.BigInteger, nullable=False, server_default="0"),
    )
    budgets = sa.table("ledger_budgets", sa.column("name"), sa.column("policy"))
    names = ("budget", "state", "reserved", "charged", "committed")
    reservations = sa.table("ledger_reservations", *map(sa.column, names))
    lists = sa.select(budgets.c.name).where(
        budgets.c.policy.in_(("declared", "private_selection"))
    )
    # Only a list that was begun has closed ones, and it gives nothing back.
    whole = (reservations.c.state == "open") | (
        (reservations.c.state == "closed") & reservations.c.budget.in_(lists)
    )
    op.execute(
        reservations.update().values(
            committed=sa.case((whole, reservations.c.reserved), else_=reservations.c.charged)
        )
    )
