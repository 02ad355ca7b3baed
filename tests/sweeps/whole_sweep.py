"""A whole sweep under way in a process of its own, and what its rows say meanwhile."""

import contextlib
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import sqlalchemy as sa
import yaml

from sweeps.database.store import open_store
from sweeps.database.tables import attempts, branches
from sweeps.home import Home

DEADLINE_SECS = 240
BINARY = Path(sys.executable).with_name("dp-sweeps")


def environment_of_users():
    """The environment without what the tests tell JAX."""
    testing = {"JAX_PLATFORMS", "XLA_FLAGS"}
    return {name: value for name, value in os.environ.items() if name not in testing}


def command(folder, spec, *more, **environment):
    """The command line and environment of ``dp-sweeps run`` on a spec in a folder.

    Without a spec, of ``dp-sweeps resume``.
    """
    arguments = ["resume"]
    if spec is not None:
        path = folder / "spec.yaml"
        path.write_text(yaml.safe_dump(spec))
        arguments = ["run", str(path)]
    home = folder / "home"
    return [str(BINARY), *arguments, "--json", *more], {
        **environment_of_users(),
        "DP_SWEEPS_HOME": str(home),
        **environment,
    }


@contextlib.contextmanager
def running(folder, spec, *more, **environment):
    """A sweep under way, in a process group of its own; killed if the block leaves it running."""
    arguments, env = command(folder, spec, *more, **environment)
    # Whoever started the tests in the background made them deaf to it, and so their children.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        arguments,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        signal.signal(signal.SIGINT, heard)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def store_of(folder):
    home = Home.from_environment({"DP_SWEEPS_HOME": str(folder / "home")})
    return open_store(home), home


def wait_for(condition):
    """Polls until a condition gives something true, within the deadline."""
    end = time.monotonic() + DEADLINE_SECS
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("the deadline passed")


def store_of_when_there(folder):
    wait_for((folder / "home" / "ledger.db").exists)
    return store_of(folder)


def rows_of(store):
    """The trials of the newest sweep, by number; none before there is one."""
    return [row for sweep in store.sweeps()[:1] for row in store.trials(sweep.sweep_id)]


def attempts_at(store, trial_id):
    with store.ledger.engine.connect() as connection:
        query = sa.select(attempts).where(attempts.c.trial_id == trial_id)
        return connection.execute(query.order_by(attempts.c.number)).all()


def branch_rows(store):
    with store.ledger.engine.connect() as connection:
        return connection.execute(sa.select(branches)).all()


def worker_of(store, trial_id):
    """The process that runs a trial, or did last."""
    return int(attempts_at(store, trial_id)[-1].worker.rpartition(":")[2])


def charges(store):
    """What every trial has been charged."""
    return {row.trial_id: row.charged_iterations for row in rows_of(store)}


def freeze(store, processes):
    """Stops processes, in a moment when none of them is writing to the database (SQLite)."""

    def stopped():
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        for process in processes:  # it takes a moment
            wait_for(lambda stat=Path(f"/proc/{process}/stat"): ") T " in stat.read_text())
        try:
            # Whoever is stopped within a write keeps its turn for ever, and the file's lock.
            with (
                open(f"{database}-lock", "rb") as turn,
                contextlib.closing(sqlite3.connect(database, timeout=0)) as connection,
            ):
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                connection.execute("BEGIN IMMEDIATE")
        except (BlockingIOError, sqlite3.OperationalError):
            for process in processes:
                os.kill(process, signal.SIGCONT)
            return False
        return True

    database = store.ledger.engine.url.database
    wait_for(stopped)
