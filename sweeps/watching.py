"""Waiting for the end of a sweep that somebody else drives, by its rows alone."""

import time
from collections.abc import Callable

from sweeps.database.states import SweepState, Wish
from sweeps.database.store import Store
from sweeps.errors import SweepError

_LOOK_SECS = 0.5
# A driver that dies on a cluster is there again by then.
_DRIVERLESS_SECS = 60.0


def wait_for_end(
    sweep_id: str,
    store: Store,
    *,
    on_look: Callable[[], None] = lambda: None,
    why_gone: Callable[[], str] = lambda: "",
    is_coming: Callable[[], bool] = lambda: False,
) -> None:
    """Waits until a sweep no longer runs.

    Args:
        sweep_id: The sweep.
        store: The database.
        on_look: Called now and then.
        why_gone: Asked while nobody drives it: why nobody will, if that is known, else nothing.
        is_coming: Likewise: whether somebody is known to be about to, however long that takes.

    Raises:
        KeyboardInterrupt: Its driver was asked to leave it where it is, and has.
        SweepError: It has no driver any more; the message says why and what goes on.
        StoreError: There is no such sweep.
    """
    seen = time.monotonic()
    while True:
        gone = why_gone()  # first: a driver that ended may have ended the sweep
        row = store.sweep(sweep_id)
        on_look()
        if row.state != SweepState.RUNNING:
            return
        if store.is_driven(sweep_id) or is_coming():
            seen = time.monotonic()
        elif row.wish == Wish.INTERRUPT:
            raise KeyboardInterrupt
        elif gone or row.reason or time.monotonic() - seen > _DRIVERLESS_SECS:
            reason = gone or row.reason or "its driver is gone, or never came"
            raise SweepError(f"sweep {sweep_id}: {reason}; `dp-sweeps resume {sweep_id}` goes on")
        time.sleep(_LOOK_SECS)
