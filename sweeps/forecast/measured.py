"""What one trial was seen to take, and which trials will take the like."""

import dataclasses
from collections.abc import Hashable

from trainer.config import TrialConfig
from trainer.training.plan import shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one trial took.

    Attributes:
        config: The trial.
        start_secs: All of it that its number of steps does not change, >= 0: reading the data,
            compiling where that was needed, the last checkpoint.
        step_secs: One step, with its share of reports and checkpoints, >= 0.
        checkpoint_bytes: Size of a checkpoint; None where none was at hand.
        where: What it ran on, in words.
    """

    config: TrialConfig
    start_secs: float
    step_secs: float
    checkpoint_bytes: int | None
    where: str


def family_of(config: TrialConfig) -> Hashable:
    """Equal where trials differ, of all that takes time, in batches and number of steps alone."""
    return shape_of(dataclasses.replace(config, sampling_prob=1.0))
