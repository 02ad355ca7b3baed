"""Data sets by their TFDS name, as arrays, with nothing downloaded and no TensorFlow.

Idea: a data set is whatever TFDS prepared under some data directory in the ``array_record``
format. It is found by looking at folders (`trainer.dataset_location`), read once through a TFDS
data source, decoded and scaled (`trainer.scaling`) into two float32 arrays that then live where
the trainer wants them. The built-in ``digits`` is prepared on first use and takes the same road.

Privacy. The number of examples, the shape of an image and the number of classes count as
public; everything else about the training examples is protected. So scaling reads one example
alone, `DatasetInfo` and its fingerprint hold public facts only, no error quotes an example, and
split expressions that would use an example twice or show a training example to the evaluation
are refused.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import DataConfig, Scaling
from trainer.dataset_location import (
    FILE_FORMAT,
    WHERE_TFDS_RUNS,
    Location,
    find_or_prepare,
    found_or_scratch,
)
from trainer.errors import DatasetError
from trainer.scaling import scale

# `tensorflow_datasets` takes about 0.4 s to import, so the functions that need it import it.

# Decoding goes in batches of about this many pixels: few enough to stay in a processor's cache
# while they are scaled, and little memory beside the result.
_BATCH_PIXELS = 1 << 18


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
    """

    name: str
    version: str
    num_train: int
    num_eval: int
    image_shape: tuple[int, int, int]
    num_classes: int
    fingerprint: str


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """Decoded and scaled examples, in the order of the data set. The arrays are read-only.

    Attributes:
        images: float32, shape (number of examples, height, width, channels), finite.
        labels: int32, shape (number of examples,).
    """

    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """What one trial learns from and is measured on.

    Attributes:
        train: The protected examples.
        eval: The held-out examples, treated as public.
        info: Public facts.
    """

    train: Examples
    eval: Examples
    info: DatasetInfo


def describe(config: DataConfig, home_data_dir: Path) -> DatasetInfo:
    """Reads the public facts about a data set; no example, where its features fix the shape.

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
            or a split is unknown, empty, uses an example twice, or overlaps the other.
    """
    with _quiet(), found_or_scratch(config, home_data_dir) as prepared:
        return _open(prepared, home_data_dir).info


def load(config: DataConfig, home_data_dir: Path) -> Dataset:
    """Decodes and scales both splits of a data set into memory.

    Args:
        config: Which data set, splits and scaling.
        home_data_dir: As in `describe`; ``digits`` is prepared there, or in
            ``config.data_dir``, where it is absent.

    Returns:
        The arrays with the facts.

    Raises:
        DatasetError: As in `describe`; or images differ in shape, a pixel is not finite, or a
            label is outside the classes.
    """
    with _quiet():
        opened = _open(config, home_data_dir)
        return Dataset(
            train=_read(opened, config.train_split, config.scaling),
            eval=_read(opened, config.eval_split, config.scaling),
            info=opened.info,
        )


# Opening.


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Opened:
    """A data set whose form and splits have been checked."""

    location: Location
    builder: Any
    image_key: str
    label_key: str
    info: DatasetInfo


