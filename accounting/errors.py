"""What can go wrong in privacy accounting, as one small tree.

    AccountingError
    ├── InvalidPrivacyParameter   (also a ValueError)  the question makes no sense
    ├── CalibrationError          the question makes sense, the answer does not exist
    ├── BudgetExceeded            the ledger refuses, and has written down why
    ├── LedgerError               the ledger does not hold what was asked for
    ├── LedgerTampered            the ledger is not what was written; it is not used
    └── DatabaseError             it cannot be reached, or belongs to another version

Whoever decides about admission catches `AccountingError` and refuses: an error never admits.
"""


class AccountingError(Exception):
    """Any failure of the accounting; nothing was computed and nothing may be assumed."""


class InvalidPrivacyParameter(AccountingError, ValueError):
    """A privacy parameter is of the wrong type or out of range.

    Attributes:
        field: Name of the parameter.
        value: What was given.
        allowed: What would have been accepted, in words.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(field, value, allowed)

    def __str__(self) -> str:
        try:
            shown = repr(self.value)
        except ValueError:  # an integer of more digits than Python is willing to write
            shown = "a number"
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return f"{self.field} must be {self.allowed}, got {shown} ({type(self.value).__name__})"


class CalibrationError(AccountingError):
    """No noise multiplier in the searched range meets the target, or every one does."""


class BudgetExceeded(AccountingError):
    """The ledger refuses to reserve or to charge. The refusal is in its journal.

    Attributes:
        reason: Why, in words.
        requested: What was asked for, on top of what is taken already.
        spent: What can no longer be returned.
        reserved: What is promised to others and not spent yet.
        limit: What may be taken in all, by this team where the budget is divided.
        unit: What the four numbers count: "epsilon"; "rdp", the Rényi divergence at the order of
            the budget; or "iterations" of one reservation.
    """

    def __init__(
        self,
        reason: str,
        requested: float,
        spent: float,
        reserved: float,
        limit: float,
        unit: str = "epsilon",
    ) -> None:
        self.reason = reason
        self.requested = requested
        self.spent = spent
        self.reserved = reserved
        self.limit = limit
        self.unit = unit
        super().__init__(reason, requested, spent, reserved, limit, unit)

    def __str__(self) -> str:
        return self.reason


class LedgerError(AccountingError):
    """The ledger does not hold what was asked for, or not in a state that allows it."""


class LedgerTampered(AccountingError):
    """The ledger differs from what was written down: an edit, a deletion or a rollback."""


class DatabaseError(AccountingError):
    """The database cannot be reached, or belongs to another version; nothing was changed.

    One exception: where the connection broke during a commit, nobody can say whether the change
    was made. So whoever asks again does it under the same id.
    """
