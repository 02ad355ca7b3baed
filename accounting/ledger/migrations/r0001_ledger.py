"""The ledger's first tables."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0001"
down_revision = None


def upgrade(op: Operations) -> None:
    """Creates the journal, and the rows that follow from it."""
    op.create_table(
        "ledger_journal",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("budget", sa.String(160), nullable=False, index=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("entry", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    op.create_table(
        "ledger_budgets",
        sa.Column("name", sa.String(160), primary_key=True),
        sa.Column("dataset", sa.String(256), nullable=False),
        sa.Column("dataset_fingerprint", sa.String(256), nullable=False),
        sa.Column("policy", sa.String(32), nullable=False),
        sa.Column("epsilon", sa.Double, nullable=False),
        sa.Column("delta", sa.Double, nullable=False),
        sa.Column("neighboring_relation", sa.String(32), nullable=False),
        sa.Column("privacy_unit", sa.String(16), nullable=False),
        sa.Column("rdp_order", sa.Double),
        sa.Column("one_off", sa.Boolean, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
    )
    op.create_table(
        "ledger_shares",
        sa.Column(
            "budget", sa.String(160), sa.ForeignKey("ledger_budgets.name"), primary_key=True
        ),
        sa.Column("team", sa.String(160), primary_key=True),
        sa.Column("millionths", sa.Integer, nullable=False),
    )
    op.create_table(
        "ledger_reservations",
        sa.Column("request_id", sa.String(160), primary_key=True),
        sa.Column(
            "budget",
            sa.String(160),
            sa.ForeignKey("ledger_budgets.name"),
            nullable=False,
            index=True,
        ),
        sa.Column("team", sa.String(160), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("verdict", sa.Text, nullable=False),
        sa.Column("reserved", sa.BigInteger, nullable=False),
        sa.Column("charged", sa.BigInteger, nullable=False),
        sa.CheckConstraint("charged >= 0"),
        sa.CheckConstraint("charged <= reserved"),
    )
    op.create_table(
        "ledger_tallies",
        sa.Column(
            "budget", sa.String(160), sa.ForeignKey("ledger_budgets.name"), primary_key=True
        ),
        sa.Column("team", sa.String(160), primary_key=True),
        sa.Column("step_key", sa.String(160), primary_key=True),
        sa.Column("committed", sa.BigInteger, nullable=False),
        sa.Column("charged", sa.BigInteger, nullable=False),
        sa.CheckConstraint("charged >= 0"),
        sa.CheckConstraint("charged <= committed"),
    )
