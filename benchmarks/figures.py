"""What a benchmark of something that takes time, or may lose something, comes to."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number and its limit, which is an upper one.

    Attributes:
        name: What it is.
        value: The number.
        limit: What it must not exceed.
        note: What it was made from.
    """

    name: str
    value: float
    limit: float
    note: str

    @property
    def reached(self) -> bool:
        """Whether the number keeps to its limit."""
        return self.value <= self.limit
