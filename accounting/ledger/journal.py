"""The journal: entries that are only ever added, each hashed together with the one before.

Whoever changes, removes or inserts an entry breaks the chain from there on, or has to hash
everything after it anew, which changes the head. The head is therefore also written down outside
the database (`accounting.ledger.witness`).

    hash(n) = SHA-256(hash(n - 1) + entry(n)),    hash(0) = 64 zeros
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Generator, Mapping
from typing import Any

import sqlalchemy as sa

from accounting.errors import LedgerTampered
from accounting.ledger.tables import journal

_ROWS_AT_A_TIME = 5000
_ENCODER = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
)


@dataclasses.dataclass(frozen=True)
class Head:
    """The end of a journal.

    Attributes:
        seq: Number of the last entry; 0 where there is none.
        hash: Its hash, in hexadecimal.
    """

    seq: int
    hash: str

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


GENESIS = Head(0, "0" * 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry.

    Attributes:
        seq: From 1, without gaps.
        at: Seconds since the epoch.
        kind: What happened.
        budget: To which budget.
        facts: The numbers and names of it.
    """

    seq: int
    at: float
    kind: str
    budget: str
    facts: Mapping[str, Any]


def canonical_json(value: object) -> str:
    """Returns the one text of plain JSON data; floats survive to the last bit.

    Raises:
        ValueError: The data hold NaN or infinity.
    """
    return _ENCODER.encode(value)


def chained(previous: str, entry: str) -> str:
    """Returns the hash of an entry that follows another."""
    return hashlib.sha256((previous + entry).encode("utf-8", "surrogatepass")).hexdigest()


_APPEND = journal.insert()
_HASH = sa.select(journal.c.hash).where(journal.c.seq == sa.bindparam("number"))
_HEAD = sa.select(journal.c.seq, journal.c.hash).order_by(journal.c.seq.desc()).limit(1)


def read_head(connection: sa.Connection) -> Head:
    """Returns the end of the journal."""
    row = connection.execute(_HEAD).one_or_none()
    return GENESIS if row is None else Head(row.seq, row.hash)


class Writer:
    """Appends within one transaction, which holds the ledger's lock.

    Attributes:
        before: The end that the first entry was appended to; None where none was.
    """

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._rows: list[dict[str, Any]] = []
        self._appended = 0
        self._head: Head | None = None
        self.before: Head | None = None

    @property
    def appended(self) -> int:
        """How many entries were appended."""
        return self._appended

    def begin(self, head: Head) -> None:
        """Tells of the end that was read in this transaction, if nothing was appended yet."""
        if self.before is None:
            self.before = head

    def append(self, kind: str, budget: str, facts: Mapping[str, Any]) -> None:
        """Adds an entry; it is in the database once `flush` returned and the rest commits."""
        if self.before is None:
            self.before = read_head(self._connection)
        head = self._head or self.before
        seq = head.seq + 1
        entry = canonical_json(
            {"seq": seq, "at": time.time(), "kind": kind, "budget": budget, "facts": dict(facts)}
        )
        self._head = Head(seq, chained(head.hash, entry))
        self._appended += 1
        self._rows.append(
            {
                "seq": seq,
                "budget": budget,
                "kind": kind,
                "entry": entry,
                "hash": self._head.hash,
            }
        )

    def flush(self) -> Head | None:
        """Writes what was appended; returns the journal's new end, None where it is the old."""
        if self._rows:
            rows, self._rows = self._rows, []
            self._connection.execute(_APPEND, rows[0] if len(rows) == 1 else rows)
        return self._head


def parse(row: sa.Row[Any], previous: Head) -> Entry:
    """Returns a row's entry, after checking it against the one before.

    Raises:
        LedgerTampered: It does not follow, or was changed.
    """
    seq = previous.seq + 1
    if row.seq != seq:
        raise LedgerTampered(f"journal entry {seq} is missing (found {row.seq})")
    try:
        if chained(previous.hash, row.entry) != row.hash:
            raise LedgerTampered(f"journal entry {seq} or one before it was changed")
        data = json.loads(row.entry)
        entry = Entry(**data)
    except (ValueError, TypeError) as error:
        raise LedgerTampered(f"journal entry {seq} cannot be read: {error}") from error
    if (entry.seq, entry.kind, entry.budget) != (seq, row.kind, row.budget):
        raise LedgerTampered(f"the columns of journal entry {seq} were changed")
    return entry


