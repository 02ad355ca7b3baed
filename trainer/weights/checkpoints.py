"""Checkpoints that are either whole or not there.

A checkpoint is a directory with Orbax trees (``params/``, ``opt_state/``, ``averages/``) and
``checkpoint.json``: what they belong to, and the SHA-256 of every file. It is written under
another name, synced with all that is in it, and renamed into place, so neither a crash nor a full
disk leaves half of one; any later damage shows as a digest that differs. No key is ever in it, and
nothing that noise remembers: it names the branch whose root may lie below ``secrets/``
(`trainer.mechanism.keys`), and whoever has that goes on bit for bit.

`read_manifest` and `check_initial_params` need no JAX, so a specification that names a
checkpoint can be refused before anything starts.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config import ModelConfig, TrialConfig, fixed_weight_decay
from trainer.config_sections import AugmentationConfig, AveragingConfig, MechanismConfig
from trainer.durability import sync, sync_tree
from trainer.errors import CheckpointError
from trainer.mechanism.branch import Branch

FORMAT = 4
# Format 1 knew no clip norm: every trial's was fixed by its configuration. Format 2 named no
# branch: no root was kept. Format 3 knew less of it, and of what a fork may take over.
_READABLE_FORMATS = (1, 2, 3, FORMAT)
_MANIFEST = "checkpoint.json"
# What choices were before there were any: of a trial, of its data and of its model.
_BEFORE: dict[str, Any] = {
    "learning_rate_schedule": "constant",
    "warmup_steps": 0,
    "mechanism": dataclasses.asdict(MechanismConfig()),
    "augmentation": dataclasses.asdict(AugmentationConfig()),
    "averaging": dataclasses.asdict(AveragingConfig()),
}
_DATA_BEFORE: dict[str, Any] = {"user_feature": None}
_MODEL_BEFORE: dict[str, Any] = {
    "trainable": "all",
    "lora_rank": 8,
    "head_init_scale": 1.0,
    "fresh_head": False,
    "init_is_public": False,
    "dtype": "float32",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint belongs to.

    Attributes:
        step: Steps taken.
        architecture: Model name, sizes, input shape and classes, as JSON would hold them.
        dataset_fingerprint: Of the protected data that it was trained on.
        config_digest: Of everything that must agree for the trial to go on (`config_digest`).
        files: Relative path of every file to its SHA-256.
        l2_clip_norm: Of the next step; None in format 1, whose trials never changed it.
        branch: Whose keys the last step had; None before format 3.
        parts: What each part of the state is of (`state_parts`); None before format 4.
        averages_start: Steps that were behind the trial when its averages began.
        spent_before: What had been spent on the parameters before the trial's own first step, as
            mechanisms in JSON; empty where no other trial was forked.
    """

    step: int
    architecture: dict[str, Any]
    dataset_fingerprint: str
    config_digest: str
    files: dict[str, str]
    l2_clip_norm: float | None = None
    branch: Branch | None = None
    parts: dict[str, Any] | None = None
    averages_start: int = 0
    spent_before: tuple[dict[str, Any], ...] = ()


class FirstReadable(NamedTuple):
    """The first of several checkpoints that can be used.

    Attributes:
        path: Where it is; None if there is none.
        manifest: Its manifest.
        passed_over: Why those before it could not be used, a message each.
    """

    path: Path | None
    manifest: Manifest | None
    passed_over: list[str]


def architecture(
    model: ModelConfig, image_shape: tuple[int, ...], num_classes: int
) -> dict[str, Any]:
    """What two models must share for parameters of one to fit the other."""
    # The other models' sizes go with their names.
    sizes: dict[str, Any] = {
        "mlp": {"hidden_sizes": list(model.hidden_sizes)},
        "cnn": {"channels": list(model.channels)},
    }.get(model.name, {})
    shape = list(image_shape)
    return {"model": model.name, **sizes, "image_shape": shape, "num_classes": num_classes}


def config_digest(config: TrialConfig) -> str:
    """SHA-256 over a configuration, without what a continued trial may change.

    Those are ``iterations`` (where noise is not banded) and ``report_every_steps``: a trial may be
    extended or reported on more often. So are ``clipping.engine``, ``clipping.microbatch_size``
    and ``data.placement``, which change how the same is computed, how the evaluation is
    protected, and what the clipping mode does not read. Everything else would make it another
    mechanism or another model.

    A trial that makes no use of a newer choice has the digest that it had before there was one.
    """
    facts = dataclasses.asdict(config)
    for free in ("iterations", "report_every_steps", "clipping", "evaluation"):
        del facts[free]
    if config.mechanism.bands > 1:  # how noise is correlated depends on how long it will be
        facts["iterations"] = config.iterations
    facts = _used(facts, {**_BEFORE, "weight_decay": fixed_weight_decay(config.optimizer)})
    facts["data"] = _used(facts["data"], {**_DATA_BEFORE, "placement": config.data.placement})
    facts["model"] = _used(facts["model"], _MODEL_BEFORE)
    clipping = config.clipping
    if clipping.mode != "flat":
        facts["clipping"] = {"mode": clipping.mode}
    if clipping.mode == "quantile":
        facts["clipping"] |= {
            "target_quantile": clipping.target_quantile,
            "learning_rate": clipping.learning_rate,
            "count_noise_stddev": config.count_noise_stddev,
        }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def state_parts(config: TrialConfig) -> dict[str, Any]:
    """What each part of a trial's state is of, as JSON would hold it.

    A fork takes over those parts of another trial for which this is the same; parameters it
    always takes over.
    """
    trained = [config.model.trainable, config.model.lora_rank]
    averaging = config.averaging
    return {
        "opt_state": [config.optimizer, *trained],
        "averages": [averaging.ema_decay, averaging.polyak, *trained],
        "l2_clip_norm": "quantile" if config.clipping.mode == "quantile" else "fixed",
    }


