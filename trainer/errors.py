"""Errors of the trainer room.

TrainerError
├── ConfigError (also ValueError)   a field of a config is not allowed
├── YamlError                       a text is not the YAML that is read here
├── DatasetError                    a data set is absent or has the wrong form
├── ModelError                      a user model cannot be loaded, or may not be trained
├── CheckpointError                 a checkpoint is absent, damaged, of another shape or unwritable
├── OutOfMemory                     a step does not fit on the device
├── PackTooLarge                    trials do not fit on the device together
├── ChargesError                    a run's own ledger is damaged, absent or of another mechanism
├── RunError                        a run's directory is not as it has to be
└── SecretError                     a noise key cannot be kept or read
"""

import dataclasses
from collections.abc import Iterable


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class ConfigError(TrainerError, ValueError):
    """A field of a configuration has a value that is not allowed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a text.

    Attributes:
        message: What was found and what is allowed instead.
        path: Keys and indices that lead there; empty for the whole.
        line: Line in the text, from 1, or None.
        column: Column in that line, from 1, or None.
    """

    message: str
    path: tuple[str | int, ...] = ()
    line: int | None = None
    column: int | None = None


class YamlError(TrainerError):
    """A file cannot be read, or is not the YAML that is read here (`trainer.yaml_text`).

    Attributes:
        faults: Everything that is wrong, in the order of the text; one at least.
    """

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__(self.faults)

    def __str__(self) -> str:
        return "; ".join(fault.message for fault in self.faults)


class DatasetError(TrainerError):
    """A data set does not exist, is not prepared, or has a form that no model here takes.

    Attributes:
        field: The field of `trainer.config.DataConfig` that has to change.
    """

    def __init__(self, message: str, *, field: str = "name") -> None:
        super().__init__(message)
        self.field = field


class ModelError(TrainerError):
    """A user model cannot be loaded, or would not keep examples apart."""


class CheckpointError(TrainerError):
    """A path holds no complete checkpoint, or one that does not fit, or cannot be written to."""


class OutOfMemory(TrainerError):
    """A step does not fit on the device, and this trial may not or cannot do with less.

    Attributes:
        microbatch_size: Units at a time that did not fit; with 1, nothing smaller is left.
    """

    def __init__(self, message: str, *, microbatch_size: int) -> None:
        super().__init__(message)
        self.microbatch_size = microbatch_size


class PackTooLarge(TrainerError):
    """The trials of a pack do not fit on the device together; one alone may."""


class ChargesError(TrainerError):
    """A run's own ledger is damaged, missing, in use, or of another mechanism; it is not used."""


class RunError(TrainerError):
    """A run's directory exists where none may, or does not where one has to."""


class SecretError(TrainerError):
    """The root of a branch's keys cannot be kept, cannot be read, or is not what it was."""
