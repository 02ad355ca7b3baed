"""Reads examples of a prepared data set by their positions: random access, no TensorFlow.

A record is a serialised ``tf.train.Example``. TFDS's own data source turns each through the
machinery of all its features; here the one image and the one label are taken out of it and
nothing else, which gives the same bits in a half to a tenth of the time.

Threads may read from one reader at the same time: reading a file and decoding an image let go of
Python's lock. Nothing remembers or writes down which positions were read, for in training they
follow from secret keys; no error shows one, or an example.
"""

import concurrent.futures
import dataclasses
import functools
import io
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from trainer.config import Scaling
from trainer.data.scaling import scale
from trainer.errors import DatasetError

# Decoding goes in batches of about this many pixels: few enough to stay in a processor's cache
# while they are scaled, and little memory beside the result.
_BATCH_PIXELS = 1 << 18
# More threads than this wait for each other.
_MAX_THREADS = 8
# What TFDS and TensorFlow decode; Pillow knows many more, and tries them all unless told.
_IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "BMP")

T = TypeVar("T")

# Takes the features of a parsed record; gives an image, or raises whatever its decoder raises.
Decoder = Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """Decoded and scaled examples, in the order in which they were asked for.

    Attributes:
        images: float32, shape (number of examples, height, width, channels), finite.
        labels: int32, shape (number of examples,).
    """

    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ExampleReader:
    """The examples of one split, each read when it is asked for. Threads may share it.

    Attributes:
        name: The data set, for errors.
        split: TFDS split expression, for errors.
        image_shape: Height, width, channels of every image.
        num_classes: Labels are 0 to ``num_classes - 1``.
        scaling: How pixels become model inputs.
        records: The split as it is stored.
        label_key: Name of the label among a record's features.
        decode_image: Takes the image out of them.
    """

    name: str
    split: str
    image_shape: tuple[int, int, int]
    num_classes: int
    scaling: Scaling
    records: "Records" = dataclasses.field(repr=False)
    label_key: str
    decode_image: Decoder = dataclasses.field(repr=False)

    @property
    def num_examples(self) -> int:
        """Number of examples, >= 1."""
        return len(self.records)

    def read(self, positions: np.ndarray) -> Examples:
        """Decodes and scales some examples.

        Args:
            positions: Integers in ``[0, num_examples)``, shape (examples,), in any order,
                repeated or not; possibly none.

        Returns:
            These examples in this order.

        Raises:
            DatasetError: A file is missing, damaged or not decodable, an image has another shape
                or a pixel that is not finite, or a label is outside the classes.
            IndexError: A position is outside the split.
        """
        images = np.empty((len(positions), *self.image_shape), np.float32)
        labels = np.empty(len(positions), np.int32)
        self.read_into(positions, images, labels)
        return Examples(images=images, labels=labels)

    def read_into(self, positions: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """As `read`, into arrays that are there: float32 and int32, as long as ``positions``."""
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.num_examples:
            raise IndexError(f"data set {self.name!r}: a position outside of {self.split!r}")
        step = self._batch_size
        for start in range(0, len(positions), step):
            batch = slice(start, start + step)
            pixels, labels[batch] = self._decode(positions[batch])
            images[batch] = scale(pixels, self.scaling)

    def read_all(self) -> Examples:
        """All examples, decoded by several threads. The arrays are read-only.

        Raises:
            DatasetError: As in `read`.
        """
        images = np.empty((self.num_examples, *self.image_shape), np.float32)
        labels = np.empty(self.num_examples, np.int32)

        def read(start: int) -> None:
            stop = min(start + self._batch_size, self.num_examples)
            self.read_into(np.arange(start, stop), images[start:stop], labels[start:stop])

        starts = range(0, self.num_examples, self._batch_size)
        with concurrent.futures.ThreadPoolExecutor(min(num_cpus(), len(starts))) as pool:
            try:
                for _ in pool.map(read, starts):
                    pass
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # an error need not wait for all
                raise
        images.setflags(write=False)
        labels.setflags(write=False)
        return Examples(images=images, labels=labels)

    @property
    def _batch_size(self) -> int:
        return max(1, _BATCH_PIXELS // int(np.prod(self.image_shape)))

    def _decode(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One batch: pixels (examples, height, width, channels), and labels int64."""

        def decode(record: bytes) -> tuple[np.ndarray, int]:
            features = parse(record)
            (label,) = features[self.label_key].int64_list.value
            return self.decode_image(features), label

        decoded = self.records.read(positions, decode)
        shape = self.image_shape
        allowed = {shape, shape[:2]} if shape[2] == 1 else {shape}
        if any(image.shape not in allowed for image, _ in decoded):
            raise DatasetError(
                f"data set {self.name!r}: not every image has shape {shape}. Prepare a data set "
                "whose images have one size and one number of channels"
            )
        pixels = np.stack([image.reshape(shape) for image, _ in decoded])
        if pixels.dtype != np.uint8 and not np.isfinite(pixels).all():
            raise DatasetError(f"data set {self.name!r}: a pixel is NaN or infinite")
        labels = np.asarray([label for _, label in decoded], np.int64)
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise DatasetError(
                f"data set {self.name!r}: {self.split!r} has labels outside 0 to "
                f"{self.num_classes - 1}; -1 marks an example without a label. Use a labelled "
                "split"
            )
        return pixels, labels


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """The stored records of one split.

    Attributes:
        name: The data set, for errors.
        source: array_record's own data source.
    """

    name: str
    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def read(self, positions: np.ndarray | range, decode: Callable[[bytes], T]) -> Sequence[T]:
        """Reads and decodes some records.

        Raises:
            DatasetError: A file is missing or damaged, or a record cannot be decoded.
        """
        try:
            found = self.source.__getitems__([int(position) for position in positions])
            return [decode(record) for record in found]
        except Exception as error:
            # Neither its message nor its chain: they may quote an example.
            raise DatasetError(
                f"data set {self.name!r} has a file that is missing, damaged or not decodable "
                f"({type(error).__name__}). Prepare it again in an empty folder"
            ) from None


def parse(record: bytes) -> Any:
    """The features of a record by name, each a protobuf ``tf.train.Feature``."""
    return _example_class().FromString(record).features.feature


@functools.cache
def _example_class() -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2  # Its classes exist at run time alone.
    return messages.Example


def image_decoder(feature: Any, key: str) -> Decoder:
    """What takes the image out of a record's features, as TFDS would.

    Args:
        feature: TFDS's Image of uint8, or its Tensor of uint8 or float32.
        key: Its name.

    Returns:
        A function from a record's features to an array of the feature's dtype, whose shape is
        the feature's with what is unknown there filled in.
    """
    from tensorflow_datasets import features as tfds_features

    channels = feature.shape[-1]
    if isinstance(feature, tfds_features.Image):

        def decode_file(features: Any) -> np.ndarray:
            return _decode_file(features[key].bytes_list.value[0], channels)

        return decode_file
    dtype, encoding = np.dtype(feature.np_dtype), feature.to_json_content().encoding
    unknown = sum(size is None for size in feature.shape)
    shape = tuple(-1 if size is None else size for size in feature.shape)
    if encoding in ("bytes", "zlib"):
        # A shape that does not follow from the length is stored beside the pixels.
        value = f"{key}/value" if unknown > 1 else key

        def decode_bytes(features: Any) -> np.ndarray:
            (stored,) = features[value].bytes_list.value
            pixels = np.frombuffer(
                zlib.decompress(stored) if encoding == "zlib" else stored, dtype
            )
            return pixels.reshape(
                tuple(features[f"{key}/shape"].int64_list.value) if unknown > 1 else shape
            )

        return decode_bytes
    numbers = "int64_list" if dtype == np.uint8 else "float_list"

    def decode_numbers(features: Any) -> np.ndarray:
        return np.array(getattr(features[key], numbers).value, dtype).reshape(shape)

    return decode_numbers


def _decode_file(content: bytes, channels: int | None) -> np.ndarray:
    import PIL.Image

    with PIL.Image.open(io.BytesIO(content), formats=_IMAGE_FORMATS) as image:
        pixels = np.asarray(image, dtype=np.uint8)
    if pixels.ndim == 2:  # Grey: TFDS repeats it for every channel.
        pixels = np.repeat(pixels[..., None], channels or 1, axis=-1)
    return pixels


def num_cpus() -> int:
    """Threads that this process can use for reading, from 1 to 8."""
    available = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    return max(1, min(available or 1, _MAX_THREADS))
