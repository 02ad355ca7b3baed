"""The tables of sweeps and trials, and the door to the database that holds them.

Connections, transactions and revisions are `accounting.database`'s, whose ledger lies in the same
database; here its errors become this room's.
"""

import fcntl
import hashlib
import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy import exc

from accounting import errors
from accounting.database import connection as database
from accounting.database.schema import Schema, upgrade
from accounting.ledger.ledger import Ledger
from accounting.ledger.transaction import LedgerTransaction
from sweeps.errors import DatabaseError, StoreError
from sweeps.home import Home

_DELIVERY_LOCK = 0x6470_7378  # any number that is ours alone

metadata = sa.MetaData()

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
    # What a person asked of the sweep while it runs: see `Wish`.
    sa.Column("wish", sa.String(16), nullable=False, server_default=""),
    # Who drives it, or did last, as ``host:pid``.
    sa.Column("driver", sa.String(256), nullable=False, server_default=""),
    # What a person has to know: why its driver went no further, or what its end lacks.
    sa.Column("reason", sa.Text, nullable=False, server_default=""),
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
    # The fields of the search space as they were proposed; NULL of a fork.
    sa.Column("setting", sa.JSON(none_as_null=True)),
    sa.Column("trial_config", sa.JSON(none_as_null=True)),
    # Of one that an open budget refused and may yet admit: the Rényi divergence that it takes.
    sa.Column("needed_rdp", sa.Double),
    # What is reserved in the ledger; NULL epsilon: no finite bound is known. A step that is taken
    # again by another branch counts again, so this may exceed the step at which the trial ends.
    sa.Column("planned_iterations", sa.Integer, nullable=False),
    sa.Column("planned_epsilon", sa.Float),
    # What was spent: iterations over all attempts, durable before anything of them is seen.
    sa.Column("charged_iterations", sa.Integer, nullable=False, default=0),
    sa.Column("mlflow_run_id", sa.String(64)),
    # Of a fork: the trial and the step that it goes on from.
    sa.Column("parent_trial_id", sa.String(128), index=True),
    sa.Column("parent_step", sa.Integer),
    # Whether somebody asked for it by name, so that no scheduler may prune it.
    sa.Column("exempt", sa.Boolean, nullable=False, server_default=sa.false()),
    # The first trial with its configuration, where it is a repeat of that; NULL of the first.
    sa.Column("repeat_of", sa.String(128)),
    # After it ran out of memory: how many gradients are computed at a time.
    sa.Column("microbatch_size", sa.Integer),
    sa.UniqueConstraint("sweep_id", "number"),
    sa.CheckConstraint("charged_iterations >= 0"),
    sa.CheckConstraint("charged_iterations <= planned_iterations"),
)

# Each time a worker takes a trial up.
attempts = sa.Table(
    "attempts",
    metadata,
    sa.Column("attempt_id", sa.String(32), primary_key=True),
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("worker", sa.String(256), nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
    # How it ended: see `AttemptEnd`. NULL while it runs.
    sa.Column("end", sa.String(16)),
    # What the trial had been charged when it began, by which progress is told.
    sa.Column("charged_before", sa.Integer, nullable=False, server_default="0"),
    sa.UniqueConstraint("trial_id", "number"),
)

# Each lineage of noise of a trial (`trainer.mechanism.keys`). Several attempts may go on with one.
branches = sa.Table(
    "branches",
    metadata,
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("branch_id", sa.String(32), nullable=False),
    # The step at which it began and the furthest that it was charged.
    sa.Column("start_step", sa.Integer, nullable=False),
    sa.Column("charged_step", sa.Integer, nullable=False),
    # What the trainer needs to go on with it; NULL where it cannot be gone on with.
    sa.Column("facts", sa.JSON(none_as_null=True)),
    sa.UniqueConstraint("trial_id", "branch_id"),
)

# Checkpoints that are whole. What is not here is not resumed from, whatever lies on a disk.
checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, primary_key=True),
    sa.Column("location", sa.Text, nullable=False),
    sa.Column("written_at", sa.Float, nullable=False),
)

# What a scheduler decided at a rung, once and for all.
rungs = sa.Table(
    "rungs",
    metadata,
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
    sa.Column("rung", sa.Integer, primary_key=True),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("utility", sa.Float),
    sa.Column("goes_on", sa.Boolean, nullable=False),
    sa.Column("decided_at", sa.Float, nullable=False),
)

