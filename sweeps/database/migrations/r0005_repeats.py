"""Which trials are repeats of one configuration; until now each was the only one of its own."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0005"
down_revision = "0004"


def upgrade(op: Operations) -> None:
    """Brings the tables from the revision before to this one."""
    op.add_column("trials", sa.Column("repeat_of", sa.String(128)))
