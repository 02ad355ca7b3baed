"""Transactions keep their promises, on SQLite and on PostgreSQL alike."""

import fcntl
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from accounting.database.connection import connect, reading, writing
from accounting.errors import DatabaseError

ROOT = Path(__file__).parents[3]
PROCESS_SECS = 120
SECRET = "secretword"
Way = Callable[[sa.Engine], AbstractContextManager[sa.Connection]]

metadata = sa.MetaData()
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(20), primary_key=True),
    sa.Column("value", sa.Integer, sa.CheckConstraint("value >= 0"), nullable=False),
)


@pytest.fixture
def engine(database_url: str) -> Iterator[sa.Engine]:
    yield from an_engine(database_url)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "home" / "ledger.db"


@pytest.fixture
def sqlite(file: Path) -> Iterator[sa.Engine]:
    yield from an_engine(f"sqlite:///{file}")


@pytest.fixture
def memory() -> Iterator[sa.Engine]:
    yield from an_engine("sqlite://")


def an_engine(url: str) -> Iterator[sa.Engine]:
    engine = connect(url)
    with writing(engine) as connection:
        metadata.create_all(connection)
        connection.execute(counters.insert().values(name="a", value=0))
    yield engine
    engine.dispose()


def value_of(connection: sa.Connection, name: str = "a") -> int:
    return connection.execute(
        sa.select(counters.c.value).where(counters.c.name == name).with_for_update()
    ).scalar_one()


def seen(engine: sa.Engine) -> int:
    with reading(engine) as connection:
        return connection.execute(sa.select(counters.c.value)).scalar_one()


def add_one(engine: sa.Engine) -> None:
    """Reads and writes in two steps, so that a race would lose one."""
    with writing(engine) as connection:
        connection.execute(counters.update().values(value=value_of(connection) + 1))


def add(engine: sa.Engine, count: int) -> None:
    for _ in range(count):
        add_one(engine)


def together(count: int, job: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROCESS_SECS)
        assert not thread.is_alive()
    assert errors == []


