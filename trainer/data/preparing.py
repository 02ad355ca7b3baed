"""Prepares a data set that TFDS knows, in the format that is read here.

Unlike reading, TFDS's builders download, and many of them need TensorFlow. Where either is
missing, the error says how to prepare the data set on another machine.
"""

import contextlib
import io
from pathlib import Path
from typing import Any

from trainer.config import DataConfig
from trainer.data.dataset_location import FILE_FORMAT, Location, find
from trainer.data.datasets import quiet
from trainer.errors import DatasetError


class PreparationError(DatasetError):
    """A data set could not be prepared, though the request for it was well-formed."""


def prepare_with_tfds(config: DataConfig, data_dir: Path) -> Location:
    """Runs a data set's TFDS builder unless the data set is there.

    Args:
        config: Its ``name`` is prepared.
        data_dir: TFDS data directory. It is created if need be.

    Returns:
        Where it lies.

    Raises:
        PreparationError: TensorFlow or the network is missing, or the builder failed.
        DatasetError: TFDS knows no such data set.
    """
    with contextlib.suppress(DatasetError):
        return find(config, search_dirs=[data_dir])
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    tfds.disable_progress_bar()
    # TFDS prints to standard output, which is the caller's.
    with quiet("urllib3"), contextlib.redirect_stdout(io.StringIO()):
        try:
            builder: Any = tfds.builder(
                config.name, data_dir=str(data_dir), file_format=FILE_FORMAT
            )
        except DatasetNotFoundError as error:
            raise DatasetError(
                f"data set {config.name!r}: TFDS knows none of that name; allowed is digits, "
                "synthetic or a name of TFDS's catalog"
            ) from error
        except Exception as error:
            raise _failure(config.name, data_dir, error) from error
        try:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        except Exception as error:
            raise _failure(config.name, data_dir, error) from error
    return find(config, search_dirs=[data_dir])


def _failure(name: str, data_dir: Path, error: Exception) -> PreparationError:
    """What stopped a builder, and what to do."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(isinstance(each, ImportError) for each in chain):
        missing = next(each for each in chain if isinstance(each, ImportError))
        what = f"its builder needs a package that is not installed ({_first_line(missing)})"
    elif any(isinstance(each, ConnectionError | TimeoutError) for each in chain) or any(
        type(each).__module__.split(".")[0] in ("requests", "urllib3") for each in chain
    ):
        what = "its source cannot be reached over the network"
    else:
        what = f"its builder failed ({type(error).__name__}: {_first_line(error)})"
    base = name.partition("/")[0].partition(":")[0]
    return PreparationError(
        f"data set {name!r} cannot be prepared here: {what}. On a machine with TensorFlow and the "
        f"network, `tfds build {name} --file_format={FILE_FORMAT} --data_dir DIR` prepares it; "
        f"then copy DIR/{base} to {data_dir / base}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
