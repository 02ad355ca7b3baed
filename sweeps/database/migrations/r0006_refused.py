"""Trials that a budget refused and may yet admit: how much of it each of them would take."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0006"
down_revision = "0005"


def upgrade(op: Operations) -> None:
    """Brings the tables from the revision before to this one."""
    op.add_column("trials", sa.Column("needed_rdp", sa.Double))
