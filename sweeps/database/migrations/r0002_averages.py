"""What reports measure of averages of the parameters; NULL where none is kept."""

import sqlalchemy as sa
from alembic.operations import Operations

revision = "0002"
down_revision = "0001"


def upgrade(op: Operations) -> None:
    """Adds the columns."""
    for name in (
        "ema_eval_accuracy",
        "ema_eval_loss",
        "polyak_eval_accuracy",
        "polyak_eval_loss",
    ):
        op.add_column("reports", sa.Column(name, sa.Float))
