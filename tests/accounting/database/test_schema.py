"""A schema is brought forward whole, once, by whoever comes first; and never backward."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event

from accounting.database.connection import connect, reading, writing
from accounting.database.schema import Schema, upgrade
from accounting.errors import DatabaseError

ROOT = Path(__file__).parents[3]
PROCESS_SECS = 120
SECRET = "secretword"

FIRST = """
import sqlalchemy as sa
revision = "0001"
down_revision = None
def upgrade(op):
    op.create_table("pets", sa.Column("name", sa.String(20), primary_key=True))
"""
SECOND = """
import sqlalchemy as sa
revision = "0002"
down_revision = "0001"
def upgrade(op):
    op.add_column("pets", sa.Column("age", sa.Integer))
    op.create_index("ix_pets_age", "pets", ["age"])
"""
BROKEN = """
import sqlalchemy as sa
revision = "0002"
down_revision = "0001"
def upgrade(op):
    op.create_table("toys", sa.Column("name", sa.String(20), primary_key=True))
    op.execute("UPDATE pets SET name = 'nobody'")
    op.execute("DELETE FROM no_such_table")
"""
OTHER = """
import sqlalchemy as sa
revision = "0001"
down_revision = None
def upgrade(op):
    op.create_table("plants", sa.Column("name", sa.String(20), primary_key=True))
"""


def pets() -> sa.MetaData:
    metadata = sa.MetaData()
    sa.Table(
        "pets",
        metadata,
        sa.Column("name", sa.String(20), primary_key=True),
        sa.Column("age", sa.Integer, index=True),
    )
    return metadata


class Packages:
    """Packages of revisions, in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def schema(self, package: str, *revisions: str, name: str = "pets") -> Schema:
        folder = self.folder / package
        folder.mkdir()
        (folder / "__init__.py").touch()
        for number, text in enumerate(revisions, start=1):
            (folder / f"r{number:04}_some_change.py").write_text(text)
        return Schema(
            name=name, migrations=package, version_table=f"{name}_schema", metadata=pets()
        )


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packages:
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return Packages(folder)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    engine = connect(database_url)
    yield engine
    engine.dispose()


def everything(engine: sa.Engine) -> dict[str, list[Any]]:
    """All rows of all tables."""
    metadata = sa.MetaData()
    with reading(engine) as connection:
        metadata.reflect(connection)
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        }


def differences(engine: sa.Engine, schema: Schema) -> Sequence[Any]:
    """What the database has other than the metadata says."""
    with reading(engine) as connection:
        options = {
            "compare_server_default": True,
            "include_object": lambda _object, name, *_: name != schema.version_table,
        }
        return compare_metadata(
            MigrationContext.configure(connection, opts=options), schema.metadata
        )


# -- forward ---------------------------------------------------------------------------------


def test_a_new_database_gets_what_the_code_expects(engine: sa.Engine, packages: Packages) -> None:
    schema = packages.schema("fresh", FIRST, SECOND)
    upgrade(engine, schema)
    assert differences(engine, schema) == []
    assert everything(engine) == {"pets": [], "pets_schema": ["('0002',)"]}


def test_an_older_database_keeps_its_rows(engine: sa.Engine, packages: Packages) -> None:
    upgrade(engine, packages.schema("before", FIRST))
    with writing(engine) as connection:
        connection.execute(sa.text("INSERT INTO pets VALUES ('rex')"))
    after = packages.schema("after", FIRST, SECOND)
    upgrade(engine, after)
    assert differences(engine, after) == []
    assert everything(engine) == {"pets": ["('rex', None)"], "pets_schema": ["('0002',)"]}


def test_two_schemas_share_a_database(engine: sa.Engine, packages: Packages) -> None:
    upgrade(engine, packages.schema("ours", FIRST, SECOND))
    upgrade(engine, packages.schema("theirs", OTHER, name="plants"))
    assert everything(engine) == {
        "pets": [],
        "pets_schema": ["('0002',)"],
        "plants": [],
        "plants_schema": ["('0001',)"],
    }


