"""What everybody may know of a branch: enough to tell whether its steps can be repeated.

A branch is one lineage of a trial's random numbers (`trainer.mechanism.keys`). A process that has
its root, begins with the very state that it began with, and runs the very same program takes its
steps again to the last bit: nothing is released twice, so nothing is charged twice. These facts
are kept in checkpoints, and a ledger keeps them with what it charges, so a branch can be gone on
with also where no checkpoint of it is left.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from trainer.errors import ConfigError

BRANCH_ID = re.compile(r"[0-9a-f]{16}")


@dataclasses.dataclass(frozen=True)
class Branch:
    """One lineage of noise of a trial. It holds no secret.

    What is None was written before it was known; such a branch is not gone on with.

    Attributes:
        branch_id: Its public name, 16 hexadecimal digits.
        start_step: Steps that were behind the trial when it began, >= 0.
        origin: SHA-256 of the state that it began with.
        program: SHA-256 of all else that decides the bits of its steps: configuration, data, code,
            compiler, devices (`trainer.training.program_identity`).
        engine: How gradients are computed.
        microbatch_size: Of how many units at a time; None for a whole row.
        asked_microbatch_size: What the configuration asked for; less may have fitted.

    Raises:
        ConfigError: A field is not allowed.
    """

    branch_id: str
    start_step: int
    origin: str | None = None
    program: str | None = None
    engine: str | None = None
    microbatch_size: int | None = None
    asked_microbatch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.branch_id, str) or not BRANCH_ID.fullmatch(self.branch_id):
            raise ConfigError(
                f"branch_id={self.branch_id!r}: allowed are 16 hexadecimal digits, as a branch "
                "was named"
            )
        for field, least in (
            ("start_step", 0),
            ("microbatch_size", 1),
            ("asked_microbatch_size", 1),
        ):
            value = getattr(self, field)
            if value is None and least:
                continue
            if type(value) is not int or value < least:
                raise ConfigError(f"{field}={value!r}: allowed is a whole number >= {least}")
        for field in ("origin", "program", "engine"):
            if not isinstance(getattr(self, field), str | None):
                raise ConfigError(f"{field}={getattr(self, field)!r}: allowed is text")

    def computes_as(self, engine: str, microbatch_size: int | None) -> bool:
        """Whether this is how a configuration wants it computed.

        ``auto`` and None leave the choice to the branch. A microbatch that was asked for when the
        branch began, and has become smaller since it did not fit, is no other wish.

        Args:
            engine: `trainer.config.ClippingConfig.engine`.
            microbatch_size: `trainer.config.ClippingConfig.microbatch_size`.
        """
        sizes = (None, self.microbatch_size, self.asked_microbatch_size)
        return engine in ("auto", self.engine) and microbatch_size in sizes

    def to_json(self) -> dict[str, Any]:
        """The branch as plain JSON data, for `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Branch":
        """The branch that `to_json` gave.

        Raises:
            ConfigError: A field is unknown, missing or not allowed.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ConfigError(f"not a branch: {error}") from error
