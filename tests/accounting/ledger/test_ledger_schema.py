"""The ledger's revisions make the tables that its code expects."""

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from accounting import Ledger
from accounting.database.connection import reading
from accounting.ledger.tables import SCHEMA, metadata


def test_the_schema_is_what_the_revisions_make(database_url: str) -> None:
    ledger = Ledger(database_url)
    with reading(ledger.engine) as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "compare_server_default": True,
                "include_object": lambda _object, name, *_: name != SCHEMA.version_table,
            },
        )
        assert compare_metadata(context, metadata) == []
        version = sa.text(f"SELECT version_num FROM {SCHEMA.version_table}")
        assert connection.scalars(version).all() == [SCHEMA.revisions[-1]]
    ledger.close()
