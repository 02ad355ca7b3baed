"""Data sets by their TFDS name, as arrays, with nothing downloaded and no TensorFlow.

Idea: a data set is whatever TFDS prepared under some data directory in the ``array_record``
format. It is found by looking at folders (`trainer.data.dataset_location`), checked by its
metadata (`trainer.data.dataset_form`), and read by position (`trainer.data.reading`), where
examples are decoded and scaled: all of them at once into two float32 arrays (`load`), or those of
a batch when they are needed (`open_examples`). The built-in ``digits`` is prepared on first use
and takes the same road.

Privacy. The number of examples, the shape of an image and the number of classes count as
public; everything else about the training examples is protected. So scaling reads one example
alone, `DatasetInfo` and its fingerprint hold public facts only, no error quotes an example, and
split expressions that would use an example twice or show a training example to the evaluation
are refused.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig
from trainer.data import users
from trainer.data.dataset_form import (
    check_user_feature,
    checked_slices,
    fingerprint,
    image_and_label,
    overlap,
)
from trainer.data.dataset_location import (
    FILE_FORMAT,
    WHERE_TFDS_RUNS,
    Location,
    find_or_prepare,
    found_or_scratch,
)
from trainer.data.declaration import Declaration, read_declaration
from trainer.data.reading import ExampleReader, Examples, Records, image_decoder, parse
from trainer.errors import DatasetError

# `tensorflow_datasets` takes about 0.4 s to import, so the functions that need it import it.

__all__ = [
    "Dataset",
    "DatasetInfo",
    "Examples",
    "OpenDataset",
    "describe",
    "load",
    "open_examples",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The public facts about a data set under one `DataConfig`.

    Attributes:
        name: TFDS name with the config if there is one: ``name[/config]``.
        version: Version that was found, such as ``1.0.0``.
        num_train: Number of protected training examples, >= 1.
        num_eval: Number of held-out examples, >= 1.
        image_shape: Height, width, channels.
        num_classes: Number of classes; labels are 0 to ``num_classes - 1``.
        fingerprint: 32 hexadecimal digits that identify the data set: a digest of its name,
            config, version and the form of its features. Equal on every machine, and the same
            whatever splits and scaling a trial uses. It does not depend on any pixel, label or
            size: a digest of protected examples would let anyone who knows all but one of them
            test a guess about the last, and where the size is protected it is guessed as fast.
        num_users: Number of people whose training examples they are, >= 1; None without
            ``user_feature``. Public under ``zero_out``, protected under ``add_or_remove_one``.
            Where people are the privacy unit, it is `num_train` that is protected under both.
        declaration: What was said of the data set for every sweep, or None.
    """

    name: str
    version: str
    num_train: int
    num_eval: int
    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str
    num_users: int | None = None
    declaration: Declaration | None = None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """What one trial learns from and is measured on.

    Attributes:
        train: The protected examples.
        eval: The held-out examples, treated as public.
        info: Public facts.
        user_positions: As in `OpenDataset`.
    """

    train: Examples
    eval: Examples
    info: DatasetInfo
    user_positions: np.ndarray | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OpenDataset:
    """A data set whose examples are read when they are asked for.

    Attributes:
        train: The protected examples.
        eval: The held-out examples, treated as public.
        info: Public facts.
        user_positions: Where in the training split each person's examples are, int32
            ``[num_users, most]``, padded with -1; people in the order of their first examples.
            None without ``user_feature``. Whose examples they are, how many somebody has and
            so ``most`` are protected.
    """

    train: ExampleReader
    eval: ExampleReader
    info: DatasetInfo
    user_positions: np.ndarray | None = dataclasses.field(default=None, repr=False)


def describe(config: DataConfig, home_data_dir: Path) -> DatasetInfo:
    """Reads the public facts about a data set.

    No example is read where the features fix an image's shape; with ``user_feature`` all are, to
    see whose they are.

    Nothing is written: ``digits``, where it is not prepared yet, is described from a copy in a
    temporary folder.

    Args:
        config: Which data set and splits.
        home_data_dir: Data directory of this installation, searched first unless
            ``config.data_dir`` names another.

    Returns:
        The facts.

    Raises:
        DatasetError: The data set is absent, cannot be read, or has a form that no model takes;
            or a split is unknown, empty, uses an example twice, or overlaps the other; or
            ``user_feature`` is none, or somebody has examples in both splits; or its declaration
            cannot be read.
    """
    with quiet(), found_or_scratch(config, home_data_dir) as prepared:
        return _open(prepared, home_data_dir).info


def open_examples(config: DataConfig, home_data_dir: Path) -> OpenDataset:
    """Opens both splits of a data set for reading by position, and decodes nothing yet.

    Args:
        config: Which data set, splits and scaling.
        home_data_dir: As in `describe`; ``digits`` is prepared there, or in
            ``config.data_dir``, where it is absent.

    Returns:
        The readers with the facts.

    Raises:
        DatasetError: As in `describe`.
    """
    with quiet():
        return _open(config, home_data_dir)


