"""A room's tables, brought to what its code expects.

Each room keeps its revisions as modules of one package, in one line: ``r0001_first.py``,
``r0002_...``, each naming its own revision (``"0001"``) and the one before. The number in the
file's name is the revision, so that the usual case, a database that is up to date, is one SELECT
and loads no Alembic. A revision is a function of Alembic's operations, and needs nothing global:

    revision = "0001"
    down_revision = None

    def upgrade(op: Operations) -> None:
        op.create_table(...)

There is no way down: an older version of the code refuses a database that a newer one changed.
"""

import dataclasses
import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from accounting.database.connection import describe, reading, writing
from accounting.errors import DatabaseError

_SCHEMA_LOCK = 0x6470_7377  # any number that is ours alone
_REVISION_FILE = re.compile(r"r(\d{4})_\w+\.py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """One room's tables and the way to them.

    Attributes:
        name: What errors call it.
        migrations: The package that holds the revisions, as ``sweeps.database.migrations``.
        version_table: The table that says which revision a database has. One per schema.
        metadata: The tables as the code knows them; after an upgrade the database has them so.
    """

    name: str
    migrations: str
    version_table: str
    metadata: sa.MetaData

    @property
    def folder(self) -> Path:
        """Where the revisions lie."""
        return _folder(self.migrations)

    @property
    def revisions(self) -> Sequence[str]:
        """Every revision that the code knows, oldest first; the last is what it works with."""
        return _revisions(self.migrations)


def upgrade(engine: sa.Engine, schema: Schema) -> None:
    """Brings a schema to the code's revision: all of it, or on any error nothing.

    Safe to call from many processes at once; the first does the work. Every other schema in the
    database stays as it is.

    Args:
        engine: From `accounting.database.connection.connect`.
        schema: Which tables.

    Raises:
        DatabaseError: If the database fails, or has a revision that the code does not know: it
            was made by a newer version. It is left as it was.
    """
    with reading(engine) as connection:
        try:
            found = _revision(connection, schema)
        except exc.DBAPIError:  # there is no such table; whatever else is wrong will show below
            found = None
    if _is_current(engine, schema, found):
        return
    with writing(engine) as connection:
        if engine.dialect.name == "postgresql":  # two first users create one schema
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
        if sa.inspect(connection).has_table(schema.version_table):
            found = _revision(connection, schema)
        if not _is_current(engine, schema, found):
            _migrate(connection, schema)


def _revision(connection: sa.Connection, schema: Schema) -> str | None:
    column = sa.column("version_num", sa.String)
    return connection.scalar(sa.select(column).select_from(sa.table(schema.version_table, column)))


def _is_current(engine: sa.Engine, schema: Schema, found: str | None) -> bool:
    newest = schema.revisions[-1]
    if found is not None and found not in schema.revisions:
        raise DatabaseError(
            f"{describe(engine.url)}: its {schema.name} schema has revision {found!r}; this "
            f"version of dp-sweeps reads revisions up to {newest!r}"
        )
    return found == newest


def _migrate(connection: sa.Connection, schema: Schema) -> None:
    # Loaded here: most processes open a database that is up to date, and should do so quickly.
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext, RevisionStep
    from alembic.script import ScriptDirectory

    folder = schema.folder
    script = ScriptDirectory(folder, version_locations=[folder])

    def steps(found: Any, _context: MigrationContext) -> list[RevisionStep]:
        return script._upgrade_revs("head", found)  # pyright: ignore[reportPrivateUsage]

    context = MigrationContext.configure(
        connection, opts={"version_table": schema.version_table, "fn": steps, "script": script}
    )
    # The transaction is the caller's, so Alembic begins and commits none.
    context.run_migrations(op=Operations(context))


@functools.cache
def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package!r} is no package", name=package)
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _revisions(package: str) -> tuple[str, ...]:
    names = (_REVISION_FILE.fullmatch(path.name) for path in _folder(package).iterdir())
    revisions = sorted(name[1] for name in names if name)
    if not revisions:
        raise ModuleNotFoundError(f"{package!r} holds no revision", name=package)
    return tuple(revisions)
