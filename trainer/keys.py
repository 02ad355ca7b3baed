"""Secret randomness: where noise and sampling come from.

A branch is one uninterrupted attempt at a trial. It draws 256 bits from the operating system
when it begins and derives from them, by keyed BLAKE2b, one independent key per purpose and
step. Nothing is ever stored: the root lives in this object alone, so noise cannot be repeated
by a restart, a fork or a second trial, and whoever holds a checkpoint, a log or the
configuration learns nothing about it. A user's ``seed`` never comes here.
"""

import hashlib
import secrets
from typing import NoReturn

import numpy as np

_ROOT_BYTES = 32


class BranchKeys:
    """The keys of one branch. It can be neither printed nor pickled.

    Args:
        root: 32 secret bytes. None, the only choice outside tests, takes them from the
            operating system.

    Raises:
        ValueError: If ``root`` is not 32 bytes.
    """

    __slots__ = ("_root",)

    def __init__(self, root: bytes | None = None) -> None:
        root = secrets.token_bytes(_ROOT_BYTES) if root is None else root
        if len(root) != _ROOT_BYTES:
            raise ValueError(f"root has {len(root)} bytes: allowed is {_ROOT_BYTES}")
        self._root = root

    def noise_key(self, step: int) -> np.ndarray:
        """The threefry key of one step's noise, uint32 ``[2]``."""
        return np.frombuffer(self._derive(b"noise", step)[:8], dtype=np.uint32)

    def sampling_rng(self, step: int) -> np.random.Generator:
        """The generator that draws one step's batch."""
        key = int.from_bytes(self._derive(b"sampling", step)[:16], "little")
        return np.random.Generator(np.random.Philox(key=key))

    def _derive(self, purpose: bytes, step: int) -> bytes:
        data = step.to_bytes(8, "little")
        return hashlib.blake2b(data, key=self._root, person=purpose, digest_size=32).digest()

    def __repr__(self) -> str:
        return "BranchKeys(<secret>)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("BranchKeys cannot be pickled: noise keys never leave their process")
