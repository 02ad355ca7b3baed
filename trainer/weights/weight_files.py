"""Files of weights, read without running anything that is in them.

Four kinds: a checkpoint of this package (`trainer.weights.checkpoints`), an Orbax checkpoint of
any pytree, NumPy's ``.npz`` and ``.safetensors``. Nothing is unpickled: an array of Python objects
makes its whole file unreadable.

`check_readable` looks at headers alone and needs no JAX; `read_arrays` reads everything.
"""

import contextlib
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import safetensors

from trainer.errors import CheckpointError

Kind = Literal["checkpoint", "orbax", "npz", "safetensors"]

_OWN_MANIFEST = "checkpoint.json"
_ORBAX_METADATA = "_METADATA"
_KINDS_OF_FILES: dict[str, Kind] = {".npz": "npz", ".safetensors": "safetensors"}
_WORDS: dict[Kind, str] = {
    "checkpoint": "checkpoint",
    "orbax": "Orbax checkpoint",
    "npz": ".npz file",
    "safetensors": ".safetensors file",
}
_NPY_HEADERS: dict[tuple[int, int], Callable[..., Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def kind_of(path: Path) -> Kind:
    """What kind of weights lie at a path, from names alone.

    Raises:
        CheckpointError: If nothing is there, or nothing that this package reads, or a part of a
            checkpoint of this package: by itself that would not tell what it was trained on.
    """
    where = f"weights {str(path)!r}"
    if path.is_file():
        if path.suffix in _KINDS_OF_FILES:
            return _KINDS_OF_FILES[path.suffix]
        allowed = " or ".join(_KINDS_OF_FILES)
        raise CheckpointError(f"{where}: not a file of weights; allowed is one in {allowed}")
    if not path.is_dir():
        raise CheckpointError(f"{where}: no such directory or file")
    if (path / _OWN_MANIFEST).exists():
        return "checkpoint"
    parent = path.resolve().parent
    if (parent / _OWN_MANIFEST).exists():
        raise CheckpointError(f"{where}: a part of a checkpoint; allowed is {str(parent)!r}")
    if (path / _ORBAX_METADATA).is_file():
        return "orbax"
    raise CheckpointError(
        f"{where}: not a checkpoint, it holds neither {_OWN_MANIFEST} nor Orbax's "
        f"{_ORBAX_METADATA}; allowed is a directory that holds one of them itself"
    )


def check_readable(path: Path, kind: Kind) -> None:
    """Reads the headers of weights other than a checkpoint of this package.

    Raises:
        CheckpointError: If they are damaged, cut off, or of Python objects.
    """
    with _refused_if_damaged(path, kind):
        match kind:
            case "npz":
                list(_members(path, _read_npy_header))
            case "safetensors":
                # The header says where each tensor ends, which is compared with the file's size.
                with safetensors.safe_open(path, framework="np"):
                    pass
            case _:
                json.loads((path / _ORBAX_METADATA).read_text(encoding="utf-8"))["tree_metadata"]


def read_arrays(path: Path, kind: Kind) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of some weights, with its name.

    Yields:
        Names as they stand in a file; the keys of a pytree joined by ``/``.

    Raises:
        CheckpointError: If they are damaged, cut off, or of Python objects.
    """
    with _refused_if_damaged(path, kind):
        match kind:
            case "npz":
                yield from _members(
                    path, lambda f: np.lib.format.read_array(f, allow_pickle=False)
                )
            case "safetensors":
                with safetensors.safe_open(path, framework="np") as file:
                    for name in file.keys():  # noqa: SIM118  # it is no mapping
                        yield name, file.get_tensor(name)
            case _:
                yield from _orbax_arrays(path / "params" if kind == "checkpoint" else path)


@contextlib.contextmanager
def _refused_if_damaged(path: Path, kind: Kind) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    # Whatever a reader raises over bytes that it did not write.
    except Exception as error:
        raise CheckpointError(
            f"weights {str(path)!r}: not a whole {_WORDS[kind]}: {error}"
        ) from error


def _members(path: Path, read: Callable[[IO[bytes]], Any]) -> Iterator[tuple[str, Any]]:
    """The members of an ``.npz``: a zip archive of ``.npy`` files."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                try:
                    yield member.filename.removesuffix(".npy"), read(file)
                except ValueError as error:
                    raise ValueError(f"{member.filename}: {error}") from error


def _read_npy_header(file: IO[bytes]) -> None:
    version = np.lib.format.read_magic(file)
    if version not in _NPY_HEADERS:
        raise ValueError(f"its format has version {version}")
    _, _, dtype = _NPY_HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("holds Python objects, which would have to be unpickled")


def _orbax_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of an Orbax checkpoint, whose structure is taken from itself."""
    import jax
    import orbax.checkpoint as ocp

    def as_numpy(leaf: Any) -> ocp.RestoreArgs:
        # Without a type, an array would be put on the devices on which it was saved.
        return ocp.RestoreArgs(restore_type=np.ndarray if hasattr(leaf, "shape") else None)

    with ocp.PyTreeCheckpointer() as checkpointer:
        structure: Any = checkpointer.metadata(path.resolve()).item_metadata.tree
        restore_args = jax.tree.map(as_numpy, structure)
        tree = checkpointer.restore(path.resolve(), restore_args=restore_args)
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, np.ndarray):
            yield jax.tree_util.keystr(keys, simple=True, separator="/"), leaf
