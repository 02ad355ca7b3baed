"""Writes the built-in data set into a data directory, once (`trainer.data.prepared`)."""

import contextlib
import io
from pathlib import Path

from trainer.data.prepared import place

NAME = "digits"
VERSION = "1.0.0"


def prepare(data_dir: Path) -> Path:
    """Prepares ``digits`` under ``data_dir`` unless it is there.

    Args:
        data_dir: TFDS data directory. It is created if need be.

    Returns:
        The folder of the prepared version, ``data_dir/digits/1.0.0``.

    Raises:
        OSError: The directory cannot be written, or the target exists and is incomplete.
    """
    return place(data_dir, NAME, VERSION, _build)


def _build(data_dir: str) -> None:
    # Imported here because a machine on which the data set is prepared needs none of it.
    import tensorflow_datasets as tfds

    from trainer.data.digits.builder import Digits

    # TFDS draws progress bars on stderr and prints to stdout; neither belongs to a trial.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Digits(data_dir=data_dir, file_format="array_record").download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
