"""Works out every row of the ledger from its journal, and names what differs.

Three questions, from the inside out: does each entry follow from the one before (an edit or a
deletion inside the journal); do budgets, shares, reservations and tallies say what the entries
add up to (an edit of those rows); does the journal still hold what was noted outside the database
(a cut-off end, an older copy)? The adding up is done here anew and shares no code with what wrote
the rows.
"""

import collections
import dataclasses
import math
from typing import Any, cast

import sqlalchemy as sa

from accounting.errors import DatabaseError, LedgerTampered
from accounting.ledger.journal import GENESIS, Entry, Head, canonical_json, hash_at, read_entries
from accounting.ledger.records import request_from_text
from accounting.ledger.tables import budgets, reservations, shares, tallies
from accounting.ledger.witness import Witness
from accounting.mechanism import Mechanism, step_key

_MAX_PROBLEMS = 100
_LISTS = ("declared", "private_selection")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found.

    Attributes:
        entries: How many entries follow from each other, from the first on.
        head: The end of those; worth noting somewhere else.
        problems: What is wrong, in words; empty if the ledger is what was written. At most 100.
        witness: What the witness last saw; None where there is none.
    """

    entries: int
    head: Head
    problems: tuple[str, ...]
    witness: Head | None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data."""
        return {
            "ok": self.ok,
            "entries": self.entries,
            "head": str(self.head),
            "witness": None if self.witness is None else str(self.witness),
            "problems": list(self.problems),
        }


def verify(
    connection: sa.Connection, *, witness: Witness | None = None, expected: Head | None = None
) -> Verification:
    """Returns what differs between the journal, the rows, and what was noted outside.

    Args:
        connection: A transaction that sees one moment and has read nothing yet.
        witness: Where the end was noted.
        expected: An end that was noted elsewhere.
    """
    problems: list[str] = []
    seen: Head | None = None
    if witness is not None:  # before anything is read: see `Witness.check`
        try:
            seen = witness.read()
            witness.check(connection)
        except (LedgerTampered, DatabaseError) as error:
            problems.append(str(error))
    books = _Books()
    head, count = GENESIS, 0
    try:
        for entry, reached in read_entries(connection):
            head, count = reached, count + 1
            problem = books.apply(entry)
            if problem is not None:
                problems.append(f"journal entry {entry.seq}: {problem}")
    except LedgerTampered as error:
        problems.append(str(error))
    else:
        problems += books.differences(connection)
    if expected is not None and hash_at(connection, expected.seq) != expected.hash:
        problems.append(f"the journal does not hold entry {expected.seq} as it was noted")
    return Verification(
        entries=count, head=head, problems=tuple(problems[:_MAX_PROBLEMS]), witness=seen
    )


