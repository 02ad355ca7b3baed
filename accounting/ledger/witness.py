"""A witness outside the database: where the journal ended when it was last seen.

A hash chain shows that nothing inside it changed. It cannot show that its end was cut off, or that
the whole database was put back to an older copy. A witness can: the journal must still hold, at
the place that the witness saw, the entry that it saw.

The file is written after the commit, so it never runs ahead of the database; a crash in between
leaves it a little behind, which is harmless. Two slots are written in turn, each with a checksum,
so that a write that is cut short leaves the other one. A reader takes the newer valid slot.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Generator
from pathlib import Path

import sqlalchemy as sa

from accounting.errors import DatabaseError, LedgerTampered
from accounting.ledger.journal import Head, hash_at

_SLOT_BYTES = 256


class Witness:
    """The file of one database. Safe to use from several processes.

    Args:
        path: The file; made when first written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Head | None:
        """Returns the newest end seen; None where there is no file yet.

        Raises:
            LedgerTampered: There is a file, and nothing in it makes sense.
            DatabaseError: There is a file, and it cannot be read.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._out_of_reach("read", error) from error
        found = _newest(data)
        if found is None and data:
            raise LedgerTampered(f"{self.path} is damaged{self._way_out}")
        return found

    def saw(self, head: Head) -> None:
        """Notes an end of the journal, unless a later one is noted already.

        Raises:
            DatabaseError: It cannot be noted.
        """
        try:
            with self._locked() as file:
                data = os.pread(file, 2 * _SLOT_BYTES, 0)
                newest = _newest(data)
                if newest is not None and newest.seq >= head.seq:
                    return
                slot = head.seq % 2
                if newest is not None and _parse(data[slot * _SLOT_BYTES :]) == newest:
                    slot = 1 - slot  # never over the newest one
                os.pwrite(file, _record(head), slot * _SLOT_BYTES)
        except OSError as error:
            raise self._out_of_reach("written", error) from error

    def check(self, connection: sa.Connection, known: Head | None = None) -> None:
        """Checks that the journal still holds what the witness saw.

        Args:
            connection: A transaction that has read nothing yet, or that holds the ledger's lock;
                an older moment of the journal would end before what the witness saw.
            known: An end that the connection has read; usually the one that was seen last.

        Raises:
            LedgerTampered: It does not: entries were removed or replaced.
            DatabaseError: The file cannot be read.
        """
        seen = self.read()
        if seen is not None and seen != known and hash_at(connection, seen.seq) != seen.hash:
            raise LedgerTampered(
                f"the journal no longer holds entry {seen.seq} as {self.path} saw it: entries "
                f"were removed or replaced, or the database was put back to an older copy"
                f"{self._way_out}"
            )

    def _out_of_reach(self, what: str, error: OSError) -> DatabaseError:
        return DatabaseError(f"{self.path} cannot be {what}: {error.strerror}")

    @property
    def _way_out(self) -> str:
        return (
            "; what was spent since is missing from the ledger. If that is deliberate and "
            "accounted for elsewhere, remove the file"
        )

    @contextlib.contextmanager
    def _locked(self) -> Generator[int]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _record(head: Head) -> bytes:
    text = str(head)
    checksum = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text} {checksum}\n".encode().ljust(_SLOT_BYTES)


def _parse(slot: bytes) -> Head | None:
    try:
        text, checksum = slot[:_SLOT_BYTES].decode("ascii").split()
        if hashlib.sha256(text.encode()).hexdigest()[:16] != checksum:
            return None
        seq, digest = text.split(":")
        return Head(int(seq), digest)
    except ValueError:
        return None


def _newest(data: bytes) -> Head | None:
    slots = [_parse(data[start : start + _SLOT_BYTES]) for start in (0, _SLOT_BYTES)]
    return max((head for head in slots if head), key=lambda head: head.seq, default=None)