def _open(config: DataConfig, home_data_dir: Path) -> _Opened:
    import tensorflow_datasets as tfds

    location = find_or_prepare(config, home_data_dir)
    try:
        builder: Any = tfds.builder_from_directory(location.path)
        tfds_info: Any = builder.info
    except Exception as error:  # Damaged metadata: TFDS raises whatever its parsers raise.
        raise DatasetError(
            f"data set {config.name!r} in {location.path} cannot be opened: {error}. Prepare it "
            "again in an empty folder"
        ) from error
    formats = sorted(file_format.value for file_format in tfds_info.available_file_formats())
    if FILE_FORMAT not in formats:
        raise DatasetError(
            f"data set {config.name!r} in {location.path} is stored as {' and '.join(formats)}; "
            f"allowed is {FILE_FORMAT}. Convert it with `tfds convert_format "
            f"--dataset_version_dir={location.path} --out_file_format={FILE_FORMAT}`, "
            f"{WHERE_TFDS_RUNS}"
        )
    image_key, label_key = _keys(config.name, tfds_info)
    train = _slices(config.name, tfds_info, "train_split", config.train_split)
    held_out = _slices(config.name, tfds_info, "eval_split", config.eval_split)
    if _overlap(train + held_out):
        raise DatasetError(
            f"data set {config.name!r}: eval_split={config.eval_split!r} overlaps train_split="
            f"{config.train_split!r}, but held-out examples are treated as public. Use ranges "
            "that do not overlap",
            field="eval_split",
        )
    info = DatasetInfo(
        name=location.name,
        version=location.version,
        num_train=sum(stop - start for _, start, stop in train),
        num_eval=sum(stop - start for _, start, stop in held_out),
        image_shape=_image_shape(location, builder, image_key, config.train_split),
        num_classes=tfds_info.features[label_key].num_classes,
        fingerprint=_fingerprint(location, tfds_info, image_key, label_key),
    )
    return _Opened(
        location=location, builder=builder, image_key=image_key, label_key=label_key, info=info
    )


def _image_shape(
    location: Location, builder: Any, image_key: str, split: str
) -> tuple[int, int, int]:
    shape = builder.info.features[image_key].shape
    if None in shape:  # The first example decides, and reading refuses what differs from it.
        source = _data_source(location, builder, split)
        shape = _decode(location.name, source, range(1))[0][image_key].shape
    height, width, *channels = shape
    return height, width, channels[0] if channels else 1


