"""What a search proposed: the fields of the search space as it chose them, to learn from."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0004"
down_revision = "0003"


def upgrade(op: Operations) -> None:
    """Brings the tables from the revision before to this one."""
    op.add_column("trials", sa.Column("setting", sa.JSON(none_as_null=True)))
    # Asked at every checkpoint that makes others superfluous: which of them a fork goes on from.
    op.create_index("ix_trials_parent_trial_id", "trials", ["parent_trial_id"])
