"""What is prepared and where: the public facts of data sets, read off their metadata.

No example is read. Where a declaration (`trainer.data.declaration`) protects the size, numbers of
examples are left out here already, so that nobody can show them by mistake.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.dataset_form import check_user_feature, fingerprint, image_and_label
from trainer.data.dataset_location import Location, locations
from trainer.data.datasets import open_builder, quiet
from trainer.data.declaration import Declaration, read_declaration, write_declaration
from trainer.errors import DatasetError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedDataset:
    """The public facts about one version of a data set.

    Attributes:
        name: ``name[/config]``.
        version: As ``1.0.0``.
        path: Folder of the version.
        splits: Number of examples by split; None for all where it is protected.
        formats: File formats in which it is stored.
        problem: Why it cannot be trained on, in words; empty if it can.
        declaration: What was declared of it, or None.
        image_shape: Height, width, channels, with None where examples decide; None with a
            `problem`, as the two below.
        num_classes: Number of classes.
        fingerprint: As in `trainer.data.datasets.DatasetInfo`.
    """

    name: str
    version: str
    path: Path
    splits: Mapping[str, int | None] = dataclasses.field(default_factory=dict)
    formats: Sequence[str] = ()
    problem: str = ""
    declaration: Declaration | None = None
    image_shape: tuple[int | None, ...] | None = None
    num_classes: int | None = None
    fingerprint: str | None = None


def catalog(search_dirs: Sequence[Path]) -> list[PreparedDataset]:
    """All prepared data sets, in the order of the directories, then of names and versions.

    Args:
        search_dirs: TFDS data directories. They need not exist.

    Raises:
        DatasetError: A directory cannot be read.
    """
    found = [place for data_dir in search_dirs for place in locations(data_dir)]
    return [inspect(place) for place in dict.fromkeys(found)]


def inspect(location: Location) -> PreparedDataset:
    """The public facts of a data set; what is wrong with it is in its `problem`."""
    facts = PreparedDataset(name=location.name, version=location.version, path=location.path)
    try:
        # First: with a declaration that cannot be read, no size may be shown.
        declaration = read_declaration(location.path)
        facts = dataclasses.replace(facts, declaration=declaration)
        with quiet():
            info: Any = open_builder(location.name, location).info
            hidden = declaration is not None and declaration.hides_num_examples
            splits = {
                name: None if hidden else split.num_examples for name, split in info.splits.items()
            }
            formats = sorted(form.value for form in info.available_file_formats())
            facts = dataclasses.replace(facts, splits=splits, formats=formats)
            image_key, label_key = image_and_label(location.name, info)
            shape = info.features[image_key].shape
            return dataclasses.replace(
                facts,
                image_shape=shape if len(shape) == 3 else (*shape, 1),
                num_classes=info.features[label_key].num_classes,
                fingerprint=fingerprint(location, info, image_key, label_key),
            )
    except DatasetError as error:
        return dataclasses.replace(facts, problem=str(error))


def declare(location: Location, declaration: Declaration, *, replace: bool) -> None:
    """Declares something of a data set, for every sweep to be held to.

    Args:
        location: The data set.
        declaration: What to say of it.
        replace: Whether to replace another declaration that is there.

    Raises:
        DatasetError: The feature names nobody, there is another declaration, or the folder
            cannot be written.
    """
    if declaration.user_feature is not None:
        with quiet():
            info = open_builder(location.name, location).info
            check_user_feature(location.name, info, declaration.user_feature)
    write_declaration(location.path, declaration, replace=replace)