reports = sa.Table(
    "reports",
    metadata,
    sa.Column("trial_id", sa.String(128), sa.ForeignKey("trials.trial_id"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    # A branch reports a step once: taken again, it is the same to the bit.
    sa.Column("branch", sa.Integer, primary_key=True),
    sa.Column("reported_at", sa.Float, nullable=False),
    # The trial's charge that ``epsilon`` speaks of.
    sa.Column("charged_iterations", sa.Integer, nullable=False),
    sa.Column("epsilon", sa.Float),
    sa.Column("eval_accuracy", sa.Float),
    sa.Column("eval_loss", sa.Float),
    # The same of averages of the parameters, where a trial keeps them.
    sa.Column("ema_eval_accuracy", sa.Float),
    sa.Column("ema_eval_loss", sa.Float),
    sa.Column("polyak_eval_accuracy", sa.Float),
    sa.Column("polyak_eval_loss", sa.Float),
)
# What a report may show, as `Store.add_report` takes it.
METRICS = (
    "epsilon",
    "eval_accuracy",
    "eval_loss",
    "ema_eval_accuracy",
    "ema_eval_loss",
    "polyak_eval_accuracy",
    "polyak_eval_loss",
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


SCHEMA = Schema(
    name="sweeps",
    migrations="sweeps.database.migrations",
    version_table="sweeps_schema",
    metadata=metadata,
)


def open_database(home: Home) -> sa.Engine:
    """Connects, and brings the tables to what this version expects: on first use it makes them.

    Args:
        home: Says which database; a SQLite file's folder is created.

    Raises:
        DatabaseError: If it cannot be reached, or was made by a newer version.
        HomeError: If the folder of a SQLite file cannot be made.
    """
    if home.uses_sqlite:
        home.create()
    with _translated():
        engine = database.connect(home.database_url)
        try:
            upgrade(engine, SCHEMA)
        except BaseException:
            engine.dispose()
            raise
    return engine


def open_ledger(home: Home, *, check: bool = True) -> Ledger:
    """The ledger in a home's database, whose end the home remembers.

    Args:
        home: Says which database.
        check: As `Ledger` takes it: False opens a damaged one, to look at.

    Raises:
        DatabaseError: As `open_database`.
        accounting.LedgerTampered: The ledger is not what was written.
    """
    engine = open_database(home)
    try:
        with _translated():
            return Ledger(engine, witness=home.ledger_witness, check=check)
    except BaseException:
        engine.dispose()
        raise


def existing_ledger(home: Home, *, check: bool = True) -> Ledger:
    """The ledger of a home that has one: looking at nothing must not create anything.

    Args:
        home: Says which database.
        check: As `open_ledger`.

    Raises:
        StoreError: If there is no ledger yet.
    """
    if home.uses_sqlite and not Path(home.database_url.database or "").exists():
        raise StoreError(
            f"no ledger at {home.path} yet; `dp-sweeps run SPEC` or `dp-sweeps budget create` "
            "starts one"
        )
    return open_ledger(home, check=check)


def finite_or_none(value: float) -> float | None:
    """The number, or None where it is infinite or NaN: databases and JSON have neither."""
    return value if math.isfinite(value) else None


@contextmanager
def budgeting(ledger: Ledger) -> Generator[LedgerTransaction]:
    """As `Ledger.transaction`, with this room's `DatabaseError`."""
    with _translated(), ledger.transaction() as transaction:
        yield transaction


@contextmanager
def writing(engine: sa.Engine) -> Generator[sa.Connection]:
    """As `accounting.database.connection.writing`, with this room's `DatabaseError`."""
    with _translated(), database.writing(engine) as connection:
        yield connection


@contextmanager
def reading(engine: sa.Engine) -> Generator[sa.Connection]:
    """As `accounting.database.connection.reading`, with this room's `DatabaseError`."""
    with _translated(), database.reading(engine) as connection:
        yield connection


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except errors.DatabaseError as error:
        raise DatabaseError(str(error)) from error


@contextmanager
def try_delivery_lock(engine: sa.Engine) -> Generator[bool]:
    """Holds the right to deliver the outbox; gives False while anybody else holds it.

    Two that delivered at once would create an MLflow run each. The right ends with the block or
    with the process, however it dies.
    """
    with _try_lock(engine, "delivery", _DELIVERY_LOCK) as held:
        yield held


@contextmanager
def try_driving_lock(engine: sa.Engine, sweep_id: str) -> Generator[bool]:
    """Holds the right to drive a sweep, as `try_delivery_lock`."""
    digest = hashlib.blake2b(sweep_id.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, signed=True)
    with _try_lock(engine, f"driving-{digest.hex()}", number) as held:
        yield held


@contextmanager
def _try_lock(engine: sa.Engine, name: str, number: int) -> Generator[bool]:
    """A lock that ends with its process: a file beside SQLite's, or PostgreSQL's own."""
    if engine.dialect.name == "postgresql":
        # Beside the transactions of rows, and in none: a server may end one that is idle.
        with _translated(), database.translated(engine), engine.connect() as pooled:
            connection = pooled.execution_options(isolation_level="AUTOCOMMIT")
            held = connection.scalar(sa.select(sa.func.pg_try_advisory_lock(number)))
            try:
                yield bool(held)
            finally:
                if held:
                    try:
                        connection.execute(sa.select(sa.func.pg_advisory_unlock(number)))
                    except exc.DBAPIError:  # the lock goes with its connection
                        connection.invalidate()
        return
    with open(f"{engine.url.database}-{name}", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held