def test_memory_has_a_schema_too(packages: Packages) -> None:
    engine = connect("sqlite://")
    schema = packages.schema("fleeting", FIRST, SECOND)
    for _ in range(2):
        upgrade(engine, schema)
        assert differences(engine, schema) == []
    engine.dispose()


def test_a_database_that_is_current_costs_one_question(
    engine: sa.Engine, packages: Packages
) -> None:
    schema = packages.schema("current", FIRST)
    upgrade(engine, schema)
    before = everything(engine)
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    upgrade(engine, schema)
    assert [text.split()[0] for text in asked if not text.startswith(("BEGIN", "PRAGMA"))] == [
        "SELECT"
    ]
    assert everything(engine) == before


OPENING = """
import sys
from accounting.database.connection import connect
from accounting.database.schema import Schema, upgrade
import sqlalchemy as sa
schema = Schema(
    name="pets", migrations=sys.argv[2], version_table="pets_schema", metadata=sa.MetaData()
)
engine = connect(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
upgrade(engine, schema)
engine.dispose()
print("alembic" in sys.modules, flush=True)
"""


def opening(packages: Packages, engine: sa.Engine, package: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            OPENING,
            engine.url.render_as_string(hide_password=False),
            package,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(packages.folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_several_first_users_create_one_schema(engine: sa.Engine, packages: Packages) -> None:
    schema = packages.schema("contested", FIRST, SECOND)
    processes = [opening(packages, engine, "contested") for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=PROCESS_SECS)
    assert [process.returncode for process in processes] == [0] * 4
    assert differences(engine, schema) == []
    assert everything(engine) == {"pets": [], "pets_schema": ["('0002',)"]}
    # From here on nobody needs Alembic.
    late = opening(packages, engine, "contested")
    assert late.communicate("go\n", timeout=PROCESS_SECS)[0].split() == ["ready", "False"]


# -- never backward, never half-way ----------------------------------------------------------


def test_a_newer_database_is_refused_and_left_alone(
    engine: sa.Engine, packages: Packages, tmp_path: Path
) -> None:
    upgrade(engine, packages.schema("newer", FIRST, SECOND))
    before = everything(engine)
    older = packages.schema("older", FIRST)
    engine.dispose()  # the last connection to SQLite puts everything into the one file
    files = contents(tmp_path / "home")
    with pytest.raises(DatabaseError, match=r"pets schema has revision '0002'.* up to '0001'"):
        upgrade(engine, older)
    engine.dispose()
    assert contents(tmp_path / "home") == files
    assert everything(engine) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def test_a_revision_that_fails_changes_nothing(engine: sa.Engine, packages: Packages) -> None:
    upgrade(engine, packages.schema("sound", FIRST))
    with writing(engine) as connection:
        connection.execute(sa.text("INSERT INTO pets VALUES ('rex')"))
    before = everything(engine)
    with pytest.raises(DatabaseError, match="no_such_table") as caught:
        upgrade(engine, packages.schema("broken", FIRST, BROKEN))
    assert "DELETE" not in str(caught.value)
    assert everything(engine) == before


def test_tables_of_somebody_else_are_not_taken_over(engine: sa.Engine, packages: Packages) -> None:
    with writing(engine) as connection:
        connection.execute(sa.text("CREATE TABLE pets (name VARCHAR(20))"))
    before = everything(engine)
    with pytest.raises(DatabaseError, match="already exists"):
        upgrade(engine, packages.schema("greedy", FIRST))
    assert everything(engine) == before


def test_a_server_that_is_away_is_named_without_password(packages: Packages) -> None:
    engine = connect(f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/name")
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1") as caught:
        upgrade(engine, packages.schema("away", FIRST))
    assert SECRET not in str(caught.value)
    engine.dispose()


@pytest.mark.parametrize("package", ["accounting", "no_such_package"])
def test_a_package_without_revisions_is_a_mistake(package: str) -> None:
    schema = Schema(name="x", migrations=package, version_table="x", metadata=sa.MetaData())
    with pytest.raises(ModuleNotFoundError, match=package):
        _ = schema.revisions
