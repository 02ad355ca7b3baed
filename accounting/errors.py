"""What can go wrong in privacy accounting, as one small tree.

    AccountingError
    ├── InvalidPrivacyParameter   (also a ValueError)  the question makes no sense
    └── CalibrationError          the question makes sense, the answer does not exist

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
        shown = repr(self.value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return f"{self.field} must be {self.allowed}, got {shown} ({type(self.value).__name__})"


class CalibrationError(AccountingError):
    """No noise multiplier in the searched range meets the target, or every one does."""