def read_entries(connection: sa.Connection) -> Generator[tuple[Entry, Head]]:
    """Yields every entry in order, each checked against the one before, with its head.

    Raises:
        LedgerTampered: At the first entry that does not follow.
    """
    head = GENESIS
    while True:
        query = (
            sa.select(journal)
            .where(journal.c.seq > head.seq)
            .order_by(journal.c.seq)
            .limit(_ROWS_AT_A_TIME)
        )
        rows = connection.execute(query).all()
        for row in rows:
            entry = parse(row, head)
            head = Head(entry.seq, row.hash)
            yield entry, head
        if len(rows) < _ROWS_AT_A_TIME:
            return


def read(
    connection: sa.Connection, *, budget: str | None = None, newest: int | None = None
) -> Generator[tuple[Entry, Head]]:
    """Yields entries in order: all of them checked, or the newest ones as they stand.

    Args:
        connection: A transaction.
        budget: Of one budget alone; None for all.
        newest: How many; None for all.

    Raises:
        LedgerTampered: An entry is not what was written.
    """
    if newest is None:
        for entry, head in read_entries(connection):
            if budget is None or entry.budget == budget:
                yield entry, head
        return
    query = sa.select(journal).order_by(journal.c.seq.desc()).limit(newest)
    if budget is not None:
        query = query.where(journal.c.budget == budget)
    for row in connection.execute(query).all()[::-1]:
        before = hash_at(connection, row.seq - 1)
        if before is None:
            raise LedgerTampered(f"journal entry {row.seq - 1} is missing")
        entry = parse(row, Head(row.seq - 1, before))
        yield entry, Head(row.seq, row.hash)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspected:
    """A row of the journal as it stands, sound or not.

    Attributes:
        seq: Its number.
        hash: The hash that stands in it.
        budget: The budget that stands in it.
        text: What stands in it.
        entry: What that says; None where it cannot be read.
        problem: Why it is not what was written, in words; empty if it is.
    """

    seq: int
    hash: str
    budget: str
    text: str
    entry: Entry | None
    problem: str


def inspect(
    connection: sa.Connection, *, budget: str | None = None, newest: int | None = None
) -> Generator[Inspected]:
    """Yields rows in order, damaged ones too; for looking at a journal that `read` refuses.

    Args:
        connection: A transaction.
        budget: Of one budget alone; None for all.
        newest: How many; None for all.
    """
    if newest is not None:
        query = sa.select(journal).order_by(journal.c.seq.desc()).limit(newest)
        if budget is not None:
            query = query.where(journal.c.budget == budget)
        for row in connection.execute(query).all()[::-1]:
            yield _inspected(row, Head(row.seq - 1, hash_at(connection, row.seq - 1) or ""))
        return
    head = GENESIS
    while True:
        query = sa.select(journal).where(journal.c.seq > head.seq).order_by(journal.c.seq)
        rows = connection.execute(query.limit(_ROWS_AT_A_TIME)).all()
        for row in rows:
            if budget is None or row.budget == budget:
                yield _inspected(row, head)
            head = Head(row.seq, row.hash)
        if len(rows) < _ROWS_AT_A_TIME:
            return


def _inspected(row: sa.Row[Any], previous: Head) -> Inspected:
    problem = ""
    try:
        if not previous.hash:
            raise LedgerTampered(f"journal entry {previous.seq} is missing")
        entry = parse(row, previous)
    except LedgerTampered as error:
        problem = str(error)
        try:
            entry = Entry(**json.loads(row.entry))
        except (ValueError, TypeError):
            entry = None
    return Inspected(
        seq=row.seq,
        hash=row.hash,
        budget=row.budget,
        text=row.entry,
        entry=entry,
        problem=problem,
    )


def check_end(connection: sa.Connection) -> Head:
    """Checks the last two entries and that none is missing before them; quick.

    Raises:
        LedgerTampered: The end is not what was written.
    """
    last = journal.c.seq.desc()
    rows = connection.execute(sa.select(journal).order_by(last).limit(2)).all()[::-1]
    if not rows:
        return GENESIS
    count = connection.scalar(sa.select(sa.func.count()).select_from(journal))
    if count != rows[-1].seq:
        raise LedgerTampered(f"the journal ends at {rows[-1].seq} and holds {count} entries")
    previous = GENESIS if len(rows) == 1 else Head(rows[0].seq, rows[0].hash)
    parse(rows[-1], previous)
    return Head(rows[-1].seq, rows[-1].hash)


def hash_at(connection: sa.Connection, seq: int) -> str | None:
    """Returns the hash of an entry, or None where there is no such entry."""
    if seq == 0:
        return GENESIS.hash
    return connection.scalar(_HASH, {"number": seq})
