"""What one trial was seen to take, and which trials will take the like."""

import dataclasses
from collections.abc import Hashable

from trainer.config import TrialConfig
from trainer.training.plan import shape_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What one trial took of its worker: of one that had several at a time, its share.

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

    def shared(self, count: float) -> "Measured":
        """The share of each of so many trials which together took as long as this."""
        return dataclasses.replace(
            self, start_secs=self.start_secs / count, step_secs=self.step_secs / count
        )


def family_of(config: TrialConfig) -> Hashable:
    """Equal where trials differ, of all that takes time, in batches and number of steps alone."""
    return shape_of(dataclasses.replace(config, sampling_prob=1.0))
