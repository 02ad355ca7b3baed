"""The first tables: sweeps, trials, attempts, reports and the outbox.

A database made before there were revisions has the same tables, and says so in a table
``schema_version``: it keeps its rows.
"""

import sqlalchemy as sa
from alembic.operations import Operations

from accounting.database.connection import describe
from accounting.errors import DatabaseError

revision = "0001"
down_revision = None

_FORMER_VERSION = 1


def upgrade(op: Operations) -> None:
    """Creates the tables, or adopts those that are there."""
    if not _adopt(op):
        _create(op)


def _adopt(op: Operations) -> bool:
    """Whether the tables were there already, from before there were revisions."""
    connection = op.get_bind()
    if not sa.inspect(connection).has_table("schema_version"):
        return False
    found = list(connection.scalars(sa.text("SELECT version FROM schema_version")))
    if found != [_FORMER_VERSION]:
        versions = ", ".join(map(str, found)) or "of no version"
        raise DatabaseError(
            f"{describe(connection.engine.url)}: has schema {versions}; this version of dp-sweeps "
            f"can take over schema {_FORMER_VERSION}"
        )
    op.drop_table("schema_version")
    return True


def _create(op: Operations) -> None:
    op.create_table(
        "sweeps",
        sa.Column("sweep_id", sa.String(96), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("spec_hash", sa.String(64), nullable=False),
        sa.Column("dataset", sa.String(256), nullable=False),
        sa.Column("dataset_fingerprint", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.Column("mlflow_run_id", sa.String(64)),
    )
    op.create_table(
        "trials",
        sa.Column("trial_id", sa.String(128), primary_key=True),
        sa.Column("sweep_id", sa.String(96), sa.ForeignKey("sweeps.sweep_id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("config", sa.JSON, nullable=False),
        sa.Column("trial_config", sa.JSON),
        sa.Column("planned_iterations", sa.Integer, nullable=False),
        sa.Column("planned_epsilon", sa.Float),
        sa.Column("charged_iterations", sa.Integer, nullable=False),
        sa.Column("mlflow_run_id", sa.String(64)),
        sa.UniqueConstraint("sweep_id", "number"),
        sa.CheckConstraint("charged_iterations >= 0"),
        sa.CheckConstraint("charged_iterations <= planned_iterations"),
    )
    op.create_index("ix_trials_sweep_id", "trials", ["sweep_id"])
    op.create_table(
        "attempts",
        sa.Column("attempt_id", sa.String(32), primary_key=True),
        sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("start_step", sa.Integer, nullable=False),
        sa.Column("charged_step", sa.Integer, nullable=False),
        sa.Column("worker", sa.String(256), nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
        sa.UniqueConstraint("trial_id", "number"),
    )
    op.create_table(
        "reports",
        sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("reported_at", sa.Float, nullable=False),
        sa.Column("charged_iterations", sa.Integer, nullable=False),
        sa.Column("epsilon", sa.Float),
        sa.Column("eval_accuracy", sa.Float),
        sa.Column("eval_loss", sa.Float),
    )
    op.create_table(
        "outbox",
        sa.Column("message_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("sweep_id", sa.String(96), sa.ForeignKey("sweeps.sweep_id"), nullable=False),
        sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id")),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("delivered_at", sa.Float),
    )
    op.create_index("ix_outbox_delivered_at", "outbox", ["delivered_at"])
