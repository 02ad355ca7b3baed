"""Whether two processes would run the very same program.

Noise that is used twice is harmless only where everything else is the same to the last bit. So a
trial's lineage of keys is gone on with under the same code, compiler, devices and way of computing
alone; these facts are hashed into its checkpoints.
"""

import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import secrets
from pathlib import Path

import flax.linen as nn
import jax

from trainer.training.devices import Topology
from trainer.training.step import Recipe


def program_digest(recipe: Recipe, topology: Topology, more: object) -> str:
    """SHA-256 over what decides the bits of a step.

    Args:
        recipe: With its engine settled.
        topology: The devices.
        more: Further facts; their `repr` counts.
    """
    device = jax.devices()[0]
    facts = [
        _sources(),
        repr(recipe),
        repr(more),
        _source_of(type(recipe.objective.network.model)),
        topology.size,
        jax.process_count(),
        device.platform,
        device.device_kind,
        os.cpu_count() if device.platform == "cpu" else None,
        os.environ.get("XLA_FLAGS", ""),
        _versions(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@functools.cache
def _versions() -> list[str]:
    """Of the packages whose code a step runs."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "jax-privacy")
    return [importlib.metadata.version(name) for name in names]


@functools.cache
def _source_of(model: type[nn.Module]) -> str:
    """SHA-256 of the module that a model comes from; a user's is in none of ours."""
    try:
        path = inspect.getsourcefile(model)
        return hashlib.sha256(Path(path or "").read_bytes()).hexdigest()
    except (TypeError, OSError):
        return secrets.token_hex()  # without its source it is the same as no other


@functools.cache
def _sources() -> str:
    """SHA-256 over this package's modules."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()
