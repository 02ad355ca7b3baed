"""What stays the same from a trial's first step to its last, and the parts of its way.

`trainer.loop` puts the parts in their order, which is what the guarantee rests on.
"""

import dataclasses
import functools
import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import accounting
from trainer.config import DataConfig, TrialConfig
from trainer.data.datasets import Dataset, OpenDataset, load, open_examples
from trainer.device_memory import free_bytes, is_out_of_memory
from trainer.errors import CheckpointError
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.noise import replay, start_noise
from trainer.models import make_checked_model
from trainer.models.network import Network, Parameters
from trainer.reporting import Outcome, TrialReport
from trainer.training.averages import EMA, POLYAK, start_averages
from trainer.training.devices import Topology
from trainer.training.engine import settled
from trainer.training.evaluation import Utility, all_finite, evaluate, with_noise
from trainer.training.objective import Objective
from trainer.training.optimizers import make_optimizer
from trainer.training.plan import evaluation_mechanism, make_plan
from trainer.training.program_identity import program_digest
from trainer.training.runners import OnStep, ResidentRunner, Runner, StreamedRunner, resident_data
from trainer.training.step import QuantileTraced, Recipe, Traced, TrainState
from trainer.weights.checkpoints import (
    Manifest,
    architecture,
    config_digest,
    load_averages,
    load_opt_state,
    load_params,
    read_manifest,
)
from trainer.weights.initial_weights import load_initial_weights

LOGGER = logging.getLogger("trainer")

# Of a device's free memory; the rest is for the model and what training takes besides.
_DATA_SHARE = 0.5


class Branch(NamedTuple):
    """One lineage of noise of a trial.

    Attributes:
        branch_id: Its public name.
        start_step: Steps that were behind the trial when it began.
    """

    branch_id: str
    start_step: int


class Start(NamedTuple):
    """Where a process takes a trial up.

    Attributes:
        state: After ``step`` steps.
        step: Steps behind the trial.
        keys: Of the branch.
        branch: The branch.
    """

    state: TrainState
    step: int
    keys: BranchKeys
    branch: Branch


