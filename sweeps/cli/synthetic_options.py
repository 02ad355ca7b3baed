"""What ``dp-sweeps data prepare synthetic`` is asked to draw."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.cli.output import progress
from sweeps.errors import CommandError
from trainer.data.synthetic.request import Encoding

if TYPE_CHECKING:
    from trainer.data.synthetic.request import Synthetic

_SHAPE = re.compile(r"(\d{1,4})x(\d{1,4})(?:x(\d))?")
_DEFAULT_NAME = "blobs"
# Fields of `trainer.data.synthetic.Synthetic` that options name otherwise.
_OPTIONS = {"num_examples": "examples", "num_classes": "classes", "num_users": "users"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticOptions:
    """The options by name; None where one is not given."""

    examples: int | None = None
    shape: str | None = None
    classes: int | None = None
    users: int | None = None
    name: str | None = None
    encoding: Encoding | None = None
    seed: int | None = None

    def refuse_any(self) -> None:
        """Refuses options where another data set is prepared.

        Raises:
            CommandError: One is given.
        """
        for option, value in vars(self).items():
            if value is not None:
                raise CommandError(f"--{option}: allowed for synthetic alone")


def prepare_synthetic_dataset(options: SyntheticOptions, data_dir: Path) -> str:
    """Writes a random data set, with a progress bar where that takes long.

    Args:
        options: What is wanted.
        data_dir: TFDS data directory to write to.

    Returns:
        The data set's name and version.

    Raises:
        CommandError: An option is missing or not allowed.
        trainer.errors.DatasetError: Another data set has that name, or the directory cannot be
            written.
    """
    from trainer.data.synthetic.preparation import prepare_synthetic
    from trainer.data.synthetic.request import VERSION

    request = _request(options)
    with progress("writing examples", request.num_examples + request.num_test) as on_progress:
        prepare_synthetic(request, data_dir, on_progress)
    return f"{request.dataset_name}:{VERSION}"


def _request(options: SyntheticOptions) -> "Synthetic":
    from trainer.data.synthetic.request import Synthetic
    from trainer.errors import DatasetError

    if options.examples is None or options.shape is None or options.classes is None:
        needed = {
            "--examples": options.examples,
            "--shape": options.shape,
            "--classes": options.classes,
        }
        missing = [option for option, value in needed.items() if value is None]
        raise CommandError(f"{', '.join(missing)}: missing; synthetic takes all of these")
    match = _SHAPE.fullmatch(options.shape)
    if match is None:
        raise CommandError(f"--shape {options.shape!r}: allowed is HxWxC, such as 32x32x3")
    height, width, channels = match.groups(default="1")
    try:
        return Synthetic(
            name=_DEFAULT_NAME if options.name is None else options.name,
            num_examples=options.examples,
            shape=(int(height), int(width), int(channels)),
            num_classes=options.classes,
            num_users=options.users,
            encoding=options.encoding or "raw",
            seed=options.seed or 0,
        )
    except DatasetError as error:
        field = _OPTIONS.get(error.field, error.field)
        raise CommandError(f"--{field}: {str(error).partition('=')[2]}") from error
