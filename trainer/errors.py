"""Errors of the trainer room.

TrainerError
├── ConfigError (also ValueError)   a field of a config is not allowed
├── DatasetError                    a data set is absent or has the wrong form
└── CheckpointError                 a checkpoint is absent, damaged or of another shape
"""


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""


class ConfigError(TrainerError, ValueError):
    """A field of a configuration has a value that is not allowed."""


class DatasetError(TrainerError):
    """A data set does not exist, is not prepared, or has a form that no model here takes.

    Attributes:
        field: The field of `trainer.config.DataConfig` that has to change.
    """

    def __init__(self, message: str, *, field: str = "name") -> None:
        super().__init__(message)
        self.field = field


class CheckpointError(TrainerError):
    """A path holds no complete checkpoint, or one that does not fit what was asked."""
