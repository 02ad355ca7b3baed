"""What a search is told of what it proposed, by `sweeps.proposals` out of the database."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from sweeps.spec.domains import Value

Outcome = Literal["running", "completed", "pruned", "diverged", "refused", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A configuration that was proposed, and what has become of it.

    Attributes:
        values: A value of each field of the search space.
        outcome: ``failed`` stands for whatever says nothing of the configuration.
        utility: The last that was reported, higher is better; None before the first, or where it
            was not finite.
        epsilon: What had been spent then.
        step: When that was.
        excess: Of one that was refused: how far it was over its limit, relative to that; > 0.
    """

    values: Mapping[str, Value]
    outcome: Outcome
    utility: float | None = None
    epsilon: float | None = None
    step: int = 0
    excess: float = 0.0
