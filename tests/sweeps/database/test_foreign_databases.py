"""Databases that cannot be used are refused, and left as they were."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from sweeps.database.store import Store
from sweeps.database.tables import SCHEMA, open_database, writing
from sweeps.errors import DatabaseError, HomeError
from sweeps.home import DATABASE_VARIABLE, HOME_VARIABLE, Home
from tests.sweeps.database.small_sweep import everything


def test_a_newer_database_is_refused_and_left_alone(home: Home, engine: sa.Engine) -> None:
    with writing(engine) as connection:
        connection.exec_driver_sql("DROP TABLE reports")
        connection.exec_driver_sql(f"UPDATE {SCHEMA.version_table} SET version_num = '9999'")
    before = everything(engine)
    with pytest.raises(DatabaseError, match=rf"'9999'.* up to '{SCHEMA.revisions[-1]}'"):
        open_database(home)
    assert everything(engine) == before


def test_reopening_changes_nothing(home: Home, engine: sa.Engine, store: Store) -> None:
    before = everything(engine)
    open_database(home).dispose()
    assert everything(engine) == before


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is a letter to my aunt, not a database " * 100)
    before = path.read_bytes()
    with pytest.raises(DatabaseError, match="not a database"):
        open_database(Home.from_environment({HOME_VARIABLE: str(tmp_path)}))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match=r"DP_SWEEPS_HOME=.*file"):
        open_database(Home.from_environment({HOME_VARIABLE: str(tmp_path / "file" / "home")}))


def test_a_server_that_is_away_is_refused_without_its_password(tmp_path: Path) -> None:
    url = "postgresql+psycopg://me:secretword@127.0.0.1:1/sweeps"
    variables = {HOME_VARIABLE: str(tmp_path), DATABASE_VARIABLE: url}
    with pytest.raises(DatabaseError) as caught:
        open_database(Home.from_environment(variables))
    assert "127.0.0.1" in str(caught.value)
    assert "secretword" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "cannot be read as a URL; allowed are sqlite:///FILE and postgresql"),
        ("postgresql://person:secret@host:port/db", "cannot be read as a URL"),
        ("sqlite://", "in memory, which workers cannot share"),
        ("sqlite:///:memory:", "in memory, which workers cannot share"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, message: str) -> None:
    with pytest.raises(HomeError, match=message) as caught:
        Home.from_environment({DATABASE_VARIABLE: url})
    assert "secret" not in str(caught.value)
