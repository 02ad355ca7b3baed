"""The one database: its tables, and connections that keep their promises.

SQLite runs in WAL mode with full sync, so a commit that returned survives a power cut, and every
transaction that writes takes the lock when it begins, so two processes never deadlock half-way. On
PostgreSQL the same statements lock the rows that they decide on.
"""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event, exc

from sweeps.errors import DatabaseError
from sweeps.home import Home

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_SECS = 30
_SCHEMA_LOCK = 0x6470_7377  # any numbers that are ours alone
_DELIVERY_LOCK = 0x6470_7378
READ_ONLY = {"dp_sweeps_read_only": True}

metadata = sa.MetaData()

schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer))

sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("sweep_id", sa.String(96), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("spec_hash", sa.String(64), nullable=False),
    sa.Column("dataset", sa.String(256), nullable=False),
    sa.Column("dataset_fingerprint", sa.String(64), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.Column("mlflow_run_id", sa.String(64)),
)

trials = sa.Table(
    "trials",
    metadata,
    sa.Column("trial_id", sa.String(128), primary_key=True),
    sa.Column(
        "sweep_id", sa.String(96), sa.ForeignKey("sweeps.sweep_id"), nullable=False, index=True
    ),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("reason", sa.Text, nullable=False, default=""),
    sa.Column("config", sa.JSON, nullable=False),
    sa.Column("trial_config", sa.JSON(none_as_null=True)),
    # What admission decided on; NULL epsilon: no finite bound is known.
    sa.Column("planned_iterations", sa.Integer, nullable=False),
    sa.Column("planned_epsilon", sa.Float),
    # What was spent: iterations over all attempts, durable before anything of them is seen.
    sa.Column("charged_iterations", sa.Integer, nullable=False, default=0),
    sa.Column("mlflow_run_id", sa.String(64)),
    sa.UniqueConstraint("sweep_id", "number"),
    sa.CheckConstraint("charged_iterations >= 0"),
    sa.CheckConstraint("charged_iterations <= planned_iterations"),
)

attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("attempt_id", sa.String(32), primary_key=True),
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    # The steps that this branch began with and the furthest that it charged.
    sa.Column("start_step", sa.Integer, nullable=False),
    sa.Column("charged_step", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(256), nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    sa.UniqueConstraint("trial_id", "number"),
)

reports = sa.Table(
    "reports",
    metadata,
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("reported_at", sa.Float, nullable=False),
    # The trial's charge that ``epsilon`` speaks of.
    sa.Column("charged_iterations", sa.Integer, nullable=False),
    sa.Column("epsilon", sa.Float),
    sa.Column("eval_accuracy", sa.Float),
    sa.Column("eval_loss", sa.Float),
)

# What MLflow has yet to hear. A row is written with the fact that it tells of, in one
# transaction, and marked once MLflow has it.
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("message_id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("sweep_id", sa.String(96), sa.ForeignKey("sweeps.sweep_id"), nullable=False),
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id")),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("payload", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("delivered_at", sa.Float, index=True),
)


def open_database(home: Home) -> sa.Engine:
    """Connects, and creates the tables on first use.

    Args:
        home: Says which database; a SQLite file's folder is created.

    Raises:
        DatabaseError: If it cannot be reached, or was made by another version.
        HomeError: If the folder of a SQLite file cannot be made.
    """
    where = f"database {home.database_url.render_as_string(hide_password=True)}"
    try:
        engine = _connect(home)
        try:
            found = _create_tables(engine)
        except BaseException:
            engine.dispose()
            raise
    except exc.DBAPIError as error:
        raise DatabaseError(f"{where}: {error.orig}") from error
    if found != SCHEMA_VERSION:
        engine.dispose()
        raise DatabaseError(
            f"{where}: has schema {found}; this version of dp-sweeps reads schema {SCHEMA_VERSION}"
        )
    return engine


def _create_tables(engine: sa.Engine) -> int:
    """Creates the tables where there are none, and gives the schema's version."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two first users create one schema
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
        if sa.inspect(connection).has_table(schema_version.name):
            found = connection.scalar(sa.select(schema_version.c.version))
            if found is not None:
                return found
        metadata.create_all(connection)
        connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        return SCHEMA_VERSION


def _connect(home: Home) -> sa.Engine:
    if not home.uses_sqlite:
        return sa.create_engine(home.database_url, pool_pre_ping=True)
    home.create()
    engine = sa.create_engine(home.database_url, connect_args={"timeout": _BUSY_TIMEOUT_SECS})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin)
    return engine


@contextmanager
def try_delivery_lock(engine: sa.Engine) -> Generator[bool]:
    """Holds the right to deliver the outbox; gives False while anybody else holds it.

    Two that delivered at once would create an MLflow run each. The right ends with the block or
    with the process, however it dies.
    """
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            held = connection.scalar(sa.select(sa.func.pg_try_advisory_xact_lock(_DELIVERY_LOCK)))
            yield bool(held)
        return
    with open(f"{engine.url.database}-delivery", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's BEGIN below, not the driver's
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: sa.Connection) -> None:
    reads = READ_ONLY.keys() <= connection.get_execution_options().keys()
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
