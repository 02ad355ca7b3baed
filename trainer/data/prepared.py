"""Puts a prepared data set in its place, whole or not at all, whoever else is writing it.

Each preparation builds a complete copy in a scratch folder beside the target and renames it
into place, which a file system does as one step. Of several processes, on one machine or on a
shared disk, the first rename wins and the others drop their copy: there is no lock that a
killed process could leave behind, and no reader ever sees half a data set.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def place(data_dir: Path, name: str, version: str, build: Callable[[str], None]) -> Path:
    """Prepares ``name`` under ``data_dir`` unless it is there.

    Args:
        data_dir: TFDS data directory. It is created if need be.
        name: TFDS name without a config; it becomes part of a path.
        version: Version, as ``1.0.0``.
        build: Writes the data set below another data directory, whose path it is given.

    Returns:
        The folder of the prepared version, ``data_dir/name/version``.

    Raises:
        OSError: The directory cannot be written, or the target exists and is incomplete.
    """
    target = data_dir / name / version
    if is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as scratch:
        build(scratch)
        try:
            os.rename(Path(scratch, name, version), target)
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