def load(config: DataConfig, home_data_dir: Path) -> Dataset:
    """Decodes and scales both splits of a data set into memory.

    Args:
        config: Which data set, splits and scaling.
        home_data_dir: As in `open_examples`.

    Returns:
        The arrays with the facts.

    Raises:
        DatasetError: As in `describe`; or images differ in shape, a pixel is not finite, or a
            label is outside the classes.
    """
    with quiet():
        opened = _open(config, home_data_dir)
        return Dataset(
            train=opened.train.read_all(),
            eval=opened.eval.read_all(),
            info=opened.info,
            user_positions=opened.user_positions,
        )


def _open(config: DataConfig, home_data_dir: Path) -> OpenDataset:
    location = find_or_prepare(config, home_data_dir)
    builder = open_builder(config.name, location)
    tfds_info = builder.info
    image_key, label_key = image_and_label(config.name, tfds_info)
    declaration = read_declaration(location.path)
    show_sizes = declaration is None or not declaration.hides_num_examples
    train, held_out = (
        checked_slices(config.name, tfds_info, field, expression, show_sizes=show_sizes)
        for field, expression in (
            ("train_split", config.train_split),
            ("eval_split", config.eval_split),
        )
    )
    if overlap(train + held_out):
        raise DatasetError(
            f"data set {config.name!r}: eval_split={config.eval_split!r} overlaps train_split="
            f"{config.train_split!r}, but held-out examples are treated as public. Use ranges "
            "that do not overlap",
            field="eval_split",
        )
    train_records = _records(location, builder, config.train_split)
    eval_records = _records(location, builder, config.eval_split)
    positions = None
    if config.user_feature is not None:
        check_user_feature(config.name, tfds_info, config.user_feature)
        positions = users.positions(train_records, eval_records, config.user_feature)
    decode_image = image_decoder(tfds_info.features[image_key], image_key)
    shape = tfds_info.features[image_key].shape
    if None in shape:  # The first example decides, and reading refuses what differs from it.
        (shape,) = train_records.read(range(1), lambda record: decode_image(parse(record)).shape)
    height, width, *channels = shape
    info = DatasetInfo(
        name=location.name,
        version=location.version,
        num_train=sum(stop - start for _, start, stop in train),
        num_eval=sum(stop - start for _, start, stop in held_out),
        image_shape=(height, width, channels[0] if channels else 1),
        num_classes=tfds_info.features[label_key].num_classes,
        fingerprint=fingerprint(location, tfds_info, image_key, label_key),
        num_users=None if positions is None else len(positions),
        declaration=declaration,
    )

    def reader(split: str, records: Records) -> ExampleReader:
        return ExampleReader(
            name=info.name,
            split=split,
            image_shape=info.image_shape,
            num_classes=info.num_classes,
            scaling=config.scaling,
            records=records,
            label_key=label_key,
            decode_image=decode_image,
        )

    return OpenDataset(
        train=reader(config.train_split, train_records),
        eval=reader(config.eval_split, eval_records),
        info=info,
        user_positions=positions,
    )


def open_builder(name: str, location: Location) -> Any:
    """TFDS's reader of a data set's metadata.

    Raises:
        DatasetError: It is damaged, or the data set is not in the format that is read.
    """
    import tensorflow_datasets as tfds

    try:
        builder: Any = tfds.builder_from_directory(location.path)
        formats = sorted(form.value for form in builder.info.available_file_formats())
    except Exception as error:  # Damaged metadata: TFDS raises whatever its parsers raise.
        raise DatasetError(
            f"data set {name!r} in {location.path} cannot be opened: {error}. Prepare it "
            "again in an empty folder"
        ) from error
    if FILE_FORMAT not in formats:
        raise DatasetError(
            f"data set {name!r} in {location.path} is stored as {' and '.join(formats)}; "
            f"allowed is {FILE_FORMAT}. Convert it with `tfds convert_format "
            f"--dataset_version_dir={location.path} --out_file_format={FILE_FORMAT}`, "
            f"{WHERE_TFDS_RUNS}"
        )
    return builder


def _records(location: Location, builder: Any, split: str) -> Records:
    try:
        # Not `tfds.data_source` by name: of a data set in several formats it may take Parquet,
        # whose reader ignores the range in a split such as 'train[:80%]'.
        source = builder.as_data_source(split=split, file_format=FILE_FORMAT).data_source
    except Exception as error:  # The types are the reader's own.
        raise DatasetError(
            f"data set {location.name!r} in {location.path} cannot be read: {error}. Prepare it "
            "again in an empty folder"
        ) from error
    return Records(location.name, source)


@contextlib.contextmanager
def quiet(*more: str) -> Iterator[None]:
    """Keeps TFDS's advice, such as to install OpenCV, out of the user's terminal.

    Args:
        more: Names of further loggers to be kept out.
    """
    loggers = [logging.getLogger(name) for name in ("absl", *more)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
