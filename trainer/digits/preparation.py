"""Writes the built-in data set into a data directory, once, whoever else is writing it.

Each preparation builds a complete copy in a scratch folder beside the target and renames it
into place, which a file system does as one step. Of several processes, on one machine or on a
shared disk, the first rename wins and the others drop their copy: there is no lock that a
killed process could leave behind, and no reader ever sees half a data set.
"""

import contextlib
import io
import os
import tempfile
from pathlib import Path

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
    target = data_dir / NAME / VERSION
    if is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=data_dir) as scratch:
        _build(scratch)
        try:
            os.rename(Path(scratch, NAME, VERSION), target)
        except OSError:
            if not is_complete(target):
                raise
    return target


def is_complete(version_dir: Path) -> bool:
    """Whether a folder holds a TFDS data set whose preparation came to its end.

    Args:
        version_dir: ``data_dir/name[/config]/version`` of any data set.
    """
    # TFDS writes these two last.
    return all((version_dir / name).is_file() for name in ("dataset_info.json", "features.json"))


def _build(data_dir: str) -> None:
    # Imported here because a machine on which the data set is prepared needs none of it.
    import tensorflow_datasets as tfds

    from trainer.digits.builder import Digits

    # TFDS draws progress bars on stderr and prints to stdout; neither belongs to a trial.
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        Digits(data_dir=data_dir, file_format="array_record").download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
