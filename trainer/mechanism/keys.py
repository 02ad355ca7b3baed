"""Secret randomness: where noise and sampling come from, and where its root is kept.

A branch is one lineage of random numbers of a trial. When it begins it draws 256 bits from the
operating system, its root, and derives from them, by keyed BLAKE2b, one independent key per
purpose and step. So noise cannot be repeated by a fork or a second trial, and whoever holds a
checkpoint, a log or the configuration learns nothing about it. A user's ``seed`` never comes here.

A trial that is to survive its process keeps the root in a file of its own below ``secrets/``
(0600), never in a checkpoint. A process that goes on from a checkpoint and finds the root takes
the very same steps again, which costs nothing; one that does not, begins another branch.
"""

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

from trainer.durability import write_durably
from trainer.errors import SecretError
from trainer.mechanism.branch import BRANCH_ID

_ROOT_BYTES = 32


class BranchKeys:
    """The keys of one branch. It can be neither printed nor pickled.

    Args:
        root: 32 secret bytes. None, the only choice outside tests and `load`, takes them from
            the operating system.

    Raises:
        ValueError: If ``root`` is not 32 bytes.
    """

    __slots__ = ("_root",)

    def __init__(self, root: bytes | None = None) -> None:
        root = secrets.token_bytes(_ROOT_BYTES) if root is None else root
        if len(root) != _ROOT_BYTES:
            raise ValueError(f"root has {len(root)} bytes: allowed is {_ROOT_BYTES}")
        self._root = root

    @property
    def branch_id(self) -> str:
        """Names the branch in public: 16 hexadecimal digits, from which no key follows."""
        return self._derive(b"branch", 0)[:8].hex()

    def noise_keys(self, steps: Iterable[int]) -> np.ndarray:
        """The threefry keys of the noise of some steps, uint32 ``[steps, 2]``."""
        return self._threefry(b"noise", steps)

    def draw_keys(self, steps: Iterable[int]) -> np.ndarray:
        """The threefry keys that draw the batches of steps on a device, uint32 ``[steps, 2]``."""
        return self._threefry(b"draw", steps)

    def view_keys(self, steps: Iterable[int]) -> np.ndarray:
        """The threefry keys of the views of examples in some steps, uint32 ``[steps, 2]``."""
        return self._threefry(b"view", steps)

    def sampling_rng(self, step: int) -> np.random.Generator:
        """The generator that draws one step's batch on the host."""
        return self._philox(b"sampling", step)

    def groups_rng(self) -> np.random.Generator:
        """The generator that divides the units into groups, once for the branch."""
        return self._philox(b"groups", 0)

    def evaluation_rng(self, step: int) -> np.random.Generator:
        """The generator of the noise on counts of the evaluation after a step."""
        return self._philox(b"evaluation", step)

    def save(self, secrets_dir: Path) -> None:
        """Keeps the root in a file of its own that only its owner can read.

        Raises:
            SecretError: It cannot be written.
        """
        path = _path(secrets_dir, self.branch_id)
        try:
            secrets_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_durably(path, self._root, mode=0o600)
        except OSError as error:
            raise SecretError(f"{secrets_dir}: no key can be kept there: {error}") from error

    @classmethod
    def load(cls, secrets_dir: Path, branch_id: str) -> "BranchKeys | None":
        """The keys of a branch, or None if its root is not kept there.

        Raises:
            SecretError: What is kept there is not the root of this branch.
        """
        try:
            root = _path(secrets_dir, branch_id).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SecretError(f"{secrets_dir}: a key cannot be read: {error}") from error
        keys = cls(root) if len(root) == _ROOT_BYTES else None
        if keys is None or keys.branch_id != branch_id:
            raise SecretError(f"{secrets_dir}: the key of branch {branch_id} is damaged")
        return keys

    @classmethod
    def agreed(
        cls, keys: "BranchKeys | None", from_first: Callable[[np.ndarray], np.ndarray]
    ) -> "BranchKeys":
        """The keys of the first of several processes, in all of them.

        Args:
            keys: Given in the first process.
            from_first: Gives every process what the first one passes. It carries the root, so
                it must reach the trial's own processes alone, as sums without noise do.
        """
        root = np.zeros(_ROOT_BYTES, np.uint8)
        if keys is not None:
            root = np.frombuffer(keys._root, np.uint8)
        return cls(np.asarray(from_first(root), np.uint8).tobytes())

    def _threefry(self, purpose: bytes, steps: Iterable[int]) -> np.ndarray:
        keys = b"".join(self._derive(purpose, step)[:8] for step in steps)
        return np.frombuffer(keys, dtype=np.uint32).reshape(-1, 2)

    def _philox(self, purpose: bytes, step: int) -> np.random.Generator:
        key = int.from_bytes(self._derive(purpose, step)[:16], "little")
        return np.random.Generator(np.random.Philox(key=key))

    def _derive(self, purpose: bytes, step: int) -> bytes:
        data = step.to_bytes(8, "little")
        return hashlib.blake2b(data, key=self._root, person=purpose, digest_size=32).digest()

    def __repr__(self) -> str:
        return "BranchKeys(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("BranchKeys cannot be pickled: noise keys never leave their process")


def forget_root(secrets_dir: Path, branch_id: str) -> None:
    """Removes the file of a branch's root, if there is one: the branch cannot be gone on with."""
    with contextlib.suppress(OSError):
        _path(secrets_dir, branch_id).unlink(missing_ok=True)


def _path(secrets_dir: Path, branch_id: str) -> Path:
    # The id may come from a checkpoint that somebody else wrote, and becomes part of a path.
    if not BRANCH_ID.fullmatch(branch_id):
        raise SecretError(f"branch {branch_id!r}: allowed are 16 hexadecimal digits")
    return secrets_dir / f"{branch_id}.key"
