"""Where a sweep is, in a few lines: for a person who comes back to it, and for scripts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from sweeps.database.states import SweepState, TrialState
from sweeps.database.store import Store
from sweeps.report.results import SweepResults, read_results
from sweeps.report.table import list_numbers, one_line, show_epsilon, show_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Where a sweep is.

    Attributes:
        results: The sweep.
        driver: Who drives it, or did last, as ``host:pid``; empty before the first.
        is_driven: Whether somebody does.
        wish: What was asked of it: ``pause``, ``stop``, ``interrupt`` or nothing.
        reason: Why its driver went no further, or what its end lacks; else empty.
        undelivered: Messages that MLflow has yet to get, of all sweeps.
    """

    results: SweepResults
    driver: str
    is_driven: bool
    wish: str
    reason: str
    undelivered: int

    @property
    def next_step(self) -> str:
        """What a person may do now."""
        sweep_id, state = self.results.sweep_id, self.results.state
        if self.is_driven:
            return f"dp-sweeps watch {sweep_id}"
        if state in (SweepState.RUNNING, SweepState.PAUSED):
            return f"dp-sweeps resume {sweep_id}"
        if self.results.count(TrialState.PRUNED):
            return f"dp-sweeps resume {sweep_id} --top 1 --dry-run"
        return f"dp-sweeps show {sweep_id}"

    def counts(self) -> Mapping[str, int]:
        """Trials by state; states without trials are left out."""
        return {state.lower(): n for state in TrialState if (n := self.results.count(state))}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        best = self.results.best
        return {
            "sweep_id": self.results.sweep_id,
            "state": self.results.state,
            "driver": self.driver,
            "is_driven": self.is_driven,
            "wish": self.wish,
            "reason": self.reason,
            "trials": self.counts(),
            "charged_iterations": sum(t.charged_iterations for t in self.results.trials),
            "best_trial_id": None if best is None else best.trials[0].trial_id,
            "undelivered_messages": self.undelivered,
            "next": self.next_step,
        }


def read_status(store: Store, sweep_id: str) -> Status:
    """Reads where a sweep is.

    Raises:
        StoreError: If there is none of this id.
    """
    row = store.sweep(sweep_id)
    return Status(
        results=read_results(store, sweep_id),
        driver=row.driver,
        is_driven=store.is_driven(sweep_id),
        wish=row.wish,
        reason=row.reason,
        undelivered=store.outbox.count_undelivered(),
    )


def status_view(status: Status) -> Group:
    """The same for a terminal."""
    results = status.results
    state = f"{results.sweep_id}: {results.state.lower()}"
    if results.state is SweepState.RUNNING and not status.is_driven:
        state += ", but nobody drives it"
    if status.wish:
        state += f", asked to {status.wish}"
    counts = ", ".join(f"{count} {name}" for name, count in status.counts().items())
    lines = [Text(state, style="bold"), Text(f"trials   {counts}")]
    if results.best is not None:
        which = list_numbers(results.best.numbers)
        spent = show_epsilon(results.best.epsilon)
        lines.append(Text(f"best     {which}: {show_mean(results.best)} at ε = {spent}"))
    if status.driver:
        lines.append(Text(f"driver   {status.driver}{'' if status.is_driven else ' (gone)'}"))
    if status.reason:
        lines.append(Text(f"reason   {one_line(status.reason)}"))
    if status.undelivered:
        lines.append(Text(f"MLflow   has yet to get {status.undelivered} messages"))
    lines.append(Text(f"next     {status.next_step}", style="dim"))
    return Group(*lines)
