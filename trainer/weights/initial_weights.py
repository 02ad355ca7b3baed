"""Weights from files to start a trial with.

Arrays find their parameters by name: the path in the model's tree, parts separated by ``/`` or
``.``, with or without ``params/`` or ``model/params/`` in front. All parameters but the head's
must be there and have the right shape; nothing is interpolated, cut or padded. The head comes
from the file where all of it fits, and starts afresh otherwise: another task has other classes.

What a trial starts from must be public with respect to the data that it protects. A checkpoint
of this package says what it was trained on; for anything else the configuration has to say it.

`check_initial_weights` needs no JAX, so a specification that names weights which cannot be used
is refused before anything starts.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import ModelConfig
from trainer.errors import CheckpointError
from trainer.weights.checkpoints import check_initial_params
from trainer.weights.weight_files import Kind, check_readable, kind_of, read_arrays

Shape = tuple[int, ...]

# After "." became "/"; the longest first.
_PREFIXES = ("model/params/", "params/")
# Differences that an error names; a wrong file has as many as the model has parameters.
_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of a file of weights; ``str`` says it to a person.

    Attributes:
        path: The file or directory.
        loaded: Parameters that come from it, with their shapes.
        fresh: Parameters that start afresh: none, or all of the head.
        reshaped: Those of them that the file has in another shape, with that shape.
        unused: Arrays of the file that no parameter took, by their names there.
    """

    path: str
    loaded: dict[str, Shape]
    fresh: dict[str, Shape]
    reshaped: dict[str, Shape]
    unused: dict[str, Shape]

    def __str__(self) -> str:
        lines = [
            f"initial weights {self.path!r}: {len(self.loaded)} arrays loaded, "
            f"{len(self.fresh)} fresh, {len(self.unused)} in the file not used"
        ]
        lines += [f"  loaded  {name} {shape}" for name, shape in self.loaded.items()]
        for name, shape in self.fresh.items():
            instead = f"; the file has {self.reshaped[name]}" if name in self.reshaped else ""
            lines.append(f"  fresh   {name} {shape}{instead}")
        lines += [f"  unused  {name} {shape}" for name, shape in self.unused.items()]
        return "\n".join(lines)


def check_initial_weights(
    model: ModelConfig, architecture: dict[str, Any], dataset_fingerprint: str
) -> Kind:
    """Whether the weights of ``model.init_from`` may start a trial, as far as headers tell.

    Args:
        model: With a path in ``init_from``.
        architecture: The trial's, from `trainer.weights.checkpoints.architecture`.
        dataset_fingerprint: Of the data that the trial protects.

    Returns:
        What kind of weights they are.

    Raises:
        CheckpointError: If they are absent, damaged, of another model, were trained on the
            protected data, or do not say so and neither does ``model.init_is_public``.
    """
    path = Path(str(model.init_from))
    kind = kind_of(path)
    if kind == "checkpoint":
        check_initial_params(path, architecture, dataset_fingerprint)
        return kind
    if not model.init_is_public:
        raise CheckpointError(
            f"weights {str(path)!r}: do not say what they were trained on. Had they seen the data "
            "that this trial protects, starting from them would spend budget that nobody accounts "
            "for; allowed with model.init_is_public: true, which says that they have not"
        )
    check_readable(path, kind)
    return kind


def load_initial_weights(
    model: ModelConfig,
    fresh: Mapping[str, Any],
    architecture: dict[str, Any],
    dataset_fingerprint: str,
) -> tuple[Any, LoadReport]:
    """The parameters that a trial starts with.

    Args:
        model: With a path in ``init_from``.
        fresh: The model's own parameters, freshly drawn (`trainer.models.network.Network.fresh`).
        architecture: As in `check_initial_weights`.
        dataset_fingerprint: As there.

    Returns:
        Parameters of the same names and shapes, float32 and finite (`Network.init` takes them as
        ``initial``), and what was loaded.

    Raises:
        CheckpointError: As in `check_initial_weights`, and if a parameter outside of the head is
            missing or has another shape, an array is not of finite floating-point numbers, two
            arrays have one name, or nothing would be loaded.
    """
    from flax.traverse_util import flatten_dict, unflatten_dict

    from trainer.models.network import HEAD

    kind = check_initial_weights(model, architecture, dataset_fingerprint)
    where = f"weights {model.init_from!r}"
    params: dict[str, Any] = flatten_dict(fresh, sep="/")  # type: ignore[assignment]
    wanted = {name: tuple(leaf.shape) for name, leaf in params.items()}
    weights = _Weights(where, read_arrays(Path(str(model.init_from)), kind))
    head = {name for name in wanted if name.split("/")[0] == HEAD}
    found = weights.shapes(wanted)
    misfits = {name for name in wanted if found[name] != wanted[name]}
    if misfits - head:
        raise CheckpointError(_misfit_text(where, misfits - head, wanted, weights, found))
    afresh = head if model.fresh_head or misfits else set()
    loaded = {name: weights.values(name) for name in wanted if name not in afresh}
    if not loaded:
        raise CheckpointError(
            f"{where}: nothing of it would be used, since all that {model.name} has is a head, "
            "which starts afresh; allowed is init_from: null, or a file whose head fits"
        )
    report = LoadReport(
        path=str(model.init_from),
        loaded={name: wanted[name] for name in loaded},
        fresh={name: wanted[name] for name in wanted if name in afresh},
        reshaped={name: shape for name in sorted(misfits) if (shape := found[name]) is not None},
        unused=weights.unused(loaded),
    )
    return unflatten_dict({**params, **loaded}, sep="/"), report


