"""On the disk before anybody relies on it: files that a loss of power leaves whole or absent.

A file's contents and its name are two things: the first needs a sync of the file, the second one
of its directory.
"""

import os
from pathlib import Path


def write_durably(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replaces a file: afterwards all of it is there, or, if this fails, what was before.

    Args:
        path: The file.
        content: What it holds then; text as UTF-8.
        mode: Who may read and write it, less the process's umask.
    """
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def sync_tree(path: Path) -> None:
    """Makes everything below a directory durable, but not the directory's own name."""
    for below in path.rglob("*"):
        sync(below)
    sync(path)


def sync(path: Path) -> None:
    """Makes a file's contents durable, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