def _fingerprint(location: Location, tfds_info: Any, image_key: str, label_key: str) -> str:
    image, label = tfds_info.features[image_key], tfds_info.features[label_key]
    identity = {
        "name": location.name,
        "version": location.version,
        "image": [image_key, image.shape, np.dtype(image.np_dtype).name],
        "label": [label_key, label.num_classes],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _keys(name: str, tfds_info: Any) -> tuple[str, str]:
    """Keys of the image and the label: the supervised pair, else the only ones of their kind."""
    from tensorflow_datasets import features as tfds_features

    features: dict[str, Any] = {}
    if isinstance(tfds_info.features, tfds_features.FeaturesDict):
        features = dict(tfds_info.features.items())
    supervised: Any = tfds_info.supervised_keys
    if supervised and len(supervised) == 2 and all(isinstance(key, str) for key in supervised):
        features = {key: features[key] for key in supervised}
    labels = [
        key
        for key, kind in features.items()
        if type(kind) is tfds_features.ClassLabel and kind.num_classes
    ]
    images = [
        key
        for key, kind in features.items()
        if len(kind.shape or ()) in (2, 3)
        # Exactly these: text, labels and boxes are kinds of Tensor too.
        and (type(kind), kind.np_dtype)
        in (
            (tfds_features.Image, np.uint8),
            (tfds_features.Tensor, np.uint8),
            (tfds_features.Tensor, np.float32),
        )
    ]
    if len(labels) != 1 or len(images) != 1:
        raise DatasetError(
            f"data set {name!r} has {len(images)} usable image features and {len(labels)} class "
            f"labels among {sorted(features)}; allowed is one of each: an Image of uint8 or a "
            "Tensor of uint8 or float32 with two or three dimensions, and a ClassLabel. Where "
            "there are several, the data set's supervised_keys choose"
        )
    return images[0], labels[0]


# A run of examples in one file: file, first, one past the last.
_Slice = tuple[str, int, int]


def _slices(name: str, tfds_info: Any, field: str, expression: str) -> list[_Slice]:
    """The examples of a split expression as TFDS will read them."""
    sizes = ", ".join(f"{key} ({split.num_examples})" for key, split in tfds_info.splits.items())
    try:
        runs = tfds_info.splits[expression].file_instructions
    except Exception as error:  # TFDS raises six types here, by the kind of mistake.
        raise DatasetError(
            f"data set {name!r}: {field}={expression!r} cannot be read as a split. It has the "
            f"splits {sizes}; a part is written such as 'train[:80%]' or 'train[100:200]'",
            field=field,
        ) from error
    if not runs or any(run.take < 1 for run in runs):
        raise DatasetError(
            f"data set {name!r}: {field}={expression!r} selects no example. It has the splits "
            f"{sizes}",
            field=field,
        )
    slices = [(str(run.filename), run.skip, run.skip + run.take) for run in runs]
    if _overlap(slices):
        # In training it would count for more than one clipped gradient.
        raise DatasetError(
            f"data set {name!r}: {field}={expression!r} takes an example more than once. Use "
            "ranges that do not overlap",
            field=field,
        )
    return slices


def _overlap(slices: Sequence[_Slice]) -> bool:
    # If any two overlap, so do two neighbours in this order.
    ordered = sorted(slices)
    return any(
        file == next_file and next_start < stop
        for (file, _, stop), (next_file, next_start, _) in itertools.pairwise(ordered)
    )


# Reading.


def _data_source(location: Location, builder: Any, split: str) -> Any:
    try:
        # Not `tfds.data_source` by name: of a data set in several formats it may take Parquet,
        # whose reader ignores the range in a split such as 'train[:80%]'.
        return builder.as_data_source(split=split, file_format=FILE_FORMAT)
    except Exception as error:  # The types are the reader's own.
        raise DatasetError(
            f"data set {location.name!r} in {location.path} cannot be read: {error}. Prepare it "
            "again in an empty folder"
        ) from error


def _decode(name: str, source: Any, positions: range) -> list[dict[str, Any]]:
    try:
        return source.__getitems__(positions)
    except Exception as error:
        # Neither its message nor its chain: they may quote an example.
        raise DatasetError(
            f"data set {name!r} has a file that is missing, damaged or not decodable "
            f"({type(error).__name__}). Prepare it again in an empty folder"
        ) from None


def _read(opened: _Opened, split: str, scaling: Scaling) -> Examples:
    info = opened.info
    source = _data_source(opened.location, opened.builder, split)
    images = np.empty((len(source), *info.image_shape), np.float32)
    labels = np.empty(len(source), np.int32)
    batch_size = max(1, _BATCH_PIXELS // int(np.prod(info.image_shape)))
    for start in range(0, len(source), batch_size):
        stop = min(start + batch_size, len(source))
        records = _decode(info.name, source, range(start, stop))
        pixels = _stack(info, [record[opened.image_key] for record in records])
        classes = np.asarray([record[opened.label_key] for record in records], np.int64)
        if classes.min() < 0 or classes.max() >= info.num_classes:
            raise DatasetError(
                f"data set {info.name!r}: {split!r} has labels outside 0 to "
                f"{info.num_classes - 1}; -1 marks an example without a label. Use a labelled "
                "split"
            )
        images[start:stop] = scale(pixels, scaling)
        labels[start:stop] = classes
    images.setflags(write=False)
    labels.setflags(write=False)
    return Examples(images=images, labels=labels)


def _stack(info: DatasetInfo, images: list[np.ndarray]) -> np.ndarray:
    """One batch of decoded images, shape (examples, height, width, channels)."""
    shape = info.image_shape
    allowed = {shape, shape[:2]} if shape[2] == 1 else {shape}
    if any(image.shape not in allowed for image in images):
        raise DatasetError(
            f"data set {info.name!r}: not every image has shape {shape}. Prepare a data set whose "
            "images have one size and one number of channels"
        )
    stacked = np.stack([image.reshape(shape) for image in images])
    if not np.isfinite(stacked).all():
        raise DatasetError(f"data set {info.name!r}: a pixel is NaN or infinite")
    return stacked


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's advice, such as to install OpenCV, out of the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
