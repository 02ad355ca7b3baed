"""The ledger's tables: the journal, and what follows from it.

The journal is the record. Every other row can be worked out from it, is written in the same
transaction, and is there to be looked up quickly; `accounting.ledger.verification` works them all
out again and names any difference.
"""

import sqlalchemy as sa

from accounting.database.schema import Schema

metadata = sa.MetaData()

journal = sa.Table(
    "ledger_journal",
    metadata,
    sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
    # For looking up; the entry says the same, and verification compares.
    sa.Column("budget", sa.String(160), nullable=False, index=True),
    sa.Column("kind", sa.String(32), nullable=False),
    # Canonical JSON, hashed as it stands together with the hash before it.
    sa.Column("entry", sa.Text, nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)

budgets = sa.Table(
    "ledger_budgets",
    metadata,
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

shares = sa.Table(
    "ledger_shares",
    metadata,
    sa.Column("budget", sa.String(160), sa.ForeignKey("ledger_budgets.name"), primary_key=True),
    sa.Column("team", sa.String(160), primary_key=True),
    sa.Column("millionths", sa.Integer, nullable=False),
)

reservations = sa.Table(
    "ledger_reservations",
    metadata,
    sa.Column("request_id", sa.String(160), primary_key=True),
    sa.Column(
        "budget", sa.String(160), sa.ForeignKey("ledger_budgets.name"), nullable=False, index=True
    ),
    sa.Column("team", sa.String(160), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    # Canonical JSON: of the mechanism or selection that was asked for at first and of what it
    # goes on from, and of the verdict on it or on its newest extension.
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),
    sa.Column("charged", sa.BigInteger, nullable=False),
    # Iterations of it that the tallies hold.
    sa.Column("committed", sa.BigInteger, nullable=False, server_default="0"),
    sa.CheckConstraint("charged >= 0"),
    sa.CheckConstraint("charged <= reserved"),
)

# What is taken, as repetitions of a step: what a decision has to add up.
tallies = sa.Table(
    "ledger_tallies",
    metadata,
    sa.Column("budget", sa.String(160), sa.ForeignKey("ledger_budgets.name"), primary_key=True),
    sa.Column("team", sa.String(160), primary_key=True),
    sa.Column("step_key", sa.String(160), primary_key=True),
    sa.Column("committed", sa.BigInteger, nullable=False),
    sa.Column("charged", sa.BigInteger, nullable=False),
    sa.CheckConstraint("charged >= 0"),
    sa.CheckConstraint("charged <= committed"),
)

SCHEMA = Schema(
    name="ledger",
    migrations="accounting.ledger.migrations",
    version_table="ledger_schema",
    metadata=metadata,
)
