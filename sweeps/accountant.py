"""The shared accountant: one ledger for everything on a cluster.

    with connect("auto", env_vars=...):
        ledger = shared_ledger()
        ledger.reserve("scans", mechanism, request_id="trial-1")

A `Ledger` in a named actor: one writer, whose curves stay computed and whose waiting requests are
made durable together. It has the methods of an `accounting.Ledger`, which a test or a notebook
opens directly and without Ray. What it knows lies in the database, so that it may die at any
moment: it comes back, and a request that was on its way is made again and gets the same answer.
"""

from typing import cast

from accounting import Ledger
from cluster import share
from sweeps.database.tables import open_ledger
from sweeps.home import Home

NAME = "dp-sweeps-accountant"

METHODS = (
    "account",
    "ask_again",
    "budget",
    "budgets",
    "charge",
    "create_budget",
    "extend",
    "freeze",
    "grant",
    "head",
    "reservation",
    "reservation_ids",
    "reserve",
    "reserve_together",
    "retire",
    "settle",
    "status",
    "thaw",
    "verify",
)
"""What is shared: all that a ledger does but transactions and the journal's entries."""


def shared_ledger() -> Ledger:
    """The accountant of the connected Ray; started by the first who asks.

    Its database is the one that ``DP_SWEEPS_HOME`` and ``DP_SWEEPS_DATABASE_URL`` name where the
    actor runs: secrets do not travel through Ray.

    Returns:
        A stand-in with the methods in `METHODS`. It may be sent to workers.

    Raises:
        ClusterError: If Ray is not connected; its methods raise it when Ray cannot be reached.
    """
    return cast("Ledger", share(NAME, _open, METHODS))


def _open() -> Ledger:
    return open_ledger(Home.from_environment())