class _Books:
    """The rows as the journal has them."""

    def __init__(self) -> None:
        self.budgets: dict[str, dict[str, Any]] = {}
        self.shares: dict[tuple[str, str], int] = {}
        self.reservations: dict[str, dict[str, Any]] = {}
        self.committed: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self.charged: collections.Counter[tuple[str, str, str]] = collections.Counter()
        # Budgets that are divided, and who has trained something of each.
        self.divided: set[str] = set()
        self.begun: collections.defaultdict[str, set[str]] = collections.defaultdict(set)

    def apply(self, entry: Entry) -> str | None:
        """Adds an entry up; returns what is wrong with it, if anything."""
        try:
            return self._apply(entry)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            return f"makes no sense: {type(error).__name__}: {error}"

    def _apply(self, entry: Entry) -> str | None:
        facts, budget = entry.facts, entry.budget
        if entry.kind != "budget_created" and budget not in self.budgets:
            return f"speaks of {budget!r}, which was not created before"
        match entry.kind:
            case "budget_created":
                if facts["name"] != budget:
                    return f"creates {budget!r} under the name {facts['name']!r}"
                row = {name: value for name, value in facts.items() if name != "by"}
                self.budgets[budget] = {**row, "state": "active"}
            case "share_granted":
                self.shares[budget, facts["team"]] = facts["millionths"]
                self.divided.add(budget)
            case "frozen" | "thawed" | "retired":
                states = {"frozen": "frozen", "thawed": "active", "retired": "retired"}
                self.budgets[budget]["state"] = states[entry.kind]
            case "reserved" | "refused":
                return self._decision(entry)
            case "reserved_later" | "refused_again":
                return self._asked_again(entry)
            case "charged":
                return self._charge(facts["request_id"], facts["iterations"])
            case "charge_refused" | "extension_refused":
                pass
            case "extended":
                return self._extend(facts["request_id"], facts["iterations"], facts["verdict"])
            case "settled":
                return self._settle(entry)
            case _:
                return f"is of an unknown kind, {entry.kind!r}"
        return None

    def _decision(self, entry: Entry) -> str | None:
        facts = entry.facts
        request, verdict = facts["request"], facts["verdict"]
        admitted = entry.kind == "reserved"
        if verdict["admitted"] is not admitted:
            return "is not what its verdict says"
        if admitted and self._closed_list(entry.budget, facts["team"]):
            return "adds to a list that was closed"
        self.reservations[facts["request_id"]] = {
            "budget": entry.budget,
            "team": facts["team"],
            "state": "refused",
            "request": canonical_json(request),
            "verdict": canonical_json(verdict),
            "reserved": 0,
            "charged": 0,
            "committed": 0,
        }
        return self._admit(facts["request_id"], verdict) if admitted else None

    def _asked_again(self, entry: Entry) -> str | None:
        facts = entry.facts
        row, verdict = self.reservations[facts["request_id"]], facts["verdict"]
        if row["budget"] != entry.budget or row["state"] != "refused":
            return "asks again for what was not refused"
        if self.budgets[entry.budget]["policy"] != "open":
            return "asks again where a refusal is for good"
        admitted = entry.kind == "reserved_later"
        if verdict["admitted"] is not admitted:
            return "is not what its verdict says"
        row["verdict"] = canonical_json(verdict)
        return self._admit(facts["request_id"], verdict) if admitted else None

    def _admit(self, request_id: str, verdict: dict[str, Any]) -> str | None:
        row = self.reservations[request_id]
        mechanism, _ = request_from_text(row["request"])
        size = 1
        if isinstance(mechanism, Mechanism):
            size = mechanism.iterations
            key = (row["budget"], row["team"], step_key(mechanism.step))
            self.committed[key] += mechanism.repetitions
            self.charged[key] += 0
        row.update(state="open", reserved=size, committed=size)
        return _over_limit(verdict)

    def _extend(self, request_id: str, iterations: int, verdict: dict[str, Any]) -> str | None:
        row = self.reservations[request_id]
        key, repetitions = self._repetitions(row)
        if key is None or row["state"] == "refused":
            return "extends what cannot be extended"
        least = row["reserved"] + 1 if row["state"] == "open" else row["charged"]
        if not iterations >= least:
            return f"extends to {iterations}, which is less than {least}"
        committed = max(row["committed"], iterations)
        more = repetitions(committed) - repetitions(row["committed"])
        if more and self._closed_list(row["budget"], row["team"]):
            return "adds to a list that was closed"
        self.committed[key] += more
        row.update(
            state="open",
            reserved=iterations,
            committed=committed,
            verdict=canonical_json(verdict),
        )
        return _over_limit(verdict) if more else None

    def _charge(self, request_id: str, iterations: int) -> str | None:
        row = self.reservations[request_id]
        before, row["charged"] = row["charged"], iterations
        if not before < iterations <= row["reserved"]:
            return f"charges {iterations} of {row['reserved']} after {before}"
        self.begun[row["budget"]].add(row["team"])
        key, repetitions = self._repetitions(row)
        if key is not None:
            self.charged[key] += repetitions(iterations) - repetitions(before)
        return None

    def _settle(self, entry: Entry) -> str | None:
        row = self.reservations[entry.facts["request_id"]]
        row["state"] = entry.facts["state"]
        if row["charged"] != entry.facts["charged"]:
            return f"settles {entry.facts['charged']} where {row['charged']} were charged"
        keeps = self._closed_list(row["budget"], row["team"])
        if row["state"] != ("closed" if keeps or row["charged"] else "released"):
            return f"settles to {row['state']!r} after {row['charged']} were charged"
        key, repetitions = self._repetitions(row)
        if not keeps:
            unused, row["committed"] = row["committed"], row["charged"]
            if key is not None:
                self.committed[key] -= repetitions(unused) - repetitions(row["charged"])
        return None

    def _closed_list(self, budget: str, team: str) -> bool:
        """Whether it is a list that was begun: nothing is added to it or given back."""
        if self.budgets[budget]["policy"] not in _LISTS:
            return False
        begun = self.begun[budget]
        return team in begun if budget in self.divided else bool(begun)

    def _repetitions(self, row: dict[str, Any]) -> Any:
        """The tally that a reservation counts in, and how iterations count in it."""
        mechanism, _ = request_from_text(row["request"])
        if not isinstance(mechanism, Mechanism):
            return None, None

        def repetitions(iterations: int) -> int:
            return mechanism.after(iterations).repetitions if iterations else 0

        return (row["budget"], row["team"], step_key(mechanism.step)), repetitions

    # -- comparing ----------------------------------------------------------------------------

    def differences(self, connection: sa.Connection) -> list[str]:
        """What the tables say differently, in words."""
        return [
            *_compare(connection, budgets, ("name",), {(k,): v for k, v in self.budgets.items()}),
            *_compare(
                connection,
                shares,
                ("budget", "team"),
                {key: {"millionths": value} for key, value in self.shares.items()},
            ),
            *_compare(
                connection,
                reservations,
                ("request_id",),
                {(k,): v for k, v in self.reservations.items()},
            ),
            *_compare(
                connection,
                tallies,
                ("budget", "team", "step_key"),
                {
                    key: {"committed": committed, "charged": self.charged[key]}
                    for key, committed in self.committed.items()
                },
            ),
        ]


def _over_limit(verdict: dict[str, Any]) -> str | None:
    """What is wrong with an admission, if anything."""
    total = math.fsum(verdict[name] for name in ("requested", "spent", "reserved"))
    if not total <= verdict["limit"] * (1 + 1e-9):
        return f"admits {total!r} where the limit is {verdict['limit']!r}"
    return None


def _compare(
    connection: sa.Connection,
    table: sa.Table,
    key_columns: tuple[str, ...],
    expected: dict[Any, dict[str, Any]],
) -> list[str]:
    problems: list[str] = []
    left = dict(expected)
    for row in connection.execute(sa.select(table)).mappings():
        values = cast("dict[str, Any]", dict(row))
        key = tuple(values.pop(column) for column in key_columns)
        where = f"{table.name} {', '.join(str(part) for part in key)}"
        wanted = left.pop(key, None)
        if wanted is None:
            problems.append(f"{where}: is not in the journal")
            continue
        for name, value in values.items():
            says = wanted.get(name, "nothing")
            if says != value:
                problems.append(f"{where}: {name} is {value!r}; the journal says {says!r}")
    problems += [f"{table.name} {', '.join(map(str, key))}: is missing" for key in left]
    return problems
