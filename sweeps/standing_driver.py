"""A sweep's driver as actors of its cluster: it needs nobody, and when it dies another goes on.

There are two actors. One drives; the other stands by, with everything loaded that takes seconds
to load, and takes over in the moment when the first one's death frees the right to drive. Ray
starts the dead one again, and now it stands by.

Whoever starts them may go. They are talked to through the sweep's rows alone, which say what is
to be done and what has become of it.
"""

import functools
import importlib
import logging
import time
from contextlib import suppress

from cluster import ClusterError, call_there, keep
from sweeps.database.store import Store, open_store
from sweeps.database.tables import existing_ledger
from sweeps.driver import drive, driving
from sweeps.errors import DrivenError, StoreError, SweepError, TrackingError
from sweeps.home import DATABASE_VARIABLE, Home
from sweeps.tracking.mlflow_writer import MlflowWriter, delivering

_LOG = logging.getLogger(__name__)
_LOOK_SECS = 0.2
_ASK_AGAIN_SECS = 5.0
# Whoever has just begun to drive, and its workers, need the processor more than who stands by.
_REST_SECS = 10.0
_LOAD_AFTER_SECS = 10.0


def stand(sweep_id: str) -> None:
    """Gives a sweep that runs a driver on the connected Ray, unless it has one there.

    Raises:
        SweepError: If it cannot be started, or would not find the sweep.
    """
    try:
        if problem := call_there(functools.partial(_problem, sweep_id)):
            raise SweepError(
                f"the cluster has another database than this command: {problem}; set "
                f"{DATABASE_VARIABLE} where Ray was started to what it is here"
            )
        for name in names(sweep_id):
            keep(name, functools.partial(_drive, sweep_id), rest_secs=_REST_SECS)
    except ClusterError as error:
        raise SweepError(str(error)) from error


def names(sweep_id: str) -> tuple[str, str]:
    """The names of a sweep's drivers in its cluster."""
    return f"dp-sweeps-driver-{sweep_id}-1", f"dp-sweeps-driver-{sweep_id}-2"


def _problem(sweep_id: str) -> str:
    """Why a sweep cannot be found from here; empty if it can."""
    try:
        Store(existing_ledger(Home.from_environment())).sweep(sweep_id)
    except StoreError as error:
        return str(error)
    return ""


def _drive(sweep_id: str) -> None:
    home = Home.from_environment()
    store = open_store(home)
    writer = MlflowWriter(store, home)
    begin = time.monotonic()
    while True:
        try:
            if not store.is_to_be_driven(sweep_id):
                # The other may have died between its sweep's end and its own.
                with suppress(TrackingError):
                    writer.deliver()
                if not store.is_to_be_driven(sweep_id):
                    return
            elif not store.is_driven(sweep_id):
                with driving(sweep_id, store), delivering(writer):
                    drive(sweep_id, store, home)
            elif time.monotonic() - begin > _LOAD_AFTER_SECS:
                _load(writer)
        except DrivenError:  # the other was quicker
            pass
        except Exception:  # the rows say whether to go on; if the database is away, they will
            _LOG.exception("sweep %s", sweep_id)
            time.sleep(_ASK_AGAIN_SECS)
        time.sleep(_LOOK_SECS)


def _load(writer: MlflowWriter) -> None:
    """Does what takes seconds before it is needed; nothing the second time."""
    importlib.import_module("sweeps.tune")
    with suppress(TrackingError):
        writer.connect()