class _Weights:
    """The arrays of a file by the names that a model may have for them."""

    def __init__(self, where: str, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        self.where = where
        self.arrays: dict[str, np.ndarray] = {}
        self.own_names: dict[str, str] = {}
        for own_name, array in arrays:
            name = own_name.replace(".", "/")
            prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
            name = name.removeprefix(prefix)
            if name in self.arrays:
                raise CheckpointError(
                    f"{where}: {self.own_names[name]!r} and {own_name!r} are both the parameter "
                    f"{name}; allowed is one of them"
                )
            self.arrays[name], self.own_names[name] = array, own_name

    def shapes(self, names: Iterable[str]) -> dict[str, Shape | None]:
        """The shapes that some parameters have here, None where one is missing."""
        present = self.arrays
        return {name: present[name].shape if name in present else None for name in names}

    def values(self, name: str) -> np.ndarray:
        """A parameter in float32, its low-rank update added if there is one.

        Raises:
            CheckpointError: If it is not of finite floating-point numbers.
        """
        value = self._wide(name)
        updates = self._updates_of(name)
        if updates:
            missing = [each for each in updates if each not in self.arrays]
            factors = [self._wide(each) for each in updates if each in self.arrays]
            shape, rank = value.shape, factors[0].shape[-1:]
            fitting = [shape[:-1] + rank, shape[:-2] + rank + shape[-1:]]
            if missing or [factor.shape for factor in factors] != fitting:
                raise CheckpointError(
                    f"{self.where}: {' and '.join(updates)} are no update of {name} {shape}"
                )
            value = value + factors[0] @ factors[1]
        if not np.all(np.isfinite(value)):
            raise CheckpointError(
                f"{self.where}: {self.own_names[name]} holds numbers that are infinite, NaN or "
                "beyond float32; allowed are finite ones"
            )
        return value

    def unused(self, names: Iterable[str]) -> dict[str, Shape]:
        """Shapes, by the file's own names, of what no parameter of these took."""
        used = {each for name in names for each in (name, *self._updates_of(name))}
        return {
            self.own_names[name]: array.shape
            for name, array in sorted(self.arrays.items())
            if name not in used
        }

    def _updates_of(self, name: str) -> tuple[str, ...]:
        """The names of the low-rank update of a kernel (`models.network`), if it has one."""
        layer, _, leaf = name.rpartition("/")
        updates = f"{layer}/lora_a", f"{layer}/lora_b"
        return updates if leaf == "kernel" and updates[0] in self.arrays else ()

    def _wide(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        # NumPy does not count the types of ml_dtypes among its own.
        if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
            raise CheckpointError(
                f"{self.where}: {self.own_names[name]} is of type {array.dtype}; allowed is a "
                "floating-point type"
            )
        with np.errstate(over="ignore"):  # what became infinite is refused by `values`
            return array.astype(np.float32)


def _misfit_text(
    where: str,
    misfits: set[str],
    wanted: Mapping[str, Shape],
    weights: _Weights,
    found: Mapping[str, Shape | None],
) -> str:
    """What the model has that a file has not, and what the file has instead."""
    shown = [
        f"{name} {wanted[name]} is "
        + ("missing" if found[name] is None else f"{found[name]} in the file")
        for name in sorted(misfits)[:_SHOWN]
    ]
    more = f" and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
    others = weights.unused(wanted)
    instead = [f"{name} {shape}" for name, shape in list(others.items())[:_SHOWN]]
    has = f"; it also has {', '.join(instead)}" if instead else ""
    rest = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return (
        f"{where}: does not fit the model: {'; '.join(shown)}{more}{has}{rest}. Allowed: all "
        "parameters but the head's, in their own shapes; nothing is interpolated"
    )