class Trial:
    """One configuration on its data and its devices.

    Args:
        config: The trial.
        data_home: Where built-in data sets are kept.
        topology: The devices.

    Raises:
        ConfigError: The configuration does not fit the data or the model.
        DatasetError: The data set cannot be read.
        CheckpointError: The initial parameters do not fit.
    """

    def __init__(self, config: TrialConfig, data_home: Path, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.placement = _placement(config.data, data_home, topology)
        self.data: Dataset | OpenDataset
        if self.placement == "device":
            self.data = _loaded(config.data, data_home)
        else:
            self.data = _opened(config.data, data_home)
        info = self.data.info
        num_units = info.num_train if info.num_users is None else info.num_users
        self.plan = make_plan(config, num_units)
        model = config.model
        self.network = Network(
            make_checked_model(model, info.image_shape, info.num_classes),
            model.trainable,
            model.lora_rank,
            model.head_init_scale,
        )
        self.architecture = architecture(model, info.image_shape, info.num_classes)
        self.traced = _traced(config, self.plan.grad_noise_multiplier)
        self.initial = self._initial()
        self.frozen = topology.everywhere(self.initial.frozen)
        self.recipe = Recipe(
            objective=Objective(
                self.network, config.augmentation, config.mechanism.examples_per_user
            ),
            optimizer=config.optimizer,
            mode=config.clipping.mode,
            engine=config.clipping.engine,
            microbatch_size=config.clipping.microbatch_size,
            noise_strategy=self.plan.noise_strategy,
        )
        self.runner = self._runner()
        self.has_fitted = False
        # Of several processes one alone may run out of memory.
        self.may_shrink = jax.process_count() == 1

    def _initial(self) -> Parameters:
        info, model, seed = self.data.info, self.config.model, self.config.seed
        given = None
        if model.init_from is not None:
            fresh = self.network.fresh(info.image_shape, seed)
            given, report = load_initial_weights(model, fresh, self.architecture, info.fingerprint)
            LOGGER.info("%s", report)
        return self.network.init(info.image_shape, seed, initial=given)

    def _runner(self) -> Runner:
        if isinstance(self.data, Dataset):
            on_devices = _on_devices(self.data, self.topology)
            return ResidentRunner(self.plan, self.traced, on_devices, self.frozen, self.topology)
        return StreamedRunner(
            self.plan,
            self.traced,
            self.data,
            self.frozen,
            self.topology,
            self.config.mechanism.examples_per_user,
        )

    # -- beginning ----------------------------------------------------------------------------

    def start(self, resume_from: Path | None, secrets_dir: Path | None) -> Start:
        """Where to begin: at the first step, or where a checkpoint stands.

        A checkpoint's branch is gone on with where its root is kept and this process repeats a
        step bit for bit. Otherwise another branch begins.

        Args:
            resume_from: A checkpoint of this trial, or None.
            secrets_dir: Where roots are kept, or None.

        Raises:
            CheckpointError: The checkpoint is damaged, of another trial, or cannot be gone on
                with by another branch.
            SecretError: A root cannot be read or kept.
        """
        params = self.initial.trainable
        opt_state = make_optimizer(self.config.optimizer, self.config.learning_rate).init(params)
        state = TrainState(
            params=params,
            opt_state=opt_state,
            l2_clip_norm=jnp.float32(self.plan.l2_clip_norm),
            averages=start_averages(self.config.averaging, params),
            noise=(),
        )
        if resume_from is None:
            return self._new_branch(state, 0, secrets_dir)
        manifest = read_manifest(resume_from)
        self._check_same_trial(resume_from, manifest)
        state = self._restored(resume_from, manifest, state)
        keys = self._kept_keys(manifest, secrets_dir)
        if keys is None:
            if self.plan.noise_strategy:
                raise CheckpointError(
                    f"checkpoint {str(resume_from)!r}: its noise is correlated with that of "
                    "earlier steps, so only a process that has its key and repeats its steps bit "
                    "for bit may go on; allowed is to begin anew"
                )
            return self._new_branch(state, manifest.step, secrets_dir)
        self.may_shrink = False
        branch = Branch(keys.branch_id, manifest.branch_start)
        noise_keys = keys.noise_keys(range(branch.start_step + 1, manifest.step + 1))
        stddev = self.plan.grad_noise_multiplier * self.plan.l2_clip_norm
        noise = replay(self.plan.noise_strategy, state.params, noise_keys, stddev)
        return self._started(state._replace(noise=noise), manifest.step, keys, branch)

    def _new_branch(self, state: TrainState, step: int, secrets_dir: Path | None) -> Start:
        keys = self.topology.new_keys()
        if secrets_dir is not None and self.topology.leads:
            keys.save(secrets_dir)
        noise = start_noise(self.plan.noise_strategy, state.params)
        self._settle_engine(state)
        return self._started(state._replace(noise=noise), step, keys, Branch(keys.branch_id, step))

    def _started(self, state: TrainState, step: int, keys: BranchKeys, branch: Branch) -> Start:
        return Start(self.topology.everywhere(state), step, keys, branch)

    def _restored(self, path: Path, manifest: Manifest, state: TrainState) -> TrainState:
        joined = load_params(
            path, self.network.joined(self.initial.trainable, self.initial.frozen)
        )
        params, frozen = self.network.split(joined)
        self.frozen = self.topology.everywhere(frozen)
        self.runner.frozen = self.frozen
        clip_norm = manifest.l2_clip_norm
        if clip_norm is None:  # of a trial whose clip norm never changed
            clip_norm = self.plan.l2_clip_norm
        return state._replace(
            params=params,
            opt_state=load_opt_state(path, state.opt_state),
            l2_clip_norm=jnp.float32(clip_norm),
            averages=load_averages(path, state.averages),
        )

    def _kept_keys(self, manifest: Manifest, secrets_dir: Path | None) -> BranchKeys | None:
        """The keys of a checkpoint's branch, if its steps can be repeated bit for bit."""
        branch_id = manifest.branch_id
        if branch_id is None or manifest.engine is None or secrets_dir is None:
            return None
        engine, microbatch_size = manifest.engine
        same = dataclasses.replace(self.recipe, engine=engine, microbatch_size=microbatch_size)
        found: list[BranchKeys] = []

        def look() -> int:
            keys = None
            if manifest.program == self._digest(same):
                keys = BranchKeys.load(secrets_dir, branch_id)
            found.extend([keys] if keys is not None else [])
            return len(found)

        if not self.topology.agreed(look):
            return None
        self.recipe = same
        return self.topology.agreed_keys(found[0] if found else None)

    def _check_same_trial(self, path: Path, manifest: Manifest) -> None:
        ours = (config_digest(self.config), self.data.info.fingerprint, self.architecture)
        if ours != (manifest.config_digest, manifest.dataset_fingerprint, manifest.architecture):
            raise CheckpointError(
                f"checkpoint {str(path)!r}: belongs to another configuration or data set; "
                "allowed is one of this trial (iterations, report_every_steps, evaluation, "
                "data.placement, clipping.engine and clipping.microbatch_size may differ)"
            )

    def _settle_engine(self, state: TrainState) -> None:
        self.recipe = settled(
            self.recipe, state, self.frozen, self.runner.data, self.runner.capacity
        )

    def _digest(self, recipe: Recipe) -> str:
        config = self.config
        # Where one of these differs, the same noise would be used for something else.
        schedule = None
        if config.learning_rate_schedule != "constant":
            schedule = config.iterations
        counting = None
        if config.evaluation.protection == "dp":
            counting = (config.evaluation, config.report_every_steps)
        return program_digest(recipe, self.topology, (self.placement, schedule, counting))

    # -- training -----------------------------------------------------------------------------

    def advance(self, at: Start, stop: int, on_step: OnStep) -> Start:
        """Takes the steps up to ``stop``, with smaller microbatches if the memory is too short.

        Microbatches change neither the batch nor its noise, but rounding. So a branch that is
        gone on with keeps to its own, and fails where they do not fit. Only the first call can
        fail so: all others want as much memory as that did.
        """
        take = functools.partial(
            self.runner.advance, keys=at.keys, start=at.step, stop=stop, on_step=on_step
        )
        if self.has_fitted:
            return at._replace(state=take(self.recipe, at.state), step=stop)
        # The state is donated, so it may be gone when the program fails.
        spare = _copied(self.topology.here(at.state))
        state = at.state
        while True:
            try:
                state = jax.block_until_ready(take(self.recipe, state))
                self.has_fitted = True
                return at._replace(state=state, step=stop)
            except jax.errors.JaxRuntimeError as error:
                size = self.recipe.microbatch_size or self.runner.capacity
                if not is_out_of_memory(error) or size == 1 or not self.may_shrink:
                    raise
            self.recipe = dataclasses.replace(self.recipe, microbatch_size=size // 2)
            LOGGER.warning("out of memory with %d at a time; going on with %d", size, size // 2)
            state = self.topology.everywhere(spare)

    # -- what is told -------------------------------------------------------------------------

    def report(self, at: Start, charged: int, counts_charged: int) -> TrialReport:
        """Measures the parameters after some steps.

        Args:
            at: Where the trial is.
            charged: Iterations that have been charged by now.
            counts_charged: Noisy counts that have been charged by now.
        """
        config = self.config
        state = self.topology.here(at.state)
        models = {"": state.params}
        models |= {
            f"{name}_": state.averages[name] for name in (EMA, POLYAK) if name in state.averages
        }
        rng = at.keys.evaluation_rng(at.step)
        fields: dict[str, Any] = {}
        for prefix, params in models.items():
            fields |= self._measured(prefix, params, rng)
        if config.evaluation.protection == "non_private":
            exact = {
                f"non_private_{name}": fields[name] for name in ("eval_accuracy", "eval_loss")
            }
            fields = {**dict.fromkeys(fields), **exact}
        outcome: Outcome = "running" if at.step < config.iterations else "completed"
        if not all_finite(state.params):
            outcome = "diverged"
        counting = evaluation_mechanism(config)
        return TrialReport(
            step=at.step,
            epsilon=self._epsilon(self.plan.mechanism, charged),
            delta=config.target_delta,
            eval_epsilon=None if counting is None else self._epsilon(counting, counts_charged),
            l2_clip_norm=float(state.l2_clip_norm),
            outcome=outcome,
            **fields,
        )

    def _measured(self, prefix: str, params: Any, rng: np.random.Generator) -> dict[str, Any]:
        images, labels = self._eval_arrays()
        frozen = self.topology.here(self.frozen)
        utility: Utility = evaluate(self.network, params, frozen, images, labels)
        noise_multiplier = self.config.evaluation.noise_multiplier
        if noise_multiplier is not None:
            utility = with_noise(utility, len(labels), noise_multiplier, rng)
        return {f"{prefix}eval_accuracy": utility.accuracy, f"{prefix}eval_loss": utility.loss}

    def _eval_arrays(self) -> tuple[jax.Array, jax.Array]:
        return _eval_on_device(self.data)

    def _epsilon(self, mechanism: accounting.Mechanism, iterations: int) -> float:
        return accounting.epsilon(
            mechanism.after(iterations),
            delta=self.config.target_delta,
            accountant=self.config.accountant,
        )

    def checkpoint(self, at: Start) -> dict[str, Any]:
        """What a checkpoint holds, copied from the devices (`save_checkpoint`'s arguments)."""
        state = self.topology.here(at.state)
        joined = self.network.joined(state.params, self.topology.here(self.frozen))
        return {
            "params": _copied(joined),
            "opt_state": _copied(state.opt_state),
            "averages": _copied(state.averages),
            "l2_clip_norm": float(state.l2_clip_norm),
            "step": at.step,
            "architecture": self.architecture,
            "dataset_fingerprint": self.data.info.fingerprint,
            "config_digest": config_digest(self.config),
            "branch_id": at.branch.branch_id,
            "branch_start": at.branch.start_step,
            "program": self._digest(self.recipe),
            "engine": (self.recipe.engine, self.recipe.microbatch_size),
        }

    def close(self) -> None:
        """Ends what runs in the background."""
        self.runner.close()


def _copied(tree: Any) -> Any:
    """On the host. A copy also on a CPU, whose arrays the next step writes over."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


def _traced(config: TrialConfig, grad_noise_multiplier: float) -> Traced:
    quantile = None
    if config.count_noise_stddev is not None:
        quantile = QuantileTraced(
            target_quantile=config.clipping.target_quantile,
            learning_rate=config.clipping.learning_rate,
            count_noise_stddev=config.count_noise_stddev,
        )
    traced = Traced(
        learning_rate=config.learning_rate,
        noise_multiplier=grad_noise_multiplier,
        expected_batch_size=config.expected_batch_size,
        weight_decay=config.weight_decay,
        ema_decay=config.averaging.ema_decay or 0.0,
        quantile=quantile,
    )
    return jax.tree.map(np.float32, traced)


def _placement(config: DataConfig, data_home: Path, topology: Topology) -> str:
    """``device`` or ``streamed``; of several processes, the first decides."""
    if config.placement != "auto":
        return config.placement
    info = _opened(config, data_home).info
    size = 4.0 * info.num_train * math.prod(info.image_shape)
    fits = topology.agreed(lambda: int(size <= _DATA_SHARE * free_bytes()))
    return "device" if fits else "streamed"


# The two latest data sets are kept for the trials that follow.
@functools.lru_cache(maxsize=2)
def _loaded(config: DataConfig, data_home: Path) -> Dataset:
    return load(config, data_home)


@functools.lru_cache(maxsize=2)
def _opened(config: DataConfig, data_home: Path) -> OpenDataset:
    return open_examples(config, data_home)


@functools.lru_cache(maxsize=2)
def _on_devices(data: Dataset, topology: Topology) -> Any:
    return resident_data(data, topology)


@functools.lru_cache(maxsize=2)
def _eval_on_device(data: Dataset | OpenDataset) -> tuple[jax.Array, jax.Array]:
    examples = data.eval if isinstance(data, Dataset) else data.eval.read_all()
    return jax.device_put(examples.images), jax.device_put(examples.labels)
