"""One commit for whoever is waiting.

Making a transaction durable takes longer than deciding what is in it. So while one thread's
transaction is on its way to the disk, the requests of others gather, and whoever is next runs all
of them in one transaction. Each still gets its own answer, and none before it is durable.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from accounting.errors import AccountingError, DatabaseError, LedgerTampered
from accounting.ledger.transaction import LedgerTransaction

_LARGEST_GROUP = 64
_PATIENCE_SECS = 1e-3  # about what a commit takes

T = TypeVar("T")


class _Waiting:
    """A request in the queue, and its answer."""

    def __init__(
        self, operation: Callable[[LedgerTransaction], Any], request_ids: Sequence[str]
    ) -> None:
        self.operation = operation
        self.request_ids = request_ids
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
        self._change = threading.Condition()
        self._committing = False
        self._expected = 1

    def run(
        self, operation: Callable[[LedgerTransaction], T], request_ids: Sequence[str] = ()
    ) -> T:
        """Runs an operation, and returns its answer once that is durable.

        Args:
            operation: Raises before it changes anything, or not at all.
            request_ids: Reservations that it will look up; read together with the others'.

        Raises:
            DatabaseError: The transaction failed, and nothing in it happened.
            AccountingError: As the operation raises; the others in its transaction go on.
        """
        mine = _Waiting(operation, request_ids)
        with self._change:
            self._queue.append(mine)
            self._change.notify_all()
        while not self._answered_by_others(mine):
            self._commit(self._next_group())
        if mine.error is not None:
            raise mine.error
        return cast("T", mine.answer)

    def _answered_by_others(self, mine: _Waiting) -> bool:
        """Waits for the answer; false makes this thread the one that commits next."""
        with self._change:
            self._change.wait_for(lambda: mine.answered or not self._committing)
            self._committing = self._committing or not mine.answered
            return mine.answered

    def _next_group(self) -> list[_Waiting]:
        """Whoever waits. Those answered together come back together, so they get a moment."""
        with self._change:
            try:
                self._change.wait_for(lambda: len(self._queue) >= self._expected, _PATIENCE_SECS)
            except BaseException:  # interrupted: somebody else has to commit
                self._committing = False
                self._change.notify_all()
                raise
            group = self._queue[:_LARGEST_GROUP]
            del self._queue[:_LARGEST_GROUP]
            self._expected = len(group)
        return group

    def _commit(self, group: list[_Waiting]) -> None:
        try:
            with self._transaction() as transaction:
                transaction.look_up([name for w in group for name in w.request_ids])
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
            with self._change:
                for waiting in group:
                    waiting.answered = True
                self._committing = False
                self._change.notify_all()

    def _attempt(self, waiting: _Waiting, transaction: LedgerTransaction) -> None:
        before = transaction.journal.appended
        try:
            waiting.answer = waiting.operation(transaction)
        except AccountingError as error:
            if transaction.journal.appended != before:
                raise  # It had begun to change rows: all of them are rolled back.
            waiting.error = error
