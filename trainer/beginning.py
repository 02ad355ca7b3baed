"""The state that a trial begins with: fresh, its own checkpoint's, or another trial's.

A fork is a trial that begins with another one's checkpoint. Parameters it takes over, all of them;
of the optimizer's state, the averages and a clip norm that moves, what means the same in both
configurations (`trainer.weights.checkpoints.state_parts`); the rest begins afresh. What the other
trial's steps have cost is part of what the fork's parameters cost, so it has to say it.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accounting import Mechanism
from accounting.mechanism import composed, mechanism_from_json
from trainer.config import TrialConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.mechanism.branch import Branch
from trainer.models.network import Network, Parameters
from trainer.training.averages import start_averages
from trainer.training.optimizers import make_optimizer
from trainer.training.plan import TrainingPlan
from trainer.training.step import TrainState
from trainer.weights.checkpoints import (
    Manifest,
    config_digest,
    load_averages,
    load_opt_state,
    load_params,
    read_manifest,
    state_parts,
)

LOGGER = logging.getLogger("trainer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginning:
    """A state to begin with.

    Attributes:
        state: Without what noise remembers.
        frozen: Parameters that are not trained.
        step: Steps behind the trial.
        averages_start: Steps that were behind it when its averages began.
        branch: The branch that came to this state; None where that is not this trial's.
    """

    state: TrainState
    frozen: Any
    step: int = 0
    averages_start: int = 0
    branch: Branch | None = None

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that steps depend on: `Branch.origin` of one that begins here."""
        return tree_digest((self.state, self.frozen), f"{self.step} {self.averages_start}")


def tree_digest(tree: Any, more: str = "") -> str:
    """SHA-256 of a pytree's arrays, their names and further facts."""
    digest = hashlib.sha256(more.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        name = f"\0{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\0"
        digest.update(name.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beginnings:
    """What a trial may begin with.

    Attributes:
        config: The trial.
        plan: Its plan.
        network: Its network.
        initial: Its parameters before the first step.
        architecture: From `trainer.weights.checkpoints.architecture`.
        fingerprint: Of its data set.
        spent_before: What had been spent on its parameters before its own first step.
    """

    config: TrialConfig
    plan: TrainingPlan
    network: Network
    initial: Parameters
    architecture: dict[str, Any]
    fingerprint: str
    spent_before: tuple[Mechanism, ...]

    def fresh(self) -> Beginning:
        """Before the first step."""
        return Beginning(state=self._fresh(self.initial.trainable), frozen=self.initial.frozen)

    def resumed(self, path: Path) -> Beginning:
        """Where a checkpoint of this trial stands.

        Raises:
            CheckpointError: It is damaged or of another trial.
        """
        manifest = read_manifest(path)
        ours = (config_digest(self.config), self.fingerprint, self.architecture)
        if ours != (manifest.config_digest, manifest.dataset_fingerprint, manifest.architecture):
            raise CheckpointError(
                f"checkpoint {str(path)!r}: belongs to another configuration or data set; "
                "allowed is one of this trial (iterations, report_every_steps, evaluation, "
                "data.placement, clipping.engine and clipping.microbatch_size may differ)"
            )
        self._check_spent_before(path, manifest)
        return self._with_parts(path, manifest, {*state_parts(self.config)})

    def forked(self, path: Path) -> Beginning:
        """Where another trial's checkpoint stands, with what of it means the same here.

        Raises:
            ConfigError: The configuration cannot begin there.
            CheckpointError: It is damaged, or of another architecture or data set.
        """
        manifest = read_manifest(path)
        theirs = (manifest.architecture, manifest.dataset_fingerprint)
        if theirs != (self.architecture, self.fingerprint):
            raise CheckpointError(
                f"checkpoint {str(path)!r}: is of another model or data set; allowed to fork is "
                f"one on the very same data, of {self.architecture}"
            )
        if self.plan.noise_strategy:
            raise ConfigError(
                f"mechanism.bands={self.config.mechanism.bands}: allowed with fork_from is 1, for "
                "noise that is correlated is that of a whole trial, from its first step"
            )
        if manifest.step >= self.config.iterations:
            raise ConfigError(
                f"iterations={self.config.iterations}: allowed with fork_from is more than the "
                f"{manifest.step} steps of its checkpoint, since it is the step to end at"
            )
        if not self.spent_before:
            raise ConfigError(
                "spent_before=(): allowed with fork_from is what the steps of its checkpoint have "
                "cost, at least one mechanism"
            )
        self._check_spent_before(path, manifest)
        ours, parts = state_parts(self.config), manifest.parts or {}
        same = {name for name, part in ours.items() if parts.get(name) == part}
        begun = self._with_parts(path, manifest, same)
        words = {"opt_state": "optimizer state", "averages": "averages"}
        fresh = [word for name, word in words.items() if name not in same]
        LOGGER.info(
            "forked at step %d from %s; fresh: %s",
            *(manifest.step, path, ", ".join(fresh) or "noise alone"),
        )
        return dataclasses.replace(begun, branch=None)

    def _fresh(self, params: Any) -> TrainState:
        config = self.config
        return TrainState(
            params=params,
            opt_state=make_optimizer(config.optimizer, config.learning_rate).init(params),
            l2_clip_norm=jnp.float32(self.plan.l2_clip_norm),
            averages=start_averages(config.averaging, params),
            noise=(),
        )

    def _with_parts(self, path: Path, manifest: Manifest, parts: set[str]) -> Beginning:
        """A checkpoint's parameters and those parts of its state; the rest as if it began here."""
        joined = load_params(
            path, self.network.joined(self.initial.trainable, self.initial.frozen)
        )
        params, frozen = self.network.split(joined)
        state, averages_start = self._fresh(params), manifest.step
        if "opt_state" in parts:
            state = state._replace(opt_state=load_opt_state(path, state.opt_state))
        if "averages" in parts:
            state = state._replace(averages=load_averages(path, state.averages))
            averages_start = manifest.averages_start
        moves = self.config.clipping.mode == "quantile"
        # Format 1 kept none: its trials' clip norms never changed.
        if moves and "l2_clip_norm" in parts and manifest.l2_clip_norm is not None:
            state = state._replace(l2_clip_norm=jnp.float32(manifest.l2_clip_norm))
        return Beginning(
            state=state,
            frozen=frozen,
            step=manifest.step,
            averages_start=averages_start,
            branch=manifest.branch,
        )

    def _check_spent_before(self, path: Path, manifest: Manifest) -> None:
        """What the checkpoint's own trial began with must not be forgotten."""
        theirs = composed(mechanism_from_json(each) for each in manifest.spent_before)
        ours = composed(self.spent_before)
        for step, count in theirs.items():
            if ours.get(step, 0) < count:
                raise CheckpointError(
                    f"checkpoint {str(path)!r}: its trial began with parameters that had cost "
                    f"{json.dumps(manifest.spent_before)}; allowed is spent_before with at least "
                    "that"
                )