def _used(facts: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Facts without choices that were left as they were before they could be made."""
    return {name: fact for name, fact in facts.items() if before.get(name, ...) != fact}


def save_checkpoint(
    path: Path,
    *,
    params: Any,
    opt_state: Any,
    step: int,
    architecture: dict[str, Any],
    dataset_fingerprint: str,
    config_digest: str,
    averages: Any = None,
    **more: Any,
) -> None:
    """Writes a checkpoint atomically and durably; one that is already at ``path`` is replaced.

    Args:
        path: Directory to create. Its parent is made if need be.
        params: Pytree of arrays.
        opt_state: Pytree of arrays, possibly without leaves.
        step: Steps taken.
        architecture: From `architecture`.
        dataset_fingerprint: Of the protected data set.
        config_digest: From `config_digest`.
        averages: Pytree of arrays, possibly without leaves.
        **more: Fields of `Manifest` that have defaults.

    Raises:
        CheckpointError: It cannot be written, as when the disk is full. Then nothing of it is
            left, and what was at ``path`` still is.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write_tree(partial / "params", params)
        _write_leaves(partial / "opt_state", opt_state)
        _write_leaves(partial / "averages", averages)
        manifest = Manifest(
            step=step,
            architecture=architecture,
            dataset_fingerprint=dataset_fingerprint,
            config_digest=config_digest,
            files=_digests(partial),
            **more,
        )
        body = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=1)
        (partial / _MANIFEST).write_text(body, encoding="utf-8")
        sync_tree(partial)
        _put_in_place(partial, path)
    except (OSError, ValueError) as error:  # Orbax's are ValueErrors
        raise CheckpointError(
            f"checkpoint {str(path)!r}: cannot be written: {_reason(error)}; allowed is a "
            "directory with room for it, where the trial can then be gone on with from the "
            "checkpoint before"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already where all went well


def write_anew(path: Path, target: Path) -> None:
    """Writes a copy of a checkpoint that does not tell when the first was written.

    A copy of its files would: Orbax keeps the time in several of them.

    Args:
        path: A checkpoint directory.
        target: As ``path`` of `save_checkpoint`.

    Raises:
        CheckpointError: If the first is absent or damaged, or the copy cannot be written.
    """
    manifest = read_manifest(path)
    facts = {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
    del facts["files"]
    leaves = {
        name: [tree[str(index)] for index in range(len(tree))]
        for name in ("opt_state", "averages")
        for tree in (_read_any_tree(path / name) if (path / name).is_dir() else {},)
    }
    save_checkpoint(target, params=_read_any_tree(path / "params"), **leaves, **facts)


def _put_in_place(partial: Path, path: Path) -> None:
    """Renames a synced directory, and makes that durable; one that was there is removed after."""
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _reason(error: Exception) -> str:
    """Why something could not be written, in few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's
    return os.strerror(int(code[1])) if code else str(error)[-300:]


def first_readable(candidates: Iterable[Path]) -> FirstReadable:
    """The first checkpoint that is whole.

    Args:
        candidates: Checkpoint directories, the best first; those after it are not read.
    """
    passed_over: list[str] = []
    for path in candidates:
        try:
            return FirstReadable(path, read_manifest(path), passed_over)
        except CheckpointError as error:
            passed_over.append(str(error))
    return FirstReadable(None, None, passed_over)


def read_manifest(path: Path) -> Manifest:
    """Reads and verifies a checkpoint's manifest, file digests included.

    Args:
        path: A checkpoint directory.

    Raises:
        CheckpointError: If ``path`` is absent, is no checkpoint, or is damaged.
    """
    where = f"checkpoint {str(path)!r}"
    if not path.is_dir():
        raise CheckpointError(f"{where}: no such directory")
    try:
        raw = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        known = raw.pop("format")
        manifest = _manifest(raw) if known in _READABLE_FORMATS else None
    except FileNotFoundError:
        raise CheckpointError(f"{where}: not a checkpoint, it holds no {_MANIFEST}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{where}: not a checkpoint, its {_MANIFEST} is damaged") from None
    if manifest is None:
        readable = " and ".join(map(str, _READABLE_FORMATS))
        raise CheckpointError(f"{where}: has format {known!r}; this version reads {readable}")
    if _digests(path) != manifest.files:
        raise CheckpointError(f"{where}: damaged, its files differ from its {_MANIFEST}")
    return manifest


def _manifest(raw: dict[str, Any]) -> Manifest:
    """A manifest of any format that can be read."""
    old = [raw.pop(name, None) for name in ("branch_id", "branch_start", "program", "engine")]
    if old[0] is not None:  # format 3
        branch_id, start_step, program, how = old
        engine, microbatch_size = how or (None, None)
        branch = Branch(branch_id, start_step, None, program, engine, microbatch_size)
    else:
        branch = None if raw.get("branch") is None else Branch.from_json(raw["branch"])
    return Manifest(
        **{**raw, "branch": branch, "spent_before": tuple(raw.get("spent_before", ()))}
    )


def check_initial_params(path: Path, wanted: dict[str, Any], dataset_fingerprint: str) -> Manifest:
    """Whether a checkpoint's parameters may start a trial.

    Args:
        path: A checkpoint directory.
        wanted: The trial's `architecture`.
        dataset_fingerprint: Of the data that the trial protects.

    Raises:
        CheckpointError: If it is no checkpoint, has another architecture, or was trained on
            the very data that the trial protects: its spending would go unaccounted. Another
            number of classes is allowed, since a head may start afresh
            (`trainer.weights.initial_weights`).
    """
    manifest = read_manifest(path)
    if {**manifest.architecture, "num_classes": wanted["num_classes"]} != wanted:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: holds {manifest.architecture}; allowed is {wanted}"
        )
    if manifest.dataset_fingerprint == dataset_fingerprint:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: was trained on the data set that this trial protects, "
            "so starting from it would spend budget that nobody accounts for; allowed is a "
            "checkpoint from other, public data"
        )
    return manifest


def load_params(path: Path, like: Any) -> Any:
    """The parameters of a verified checkpoint, in the form of ``like``."""
    return _read_tree(path / "params", like)


def load_opt_state(path: Path, like: Any) -> Any:
    """The optimizer state of a verified checkpoint, in the form of ``like``."""
    return _read_leaves(path / "opt_state", like)


def load_averages(path: Path, like: Any) -> Any:
    """The averages of a verified checkpoint, in the form of ``like``."""
    return _read_leaves(path / "averages", like)


def _read_leaves(path: Path, like: Any) -> Any:
    import jax

    leaves, treedef = jax.tree.flatten(like)
    if not leaves:
        return like
    stored = _read_tree(path, {str(index): leaf for index, leaf in enumerate(leaves)})
    return jax.tree.unflatten(treedef, [stored[str(index)] for index in range(len(leaves))])


def _write_leaves(path: Path, tree: Any) -> None:
    import jax

    leaves = jax.tree.leaves(tree)
    if leaves:
        _write_tree(path, {str(index): leaf for index, leaf in enumerate(leaves)})


def _write_tree(path: Path, tree: Any) -> None:
    import jax
    import orbax.checkpoint as ocp

    _checkpointer().save(path.resolve(), args=ocp.args.StandardSave(jax.device_get(tree)))


@functools.cache
def _checkpointer() -> Any:
    """Orbax's, for all that this process writes: whoever calls is in the background already.

    A `StandardCheckpointer` has threads and a loop of its own, which take as long to make and to
    end as a small tree to write.
    """
    import orbax.checkpoint as ocp

    alone = _by_itself()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _read_tree(path: Path, like: Any) -> Any:
    import jax
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_by_itself()) as checkpointer:
            stored = _arrays(checkpointer.metadata(path.resolve()).item_metadata.tree)
            wanted = _arrays(like)
            if stored != wanted:
                raise ValueError(
                    f"it has {_some(stored - wanted)} where {_some(wanted - stored)} is needed; "
                    "allowed is one whose layers have the same names and shapes"
                )
            return checkpointer.restore(path.resolve(), target=jax.device_get(like))
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: does not fit: {error}") from error


def _read_any_tree(path: Path) -> Any:
    """A tree in the form in which it was written."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer(multiprocessing_options=_by_itself()) as checkpointer:
            written: Any = checkpointer.metadata(path.resolve()).item_metadata.tree
            like = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), written)
            return checkpointer.restore(path.resolve(), target=like)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: cannot be read: {error}") from error


def _arrays(tree: Any) -> set[str]:
    """Name and shape of every leaf, as ``head/bias (10,)``."""
    import jax

    return {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {tuple(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: hasattr(node, "shape")
        )
    }


def _some(arrays: set[str]) -> str:
    """The first few of some arrays, in words."""
    first = sorted(arrays)[:3]
    more = f" and {len(arrays) - len(first)} more" if len(arrays) > len(first) else ""
    return (", ".join(first) or "nothing") + more


def _by_itself() -> Any:
    """Orbax's option to wait for no other process: the first of several writes alone."""
    import jax
    import orbax.checkpoint as ocp

    this = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process-{this}"
    )


def _digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file below ``path`` but the manifest, by relative path."""
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file != path / _MANIFEST
    }
