"""One commit for whoever is waiting.

Making a transaction durable takes longer than deciding what is in it. So while one thread's
transaction is on its way to the disk, the requests of others gather, and whoever is next runs all
of them in one transaction. Each still gets its own answer, and none before it is durable.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from accounting.errors import AccountingError, DatabaseError, LedgerTampered
from accounting.ledger.transaction import LedgerTransaction

_LARGEST_GROUP = 64

T = TypeVar("T")


class _Waiting:
    """A request in the queue, and its answer."""

    def __init__(self, operation: Callable[[LedgerTransaction], Any]) -> None:
        self.operation = operation
        self.answered = False
        self.answer: Any = None
        self.error: BaseException | None = None


class GroupCommit:
    """Runs operations in shared transactions. Safe to use from several threads.

    Args:
        transaction: Begins one, and makes it durable when its block ends.
    """

    def __init__(
        self, transaction: Callable[[], AbstractContextManager[LedgerTransaction]]
    ) -> None:
        self._transaction = transaction
        self._queue: list[_Waiting] = []
        self._queue_lock = threading.Lock()
        self._turn = threading.Lock()

    def run(self, operation: Callable[[LedgerTransaction], T]) -> T:
        """Runs an operation, and returns its answer once that is durable.

        Args:
            operation: Raises before it changes anything, or not at all.

        Raises:
            DatabaseError: The transaction failed, and nothing in it happened.
            AccountingError: As the operation raises; the others in its transaction go on.
        """
        mine = _Waiting(operation)
        with self._queue_lock:
            self._queue.append(mine)
        with self._turn:
            while not mine.answered:
                with self._queue_lock:
                    group = self._queue[:_LARGEST_GROUP]
                    del self._queue[:_LARGEST_GROUP]
                self._commit(group)
        if mine.error is not None:
            raise mine.error
        return cast("T", mine.answer)

    def _commit(self, group: list[_Waiting]) -> None:
        try:
            with self._transaction() as transaction:
                for waiting in group:
                    self._attempt(waiting, transaction)
        except BaseException as error:
            for waiting in group:
                # An exception belongs to one thread; the others get one of their own.
                kind = LedgerTampered if isinstance(error, LedgerTampered) else DatabaseError
                waiting.error = kind(str(error))
                waiting.error.__cause__ = error
            if not isinstance(error, Exception):
                raise
        finally:
            for waiting in group:
                waiting.answered = True

    def _attempt(self, waiting: _Waiting, transaction: LedgerTransaction) -> None:
        before = transaction.journal.appended
        try:
            waiting.answer = waiting.operation(transaction)
        except AccountingError as error:
            if transaction.journal.appended != before:
                raise  # It had begun to change rows: all of them are rolled back.
            waiting.error = error
