"""Connections that keep their promises, and the two ways to use them: `writing` and `reading`.

SQLite runs in WAL mode with full sync, so a commit that returned survives a power cut. Every
transaction that writes takes SQLite's lock when it begins, so two never deadlock half-way, and
before that a lock of ours on a file beside the database: the kernel wakes whoever waits there at
once, where SQLite would sleep and look again, up to a tenth of a second at a time. On PostgreSQL
transactions that write lock the rows that they decide on, and run side by side.
"""

import fcntl
import os
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc, pool

from accounting.errors import DatabaseError

ALLOWED_URLS = (
    "sqlite:///FILE, sqlite:// (in memory) and postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
)
_BUSY_TIMEOUT_SECS = 30  # for writers that do not know our lock: a person's sqlite3, a backup
_READS = "dp_sweeps_reads"
_IN_MEMORY = ("", ":memory:")


def connect(url: str | sa.URL) -> sa.Engine:
    """Prepares connections to a database; nothing is read or written yet.

    Args:
        url: ``sqlite:///FILE``, where the file's folder is created (mode 0700) if need be;
            ``sqlite://``, which lives in memory as long as the engine and serves one transaction
            at a time; or ``postgresql+psycopg://...``.

    Returns:
        An engine for `writing` and `reading`, safe to use from several threads. Every process
        makes its own.

    Raises:
        DatabaseError: If the URL is of another kind, or the folder cannot be made.
    """
    try:
        url = sa.make_url(url)
    except (exc.ArgumentError, ValueError):  # their messages may quote a password
        raise DatabaseError(f"database URL cannot be read; allowed are {ALLOWED_URLS}") from None
    if url.drivername in ("postgresql", "postgresql+psycopg"):
        return sa.create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    database = url.database or ""
    if url.drivername not in ("sqlite", "sqlite+pysqlite") or database.startswith("file:"):
        raise DatabaseError(f"{describe(url)}: is not supported; allowed are {ALLOWED_URLS}")
    if database in _IN_MEMORY:
        engine = sa.create_engine(
            url,
            # Whoever comes second waits for the one connection, which is the database.
            poolclass=pool.QueuePool,
            pool_size=1,
            max_overflow=0,
            connect_args={"check_same_thread": False},
        )
    else:
        # One file has one lock, whatever the folder that a process is in, and links to the file.
        path = Path(database).resolve()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DatabaseError(
                f"{describe(url)}: its folder cannot be made: {error.strerror}"
            ) from error
        engine = sa.create_engine(
            url.set(database=str(path)), connect_args={"timeout": _BUSY_TIMEOUT_SECS}
        )
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def writing(engine: sa.Engine) -> Generator[sa.Connection]:
    """A transaction that may write; committed at the end of the block, rolled back on any error.

    On SQLite one at a time, over all threads and processes, in about the order of asking: rows
    that were read in it are still so when it writes. A process that is killed in the middle frees
    the lock; one that is stopped keeps it. On PostgreSQL rows that decide something must be read
    ``with_for_update``.

    Args:
        engine: From `connect`.

    Raises:
        DatabaseError: If the database fails; it says why, without statement or parameters.
        RuntimeError: If this thread is writing to the database already; it would wait for itself.
    """
    with (
        translated(engine),
        _turn(engine),
        engine.connect() as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def reading(engine: sa.Engine) -> Generator[sa.Connection]:
    """A transaction that sees one moment of the database, waits for no writer, and cannot write.

    Args:
        engine: From `connect`.

    Raises:
        DatabaseError: If the database fails, or the block tries to write.
        RuntimeError: If the database is in memory and this thread is using it already.
    """
    options: dict[str, Any] = {_READS: True}
    if engine.dialect.name == "postgresql":
        options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    in_memory = engine.dialect.name == "sqlite" and _lock_file(engine) is None
    with (
        translated(engine),
        _unnested(engine) if in_memory else nullcontext(),
        engine.connect().execution_options(**options) as connection,
        connection.begin(),
    ):
        yield connection


def describe(url: sa.URL) -> str:
    """How errors name a database: ``database`` and its URL, without password and options."""
    # Options may hold a password, too.
    return f"database {url.set(query={}).render_as_string(hide_password=True)}"


@contextmanager
def translated(engine: sa.Engine) -> Generator[None]:
    """Turns failures of the database into `DatabaseError`, as `writing` and `reading` do.

    For a lock that is no transaction of rows.
    """
    try:
        yield
    except exc.DBAPIError as error:
        # PostgreSQL's full message quotes the statement and the values; its first line does not.
        primary = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        raise DatabaseError(f"{describe(engine.url)}: {primary or error.orig}") from error
    except exc.TimeoutError as error:
        raise DatabaseError(f"{describe(engine.url)}: all its connections are in use") from error


# -- turns -----------------------------------------------------------------------------------


class _Held(threading.local):
    """What this thread is in the middle of."""

    def __init__(self) -> None:
        self.keys: set[str | int] = set()


_held = _Held()


def _lock_file(engine: sa.Engine) -> str | None:
    database = engine.url.database or ""
    if engine.dialect.name != "sqlite" or database in _IN_MEMORY:
        return None
    return f"{database}-lock"


def _turn(engine: sa.Engine) -> AbstractContextManager[None]:
    path = _lock_file(engine)
    return _unnested(engine) if path is None else _locked(engine, path)


@contextmanager
def _unnested(engine: sa.Engine) -> Generator[None]:
    key = _lock_file(engine) or id(engine)
    if key in _held.keys:
        raise RuntimeError(
            f"{describe(engine.url)}: transactions do not nest; this thread is in one already"
        )
    _held.keys.add(key)
    try:
        yield
    finally:
        _held.keys.discard(key)


@contextmanager
def _locked(engine: sa.Engine, path: str) -> Generator[None]:
    with _unnested(engine):
        # Opened each time: threads exclude each other only on open files of their own.
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DatabaseError(
                f"{describe(engine.url)}: {path!r} cannot be opened: {error.strerror}"
            ) from error
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise DatabaseError(
                    f"{describe(engine.url)}: {path!r} cannot be locked: {error.strerror}"
                ) from error
            try:
                yield
            finally:
                # Said aloud: a process forked meanwhile has the file open, too.
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            os.close(file)


# -- SQLite ----------------------------------------------------------------------------------


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's BEGIN below, not the driver's
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: sa.Connection) -> None:
    reads = _READS in connection.get_execution_options()
    if connection.info.get("reads") != reads:
        connection.exec_driver_sql(f"PRAGMA query_only={reads:d}")
        connection.info["reads"] = reads
    if reads:
        connection.exec_driver_sql("BEGIN")
        return
    if "wal" not in connection.info:  # a property of the file, and a reader must not change it
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        connection.info["wal"] = True
    connection.exec_driver_sql("BEGIN IMMEDIATE")
