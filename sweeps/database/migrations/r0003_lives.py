"""What a trial's life is made of: branches of noise apart from attempts, checkpoints, rungs.

Until now each attempt drew its own noise, so every attempt was a branch; nobody kept the facts
with which one can be gone on with.
"""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0003"
down_revision = "0002"


def upgrade(op: Operations) -> None:
    """Adds tables and columns, and makes a branch of each attempt."""
    op.add_column("sweeps", sa.Column("wish", sa.String(16), nullable=False, server_default=""))
    op.add_column("sweeps", sa.Column("driver", sa.String(256), nullable=False, server_default=""))
    op.add_column("sweeps", sa.Column("reason", sa.Text, nullable=False, server_default=""))
    op.add_column("trials", sa.Column("parent_trial_id", sa.String(128)))
    op.add_column("trials", sa.Column("parent_step", sa.Integer))
    op.add_column(
        "trials", sa.Column("exempt", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column("trials", sa.Column("microbatch_size", sa.Integer))
    _create(op)
    op.execute(
        "INSERT INTO branches (trial_id, number, branch_id, start_step, charged_step) "
        "SELECT trial_id, number, attempt_id, start_step, charged_step FROM attempts"
    )
    op.drop_column("attempts", "start_step")
    op.drop_column("attempts", "charged_step")
    op.add_column("attempts", sa.Column("end", sa.String(16)))
    op.add_column(
        "attempts", sa.Column("charged_before", sa.Integer, nullable=False, server_default="0")
    )
    op.execute("UPDATE attempts SET \"end\" = 'ended' WHERE ended_at IS NOT NULL")
    op.execute("ALTER TABLE reports RENAME COLUMN attempt TO branch")  # SQLite's Alembic cannot


def _create(op: Operations) -> None:
    op.create_table(
        "branches",
        sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("branch_id", sa.String(32), nullable=False),
        sa.Column("start_step", sa.Integer, nullable=False),
        sa.Column("charged_step", sa.Integer, nullable=False),
        sa.Column("facts", sa.JSON(none_as_null=True)),
        sa.UniqueConstraint("trial_id", "branch_id"),
    )
    op.create_table(
        "checkpoints",
        sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
        sa.Column("step", sa.Integer, primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True),
        sa.Column("location", sa.Text, nullable=False),
        sa.Column("written_at", sa.Float, nullable=False),
    )
    op.create_table(
        "rungs",
        sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
        sa.Column("rung", sa.Integer, primary_key=True),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("utility", sa.Float),
        sa.Column("goes_on", sa.Boolean, nullable=False),
        sa.Column("decided_at", sa.Float, nullable=False),
    )
