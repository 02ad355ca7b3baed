"""What is to be drawn, checked before anything is written."""

import dataclasses
import json
import re
from typing import Literal

from trainer.errors import DatasetError

Encoding = Literal["raw", "png"]
VERSION = "1.0.0"

_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_MAX_EXAMPLES = 100_000_000
_MAX_SIDE = 4096
_MAX_CLASSES = 100_000
_MAX_TEST = 10_000
# One image for each class is held in memory.
_MAX_BLOB_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What to draw. Two equal requests give the same data set, byte by byte.

    Attributes:
        name: Lower-case letters, digits and ``_``; the data set is ``synthetic_<name>``.
        num_examples: Training examples, >= 1. A fifth as many, at most 10,000, are ``test``.
        shape: Height, width (each 1 to 4096) and channels (1 or 3).
        num_classes: Classes, >= 2; one image for each of them takes at most a gibibyte.
        num_users: People to whom the training examples belong, each at least one, by the
            feature ``user``; other people have those of ``test``. None leaves the feature out.
        encoding: ``raw`` stores pixels as they are, which is quickest to read; ``png`` as files.
        seed: Of everything random, >= 0.
    """

    name: str
    num_examples: int
    shape: tuple[int, int, int]
    num_classes: int
    num_users: int | None = None
    encoding: Encoding = "raw"
    seed: int = 0

    def __post_init__(self) -> None:
        height, width, channels = self.shape
        users = 1 if self.num_users is None else self.num_users
        allowed = {
            "name": bool(_NAME.fullmatch(self.name)),
            "num_examples": 1 <= self.num_examples <= _MAX_EXAMPLES,
            "shape": 1 <= min(height, width) <= max(height, width) <= _MAX_SIDE
            and channels in (1, 3),
            "num_classes": 2 <= self.num_classes <= _MAX_CLASSES
            and self.num_classes * height * width * channels <= _MAX_BLOB_BYTES,
            "num_users": 1 <= users <= self.num_examples,
            "encoding": self.encoding in ("raw", "png"),
            "seed": self.seed >= 0,
        }
        for field, well in allowed.items():
            if not well:
                raise DatasetError(
                    f"{field}={getattr(self, field)!r}: {_ALLOWED[field]}", field=field
                )

    @property
    def dataset_name(self) -> str:
        """The TFDS name."""
        return f"synthetic_{self.name}"

    @property
    def num_test(self) -> int:
        """Examples of the split ``test``."""
        return max(1, min(self.num_examples // 5, _MAX_TEST))

    @property
    def description(self) -> str:
        """What it is, in words and as JSON; equal for equal requests alone."""
        request = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"Random images with a blob per class, made by dp-sweeps: {request}"


_ALLOWED = {
    "name": "allowed are 1 to 64 of a-z, 0-9 and _, beginning with a letter or digit",
    "num_examples": f"allowed is a whole number from 1 to {_MAX_EXAMPLES}",
    "shape": f"allowed are height and width from 1 to {_MAX_SIDE}, and 1 or 3 channels",
    "num_classes": f"allowed is a whole number from 2 to {_MAX_CLASSES}, such that an image for "
    f"each class takes at most {_MAX_BLOB_BYTES} bytes",
    "num_users": "allowed is a whole number from 1 to the number of examples",
    "encoding": "allowed is raw or png",
    "seed": "allowed is a whole number >= 0",
}
