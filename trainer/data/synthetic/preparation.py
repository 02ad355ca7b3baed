"""Writes a synthetic data set into a data directory, whole or not at all (`data.prepared`).

Records are serialised here, several files at a time, since TFDS's own writers check and shuffle
each example; a million images of 32x32x3 take a minute and not an hour.
"""

import concurrent.futures
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.prepared import is_complete, place
from trainer.data.reading import num_cpus
from trainer.data.synthetic.drawing import Drawing
from trainer.data.synthetic.request import VERSION, Synthetic
from trainer.errors import DatasetError

# Files are about this large, and examples are drawn this many bytes at a time.
_FILE_BYTES = 1 << 25
_BATCH_BYTES = 1 << 22


def prepare_synthetic(
    request: Synthetic, data_dir: Path, on_progress: Callable[[int], None] | None = None
) -> Path:
    """Writes a data set under ``data_dir`` unless it is there.

    Args:
        request: What to draw.
        data_dir: TFDS data directory. It is created if need be.
        on_progress: Called now and then, by one thread at a time, with the number of examples
            that were written since.

    Returns:
        The folder of the prepared version.

    Raises:
        DatasetError: Another data set has that name, or the directory cannot be written.
    """
    try:
        path = place(
            data_dir,
            request.dataset_name,
            VERSION,
            lambda scratch: _build(request, Path(scratch), on_progress or (lambda _: None)),
        )
    except OSError as error:
        raise DatasetError(
            f"data set {request.dataset_name!r} cannot be prepared in {data_dir}: {error}. Remove "
            "what is in the way, or name a directory that can be written",
            field="data_dir",
        ) from error
    if is_complete(path) and _description(path) != request.description:
        raise DatasetError(
            f"data set {request.dataset_name!r} exists in {path} with other contents; allowed is "
            "another name, or to remove that folder"
        )
    return path


def _description(path: Path) -> object:
    try:
        return json.loads((path / "dataset_info.json").read_text()).get("description")
    except (OSError, ValueError, AttributeError):
        return None


# Writing.


class _File(NamedTuple):
    """One file of a split: which, from which example to which."""

    split: str
    number: int
    start: int
    stop: int


def _build(request: Synthetic, data_dir: Path, on_progress: Callable[[int], None]) -> None:
    import tensorflow_datasets as tfds
    from etils import epath

    # TFDS's own kind of path.
    folder = epath.Path(data_dir) / request.dataset_name / VERSION
    folder.mkdir(parents=True)
    drawing = Drawing(request)
    lock = threading.Lock()

    def report(count: int) -> None:
        with lock:
            on_progress(count)

    template: Any = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=request.dataset_name,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    splits = []
    with concurrent.futures.ThreadPoolExecutor(num_cpus()) as pool:
        for split, size in (("train", request.num_examples), ("test", request.num_test)):
            files = list(_files(request, split, size))
            named = template.replace(split=split)
            paths = [
                named.sharded_filepath(shard_index=file.number, num_shards=len(files))
                for file in files
            ]
            try:
                written = [
                    pool.submit(_write, drawing, file, path, report)
                    for file, path in zip(files, paths, strict=True)
                ]
                num_bytes = sum(future.result() for future in written)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            splits.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[file.stop - file.start for file in files],
                    num_bytes=num_bytes,
                    filename_template=named,
                )
            )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(request),
        split_infos=splits,
        version=VERSION,
        filename_template=template,
        check_data=False,  # That would take TensorFlow.
        description=request.description,
        supervised_keys=("image", "label"),
    )


def _features(request: Synthetic) -> dict[str, Any]:
    from tensorflow_datasets import features

    image: Any = features.Image(shape=request.shape, encoding_format="png")
    if request.encoding == "raw":
        image = features.Tensor(shape=request.shape, dtype=np.uint8, encoding="bytes")
    found = {"image": image, "label": features.ClassLabel(num_classes=request.num_classes)}
    if request.num_users is not None:
        found["user"] = features.Scalar(dtype=np.int64)
    return found


def _files(request: Synthetic, split: str, size: int) -> Iterator[_File]:
    step = max(1, _FILE_BYTES // int(np.prod(request.shape)))
    for number, start in enumerate(range(0, size, step)):
        yield _File(split, number, start, min(start + step, size))


def _write(drawing: Drawing, file: _File, path: Path, on_progress: Callable[[int], None]) -> int:
    """Writes one file; gives the bytes of its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    request = drawing.request
    # Files are drawn independently, so it does not matter which thread is first.
    rng = np.random.default_rng([request.seed, file.split == "test", file.number])
    step = max(1, _BATCH_BYTES // int(np.prod(request.shape)))
    written = 0
    # Noise cannot be compressed; records in groups of one can be read one by one.
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    try:
        for start in range(file.start, file.stop, step):
            stop = min(start + step, file.stop)
            batch = drawing.draw(file.split, start, stop, rng)
            for image, label, owner in zip(*batch, strict=True):
                record = _record(request, image, label, owner)
                writer.write(record)
                written += len(record)
            on_progress(stop - start)
    finally:
        writer.close()
    return written


def _record(request: Synthetic, image: np.ndarray, label: int, owner: int | None) -> bytes:
    """A serialised ``tf.train.Example``, as TFDS would write it for `_features`."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    example: Any = tf_example_pb2
    proto: Any = tf_feature_pb2
    stored = image.tobytes() if request.encoding == "raw" else _png(image)
    features = {
        "image": proto.Feature(bytes_list=proto.BytesList(value=[stored])),
        "label": proto.Feature(int64_list=proto.Int64List(value=[label])),
    }
    if owner is not None:
        features["user"] = proto.Feature(int64_list=proto.Int64List(value=[owner]))
    # Otherwise the order of the features would differ from process to process.
    return example.Example(features=proto.Features(feature=features)).SerializeToString(
        deterministic=True
    )


def _png(image: np.ndarray) -> bytes:
    import PIL.Image

    file = io.BytesIO()
    pixels = image[..., 0] if image.shape[-1] == 1 else image
    # Little effort: the noise in it can hardly be compressed.
    PIL.Image.fromarray(pixels).save(file, format="png", compress_level=1)
    return file.getvalue()
