"""Where prepared data sets lie: found by looking at folders, with nothing imported or downloaded.

Only the built-in ``digits`` may be written, by `find_or_prepare`.
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path

from trainer.config import DATASET_NAME_PATTERN, DataConfig
from trainer.data.digits import preparation
from trainer.data.prepared import is_complete
from trainer.errors import DatasetError

# The format that is read.
FILE_FORMAT = "array_record"
WHERE_TFDS_RUNS = "a command that needs TensorFlow, as reading does not"
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Location:
    """Where a prepared data set lies.

    Attributes:
        data_dir: The TFDS data directory in which it was found.
        name: ``name[/config]``.
        version: Its version.
    """

    data_dir: Path
    name: str
    version: str

    @property
    def path(self) -> Path:
        """Folder of the version."""
        return self.data_dir / self.name / self.version


def find_or_prepare(config: DataConfig, home_data_dir: Path) -> Location:
    """Finds a prepared data set by name, and prepares ``digits`` where it is absent.

    Args:
        config: Which data set, and where if that is given.
        home_data_dir: As in `search_dirs`; ``digits`` is prepared in the first directory.

    Returns:
        The first match.

    Raises:
        DatasetError: No directory holds it, or ``digits`` cannot be prepared.
    """
    places = search_dirs(config, home_data_dir)
    try:
        return find(config, search_dirs=places)
    except DatasetError:
        if not _is_built_in(config):
            raise
    try:
        preparation.prepare(places[0])
    except OSError as error:
        raise DatasetError(
            f"data set {config.name!r} cannot be prepared in {places[0]}: {error}. Remove what is "
            "in the way, or name a directory that can be written as data_dir"
        ) from error
    return find(config, search_dirs=places)


@contextlib.contextmanager
def found_or_scratch(config: DataConfig, home_data_dir: Path) -> Generator[DataConfig]:
    """The configuration of a data set that can be opened without writing to its directory.

    Args:
        config: Which data set, and where if that is given.
        home_data_dir: As in `search_dirs`.

    Yields:
        ``config`` where the data set is prepared. Where it is the built-in one and is not, the
        same with a copy in a temporary folder, which goes with the block.

    Raises:
        DatasetError: No directory holds it.
    """
    try:
        find(config, search_dirs=search_dirs(config, home_data_dir))
    except DatasetError:
        if not _is_built_in(config):
            raise
        with tempfile.TemporaryDirectory(prefix="dp-sweeps-") as scratch:
            preparation.prepare(Path(scratch))
            yield dataclasses.replace(config, data_dir=scratch)
    else:
        yield config


def _is_built_in(config: DataConfig) -> bool:
    return config.name in (preparation.NAME, f"{preparation.NAME}:{preparation.VERSION}")


def search_dirs(config: DataConfig, home_data_dir: Path) -> tuple[Path, ...]:
    """The data directories in which a data set is looked for, first one first.

    Args:
        config: Its ``data_dir``, where given, is the only place.
        home_data_dir: Otherwise the first place; the second is TFDS's own, ``$TFDS_DATA_DIR``
            or ``~/tensorflow_datasets``.

    Returns:
        At least one directory. They need not exist.

    Raises:
        DatasetError: ``config.data_dir`` is a URL. Data sets are read from file systems alone.
    """
    if config.data_dir is not None:
        if "://" in config.data_dir:
            raise DatasetError(
                f"data set {config.name!r}: data_dir={config.data_dir!r} is a URL; allowed is a "
                "directory. Copy or mount the data set there"
            )
        return (Path(config.data_dir).expanduser(),)
    tfds_default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return (home_data_dir, Path(tfds_default).expanduser())


def find(config: DataConfig, *, search_dirs: Sequence[Path]) -> Location:
    """Finds a prepared data set by name. Reads folder names only and writes nothing.

    A name without a version means the highest version in the first directory that has one; a
    name without a config means the data set's default config.

    Args:
        config: Its ``name`` is looked for.
        search_dirs: TFDS data directories, at least one, in order of preference.

    Returns:
        The first match.

    Raises:
        DatasetError: No directory holds it.
    """
    name, config_name, version = _parse(config.name)
    seen: list[str] = []
    for data_dir in search_dirs:
        folder = name if config_name is None else f"{name}/{config_name}"
        versions = _versions(data_dir / folder)
        if not versions and config_name is None:
            default = _default_config(data_dir / name)
            if default is not None:
                folder = f"{name}/{default}"
                versions = _versions(data_dir / folder)
        if versions and version in (None, *versions):
            return Location(data_dir=data_dir, name=folder, version=version or versions[-1])
        seen += [f"{folder}:{found}" for found in versions]
        if not versions:
            seen += [f"{name}/{child}" for child in _children(data_dir / name)]
    raise DatasetError(_not_found(config.name, search_dirs, seen))


def locations(data_dir: Path) -> list[Location]:
    """Every completely prepared version in a data directory, by name, config and version.

    Raises:
        DatasetError: A folder cannot be read.
    """
    found: list[Location] = []
    for name in _children(data_dir):
        if not re.fullmatch(DATASET_NAME_PATTERN, name):
            continue  # Such as TFDS's own folder of downloads.
        for folder in (name, *(f"{name}/{child}" for child in _children(data_dir / name))):
            found += [
                Location(data_dir=data_dir, name=folder, version=version)
                for version in _versions(data_dir / folder)
                if re.fullmatch(DATASET_NAME_PATTERN, f"{folder}:{version}")
            ]
    return found


def _parse(full_name: str) -> tuple[str, str | None, str | None]:
    # The name becomes part of a path, so it is checked here too, whoever made the config.
    match = re.fullmatch(DATASET_NAME_PATTERN, full_name)
    if match is None:
        raise DatasetError(f"data set {full_name!r}: not a TFDS name, name[/config][:version]")
    name, _, version = full_name.partition(":")
    name, _, config_name = name.partition("/")
    return name, config_name or None, version or None


def _children(folder: Path) -> list[str]:
    """Names of the visible sub-folders, sorted; none where the folder is absent."""
    try:
        return sorted(
            entry.name
            for entry in os.scandir(folder)
            if not entry.name.startswith((".", "incomplete.")) and entry.is_dir()
        )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DatasetError(f"data directory {folder} cannot be read: {error.strerror}") from error


def _versions(folder: Path) -> list[str]:
    """Completely prepared versions in a folder, lowest first."""
    found = [
        child
        for child in _children(folder)
        if _VERSION.fullmatch(child) and is_complete(folder / child)
    ]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _default_config(folder: Path) -> str | None:
    """Name of the default config as TFDS noted it, or None."""
    try:
        noted = json.loads((folder / ".config" / "metadata.json").read_text())
    except (OSError, ValueError):
        return None
    name = noted.get("default_config_name") if isinstance(noted, dict) else None
    # It becomes part of a path.
    return name if isinstance(name, str) and name in _children(folder) else None


def _not_found(full_name: str, search_dirs: Sequence[Path], seen: Sequence[str]) -> str:
    places = ", ".join(str(data_dir) for data_dir in search_dirs)
    if _parse(full_name)[0] == preparation.NAME:
        hint = (
            f"The built-in data set is '{preparation.NAME}:{preparation.VERSION}', which "
            f"`dp-sweeps data prepare {preparation.NAME}` writes"
        )
    else:
        hint = (
            f"Prepare it with `tfds build {full_name} --file_format={FILE_FORMAT} "
            f"--data_dir {search_dirs[0]}`, {WHERE_TFDS_RUNS}"
        )
    found = f" (found there: {', '.join(seen)})" if seen else ""
    return f"data set {full_name!r} is not prepared in {places}{found}. {hint}"