def child(code: str, url: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, url],
        cwd=ROOT,
        env=dict(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def text_of(url: sa.URL) -> str:
    return url.render_as_string(hide_password=False)


# -- transactions ----------------------------------------------------------------------------


def test_a_block_is_written_whole_or_not_at_all(engine: sa.Engine) -> None:
    add_one(engine)
    with pytest.raises(ZeroDivisionError), writing(engine) as connection:  # noqa: PT012
        connection.execute(counters.update().values(value=7))
        raise ZeroDivisionError
    assert seen(engine) == 1
    add_one(engine)
    assert seen(engine) == 2


def test_who_reads_waits_for_no_writer_and_sees_what_was_committed(engine: sa.Engine) -> None:
    with writing(engine) as connection:
        connection.execute(counters.update().values(value=7))
        assert seen(engine) == 0
    assert seen(engine) == 7


def test_who_reads_sees_one_moment(engine: sa.Engine) -> None:
    with reading(engine) as connection:
        first = connection.execute(sa.select(counters.c.value)).scalar_one()
        add_one(engine)
        assert connection.execute(sa.select(counters.c.value)).scalar_one() == first == 0
    assert seen(engine) == 1


def test_who_reads_cannot_write(engine: sa.Engine) -> None:
    with pytest.raises(DatabaseError, match=r"(?i)read-?only"), reading(engine) as connection:
        connection.execute(counters.update().values(value=7))
    assert seen(engine) == 0
    add_one(engine)  # the connection that was read-only goes back to the pool
    assert seen(engine) == 1


def test_a_thread_that_would_wait_for_itself_is_told(engine: sa.Engine) -> None:
    with writing(engine), pytest.raises(RuntimeError, match="do not nest"), writing(engine):
        pass
    add_one(engine)
    assert seen(engine) == 1


def test_one_file_has_one_lock(
    sqlite: sa.Engine, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = file.parent / "link.db"
    link.symlink_to(file)
    monkeypatch.chdir(file.parent)
    for name in ("ledger.db", str(link)):
        other = connect(f"sqlite:///{name}")
        with writing(sqlite), pytest.raises(RuntimeError, match="do not nest"), writing(other):
            pass
        monkeypatch.chdir("/")  # the file stays the one that was meant
        assert seen(other) == 0
        other.dispose()


# -- several at once -------------------------------------------------------------------------


def test_threads_take_turns(engine: sa.Engine) -> None:
    together(4, lambda: add(engine, 25))
    assert seen(engine) == 100


ADDING = """
import sys
import sqlalchemy as sa
from accounting.database.connection import connect, writing
engine = connect(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(50):
    with writing(engine) as connection:
        value = connection.scalar(sa.text(
            "SELECT value FROM counters"
            + (" FOR UPDATE" if engine.dialect.name == "postgresql" else "")
        ))
        connection.execute(sa.text("UPDATE counters SET value = :value"), {"value": value + 1})
engine.dispose()
"""


@pytest.mark.slow
def test_processes_take_turns_and_lose_nothing(engine: sa.Engine) -> None:
    processes = [child(ADDING, text_of(engine.url)) for _ in range(8)]
    assert [line_of(process) for process in processes] == ["ready"] * 8
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=PROCESS_SECS)
    assert [process.returncode for process in processes] == [0] * 8
    assert seen(engine) == 8 * 50


HOLDING = """
import sys, time
import sqlalchemy as sa
from accounting.database.connection import connect, writing
with writing(connect(sys.argv[1])) as connection:
    connection.execute(sa.text("UPDATE counters SET value = 99"))
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_neither_lock_nor_change(engine: sa.Engine) -> None:
    process = child(HOLDING, text_of(engine.url))
    assert line_of(process) == "held"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=PROCESS_SECS)
    add_one(engine)
    assert seen(engine) == 1


def is_free(file: Path) -> bool:
    """Whether the lock beside a SQLite file is free."""
    with open(f"{file}-lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_the_lock_lasts_as_long_as_the_transaction(sqlite: sa.Engine, file: Path) -> None:
    with writing(sqlite):
        assert not is_free(file)
    assert is_free(file)
    with pytest.raises(ZeroDivisionError), writing(sqlite):
        raise ZeroDivisionError
    assert is_free(file)
    with reading(sqlite):
        assert is_free(file)


def test_who_does_not_know_the_lock_is_kept_out_too(sqlite: sa.Engine, file: Path) -> None:
    foreign = sqlite3.connect(file, timeout=0, isolation_level=None)
    with writing(sqlite), pytest.raises(sqlite3.OperationalError, match="locked"):
        foreign.execute("BEGIN IMMEDIATE")
    foreign.execute("BEGIN IMMEDIATE")
    foreign.close()


def test_a_fork_does_not_keep_the_lock(sqlite: sa.Engine, file: Path) -> None:
    with writing(sqlite):
        copy = os.dup(lock_descriptor(file))  # what a process forked now would have open
    try:
        assert is_free(file)
    finally:
        os.close(copy)


def lock_descriptor(file: Path) -> int:
    lock = os.stat(f"{file}-lock")
    for number in range(1024):
        with suppress(OSError):  # most are not open
            if os.path.samestat(os.fstat(number), lock):
                return number
    raise AssertionError("the lock's file is not open")


# -- SQLite's settings, files and memory -----------------------------------------------------


@pytest.mark.parametrize(
    ("pragma", "value"), [("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)]
)
def test_sqlite_is_as_durable_as_it_can_be(
    sqlite: sa.Engine, pragma: str, value: str | int
) -> None:
    for way in (reading, writing):
        with way(sqlite) as connection:
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar_one() == value


def test_a_new_folder_is_the_owners_alone(sqlite: sa.Engine, file: Path) -> None:
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_to_read_leaves_a_foreign_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    foreign = sqlite3.connect(path)
    foreign.execute("CREATE TABLE counters (value)")
    foreign.close()
    before = path.read_bytes()
    engine = connect(f"sqlite:///{path}")
    with reading(engine) as connection:
        assert connection.execute(sa.select(counters.c.value)).all() == []
    engine.dispose()
    assert path.read_bytes() == before


def test_memory_is_one_database_for_all_threads(memory: sa.Engine) -> None:
    together(4, lambda: add(memory, 25))
    assert seen(memory) == 100


@pytest.mark.parametrize("outer", [reading, writing])
@pytest.mark.parametrize("inner", [reading, writing])
def test_memory_serves_one_transaction_at_a_time(
    memory: sa.Engine, outer: Way, inner: Way
) -> None:
    with outer(memory), pytest.raises(RuntimeError, match="do not nest"), inner(memory):
        pass


# -- refusals, and what they say -------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://me:{SECRET}@host/name",
        f"postgresql+psycopg2://me:{SECRET}@host/name",
        f"postgresql+asyncpg://me@host/name?password={SECRET}",
        "sqlite+aiosqlite:///ledger.db",
        "sqlite:///file:ledger.db?mode=ro&uri=true",
        "ledger.db",
        f"postgresql+psycopg://me:{SECRET}@host:{SECRET}/name",
        "",
    ],
)
def test_urls_of_other_kinds_are_refused(url: str) -> None:
    with pytest.raises(DatabaseError) as caught:
        connect(url)
    assert "sqlite:///FILE" in str(caught.value)
    assert "postgresql+psycopg://" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match=r"file/home/ledger\.db: its folder cannot be made"):
        connect(f"sqlite:///{tmp_path}/file/home/ledger.db")


@pytest.mark.parametrize("way", [reading, writing])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, way: Way) -> None:
    path = tmp_path / "letter.db"
    path.write_bytes(b"this is a letter to my aunt, not a database " * 100)
    before = path.read_bytes()
    engine = connect(f"sqlite:///{path}")
    with pytest.raises(DatabaseError, match=r"letter\.db: file is not a database"), way(engine):
        pass
    engine.dispose()
    assert path.read_bytes() == before


@pytest.mark.parametrize("way", [reading, writing])
@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://me:{SECRET}@127.0.0.1:1/name",
        f"postgresql+psycopg://me@127.0.0.1:1/name?password={SECRET}",
        f"postgresql://me:{SECRET}@127.0.0.1:1/name",
    ],
)
def test_a_server_that_is_away_is_named_without_password(url: str, way: Way) -> None:
    engine = connect(url)
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1") as caught, way(engine):
        pass
    assert SECRET not in str(caught.value)
    engine.dispose()


def test_errors_say_why_without_statement_or_values(engine: sa.Engine) -> None:
    for values in ({"name": SECRET, "value": 1}, {"name": "b", "value": -123_456}):
        with pytest.raises(DatabaseError) as caught, writing(engine) as connection:
            connection.execute(counters.insert(), [values, values])
        message = str(caught.value)
        assert "onstraint" in message
        assert not [word for word in (SECRET, "123456", "INSERT", "VALUES") if word in message]
    assert seen(engine) == 0


def test_within_the_block_errors_are_the_drivers_own(engine: sa.Engine) -> None:
    with pytest.raises(DatabaseError), writing(engine) as connection:  # noqa: PT012
        with pytest.raises(exc.IntegrityError):
            connection.execute(counters.insert().values(name="a", value=1))
        connection.execute(counters.insert().values(name="a", value=1))


def test_a_lock_that_cannot_be_opened_is_named(sqlite: sa.Engine, file: Path) -> None:
    Path(f"{file}-lock").unlink()
    Path(f"{file}-lock").mkdir()
    with pytest.raises(DatabaseError, match=r"ledger\.db-lock' cannot be opened"), writing(sqlite):
        pass
    assert seen(sqlite) == 0
