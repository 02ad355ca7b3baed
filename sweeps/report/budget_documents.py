"""The JSON of budgets and of the journal: documented in ``docs/json.md``, as the others are."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from accounting import Budget, BudgetStatus, Verification
from accounting.ledger.journal import Inspected
from sweeps.report.budget_view import BudgetRow
from sweeps.report.json_numbers import legal_json
from sweeps.report.room import Fit, Room


def budget_json(budget: Budget) -> dict[str, Any]:
    """What ``dp-sweeps budget create --json`` and the commands that change a budget print."""
    return legal_json(budget.to_json())


def budgets_json(rows: Sequence[BudgetRow]) -> dict[str, Any]:
    """What ``dp-sweeps budget list --json`` prints."""

    def level(row: BudgetRow) -> dict[str, Any] | None:
        if row.level is None:
            return None
        return {**dataclasses.asdict(row.level), "free": row.level.free}

    return legal_json({"budgets": [{**row.budget.to_json(), "level": level(row)} for row in rows]})


def status_json(
    status: BudgetStatus, others: Sequence[Budget], room: Room | None
) -> dict[str, Any]:
    """What ``dp-sweeps budget show --json`` prints."""
    return legal_json(
        {
            **status.to_json(),
            "same_data": [
                {
                    "name": other.name,
                    "policy": other.terms.policy,
                    "epsilon": other.terms.epsilon,
                    "delta": other.terms.delta,
                    "state": other.state,
                    "one_off": other.one_off,
                }
                for other in others
            ],
            "room": None if room is None else _room_json(room),
        }
    )


def _room_json(room: Room) -> dict[str, Any]:
    return {
        "fits": [_fit_json(fit) for fit in room.fits],
        "whole_fits": room.whole_fits,
        "admitted": room.admitted,
        "epsilon_after": room.epsilon_after,
        "reason": room.whole if room.whole is not None else room.obstacle,
    }


def _fit_json(fit: Fit) -> dict[str, Any]:
    setting: dict[str, Any]
    if fit.what:
        setting = {"selection": fit.what}
    else:
        setting = {
            "sampling_prob": fit.sampling_prob,
            "noise_multiplier": fit.noise_multiplier,
            "iterations": fit.iterations,
            "mechanism": fit.mechanism,
        }
    return {**setting, "asked": fit.asked, "more": fit.more, "at_least": fit.at_least}


def entry_json(row: Inspected) -> dict[str, Any]:
    """A row of the journal, as ``ledger show --json`` and ``ledger export`` print it.

    A damaged one says so under ``problem``; one that cannot be read has its ``text`` alone.
    """
    document: dict[str, Any] = {"seq": row.seq}
    if row.entry is None:
        document["text"] = row.text
    else:
        document |= {
            "at": row.entry.at,
            "kind": row.entry.kind,
            "budget": row.entry.budget,
            "facts": row.entry.facts,
        }
    document["hash"] = row.hash
    if row.problem:
        document["problem"] = row.problem
    return legal_json(document)


def journal_json(rows: Sequence[Inspected], problems: Sequence[str]) -> dict[str, Any]:
    """What ``dp-sweeps ledger show --json`` prints."""
    return {"entries": [entry_json(row) for row in rows], "problems": list(problems)}


def verification_json(found: Verification) -> dict[str, Any]:
    """What ``dp-sweeps ledger verify --json`` prints."""
    return legal_json(found.to_json())
