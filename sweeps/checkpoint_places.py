"""Where checkpoints are kept: below the home, or in an object store with copies below the home.

The trainer writes a checkpoint into a folder of the attempt and keeps the newest two there. As
soon as one is whole it is taken over from that folder (`CheckpointPlaces.put`), so that from then
on the rows alone say how long it is kept. With ``DP_SWEEPS_CHECKPOINTS_URL`` it is uploaded, too,
file by file with the manifest last: half an upload has no manifest and is no checkpoint. Its
*location* goes into the database: a path, or the URL.

Whoever goes on from a location gets a folder of this machine. What is not at hand there, or is
damaged, is downloaded, and only taken for a checkpoint if every file is what its manifest says.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# fsspec ships no annotations.

import json
import logging
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from sweeps.errors import PlaceError
from sweeps.home import CHECKPOINTS_VARIABLE, Home
from trainer.durability import sync
from trainer.errors import CheckpointError
from trainer.weights.checkpoints import read_manifest

_LOG = logging.getLogger(__name__)
_MANIFEST = "checkpoint.json"
# A sweep's id, a trial's, a checkpoint's name: nothing that leads out of a folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,199}")


class CheckpointPlaces:
    """Puts checkpoints where they are kept, and gets them from there.

    Args:
        home: Says where.
    """

    def __init__(self, home: Home) -> None:
        self._home = home

    def check(self) -> None:
        """Checks that the place can be spoken to from here; nothing is sent.

        Raises:
            PlaceError: If fsspec does not know it, or lacks the package for it.
        """
        if self._home.checkpoints_url:
            with _translated(self._home.checkpoints_url):
                _file_system(self._home.checkpoints_url)

    def put(self, written: Path, sweep_id: str, trial_id: str, attempt: int) -> str:
        """Takes a whole checkpoint over; afterwards it is durable where it is kept.

        Args:
            written: Its folder, on the same disk as the home's checkpoints.
            sweep_id: The sweep.
            trial_id: The trial.
            attempt: The attempt that wrote it, so that none writes over another's.

        Returns:
            Its location.

        Raises:
            PlaceError: If it cannot be kept; nothing of it is left then.
        """
        name = f"{written.name}-attempt-{attempt:04d}"
        local = self._local(sweep_id, trial_id, name)
        if not self._home.checkpoints_url:
            with _translated(str(local)):
                _take_over(written, local)
            return str(local)
        location = f"{self._home.checkpoints_url}/{sweep_id}/{trial_id}/{name}"
        try:
            with _translated(location):
                _take_over(written, local)
                _upload(local, location)
        except PlaceError:
            self.remove(location)
            raise
        return location

    def get(self, location: str) -> Path:
        """Where a checkpoint lies on this machine, once it has been fetched if need be.

        Returns:
            Its folder; there is none, or a damaged one, if that is all that there is anywhere.

        Raises:
            PlaceError: If where it is kept cannot be reached, so that nobody knows.
        """
        if "://" not in location:
            return Path(location)
        local = self._local(*_names(location))
        try:
            read_manifest(local)
        except CheckpointError:
            with _translated(location):
                _download(location, local)
        return local

    def remove(self, location: str) -> None:
        """Removes a checkpoint and its copy on this machine; what cannot be removed stays."""
        if "://" not in location:
            if _is_below(Path(location), self._home.path / "sweeps"):
                shutil.rmtree(location, ignore_errors=True)
            else:
                _LOG.warning("checkpoint %r: not below %s, left", location, self._home.path)
            return
        try:
            shutil.rmtree(self._local(*_names(location)), ignore_errors=True)
            with _translated(location):
                _remove_remote(location)
        except PlaceError as error:
            _LOG.warning("%s", error)

    def _local(self, sweep_id: str, trial_id: str, name: str) -> Path:
        for part in (sweep_id, trial_id, name):
            if not _NAME.fullmatch(part):
                raise PlaceError(f"checkpoint of {part!r}: allowed are letters, digits, _ and -")
        return self._home.checkpoint_dir(sweep_id, trial_id) / name


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    from fsspec.core import url_to_fs  # only where one is used

    fs, path = url_to_fs(url)
    return fs, str(path)


@contextmanager
def _translated(where: str) -> Generator[None]:
    """Says of whatever a disk, a network or a store may raise where it was, and what may be."""
    try:
        yield
    except PlaceError:
        raise
    except Exception as error:  # each file system has its own
        reason = f"{type(error).__name__}: {error}"[:300]
        raise PlaceError(
            f"checkpoint {where!r}: cannot be kept or fetched there: {reason}; allowed in "
            f"{CHECKPOINTS_VARIABLE} is a place that can be reached and has room, or nothing for "
            "the home's own disk"
        ) from error


def _names(location: str) -> tuple[str, str, str]:
    """Sweep, trial and name in a location."""
    parts = location.split("/")
    if len(parts) < 5:  # scheme, nothing, and these
        raise PlaceError(f"checkpoint {location!r}: allowed is URL/SWEEP/TRIAL/NAME")
    sweep_id, trial_id, name = parts[-3:]
    return sweep_id, trial_id, name


def _is_below(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and ".." not in path.relative_to(folder).parts


def _take_over(written: Path, local: Path) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    written.rename(local)
    sync(local.parent)


def _upload(local: Path, location: str) -> None:
    fs, path = _file_system(location)
    files = [file for file in sorted(local.rglob("*")) if file.is_file()]
    manifest = local / _MANIFEST
    for file in [*(file for file in files if file != manifest), manifest]:
        target = PurePosixPath(path, file.relative_to(local).as_posix())
        fs.makedirs(str(target.parent), exist_ok=True)
        fs.put_file(str(file), str(target))


def _remove_remote(location: str) -> None:
    fs, path = _file_system(location)
    with suppress(FileNotFoundError):
        fs.rm_file(f"{path}/{_MANIFEST}")  # without which what is left is no checkpoint
    with suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def _download(location: str, local: Path) -> None:
    """Fetches a checkpoint if there is a whole one; else leaves what is here as it is."""
    fs, path = _file_system(location)
    partial = local.with_name(f".{local.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        fs.get_file(f"{path}/{_MANIFEST}", str(partial / _MANIFEST))
        for name in _files_of(partial / _MANIFEST):
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(f"{path}/{name}", str(partial / name))
        read_manifest(partial)
    except (FileNotFoundError, CheckpointError) as error:
        _LOG.warning("checkpoint %r: is gone or damaged: %s", location, error)
    else:
        shutil.rmtree(local, ignore_errors=True)
        with suppress(OSError):  # another worker has just fetched it, too
            partial.rename(local)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files_of(manifest: Path) -> list[str]:
    """The files that a manifest names, none of which may be anywhere but beside it.

    Raises:
        CheckpointError: If it is none, or one may.
    """
    try:
        names = [str(name) for name in json.loads(manifest.read_text(encoding="utf-8"))["files"]]
    except (ValueError, TypeError, KeyError):
        raise CheckpointError(f"its {_MANIFEST} is damaged") from None
    for name in names:
        if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(f"its {_MANIFEST} names {name!r}, which is not beside it")
    return names
