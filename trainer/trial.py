"""What stays the same from a trial's first step to its last, and the parts of its way.

`trainer.loop` puts the parts in their order, which is what the guarantee rests on.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import accounting
from accounting.mechanism import composed
from trainer.beginning import Beginning, Beginnings
from trainer.config import DataConfig, TrialConfig
from trainer.data.datasets import Dataset, OpenDataset, load, open_examples
from trainer.device_memory import free_bytes, is_out_of_memory
from trainer.errors import CheckpointError, OutOfMemory
from trainer.mechanism.branch import Branch
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.noise import replay, start_noise
from trainer.models import make_checked_model
from trainer.models.network import Network, Parameters
from trainer.reporting import Outcome, TrialReport
from trainer.training.averages import EMA, POLYAK
from trainer.training.devices import Topology
from trainer.training.engine import settled
from trainer.training.evaluation import Utility, all_finite, evaluate, with_noise
from trainer.training.objective import Objective
from trainer.training.packed import Lane
from trainer.training.plan import (
    check_spent_before,
    evaluation_mechanism,
    make_plan,
)
from trainer.training.program_identity import program_digest
from trainer.training.runners import OnStep, ResidentRunner, Runner, StreamedRunner, resident_data
from trainer.training.step import QuantileTraced, Recipe, Traced, TrainState
from trainer.weights.checkpoints import architecture, config_digest, state_parts
from trainer.weights.initial_weights import load_initial_weights

LOGGER = logging.getLogger("trainer")

# Of a device's free memory; the rest is for the model and what training takes besides.
_DATA_SHARE = 0.5


class Start(NamedTuple):
    """Where a process takes a trial up.

    Attributes:
        state: After ``step`` steps.
        step: Steps behind the trial.
        keys: Of the branch.
        branch: What may be known of it; its microbatch is settled by the first `Trial.advance`.
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
        spent_before: What had been spent on its parameters before its own first step, where
            another trial is forked.
        lanes: Where in a pack (`trainer.pack`) it may run, none for alone.

    Attributes:
        lane: Where in a pack it runs, from `start` on; None for alone.

    Raises:
        ConfigError: The configuration does not fit the data or the model, or what was spent
            before cannot be added to what it spends.
        DatasetError: The data set cannot be read.
        CheckpointError: The initial parameters do not fit.
    """

    def __init__(
        self,
        config: TrialConfig,
        data_home: Path,
        topology: Topology,
        *,
        spent_before: Sequence[accounting.Mechanism] = (),
        lanes: Sequence[Lane] = (),
    ) -> None:
        check_spent_before(config, spent_before)
        self.config, self.topology, self.spent_before = config, topology, tuple(spent_before)
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
        self.averages_start = 0
        self.has_fitted = False
        # Of several processes one alone may run out of memory.
        self.may_shrink = topology.is_one_process
        self.lane: Lane | None = None
        self._ways: Sequence[Lane | None] = lanes if lanes and self._can_be_packed else (None,)

    @property
    def _can_be_packed(self) -> bool:
        # Of correlated noise a trial keeps to its branch for good, hence to one lane.
        return (
            isinstance(self.runner, ResidentRunner)
            and self.topology.size == 1
            and not self.plan.noise_strategy
        )

    def _initial(self) -> Parameters:
        info, model, seed = self.data.info, self.config.model, self.config.seed
        if model.init_from is None:
            # Copied, for the first step writes over them.
            return jax.tree.map(jnp.array, _drawn(self.network, info.image_shape, seed))
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

    def start(
        self,
        resume_from: Path | None,
        secrets_dir: Path | None,
        *,
        fork_from: Path | None = None,
        known_branches: Sequence[Branch] = (),
    ) -> Start:
        """Where to begin: at the first step, where a checkpoint stands, or where another trial's.

        A branch is gone on with where its root is kept and this process repeats its steps bit for
        bit: one of ``known_branches`` that began with this very state, or else the one that came
        to it. Otherwise another branch begins.

        Args:
            resume_from: A checkpoint of this trial, or None.
            secrets_dir: Where roots are kept, or None.
            fork_from: A checkpoint of another trial to begin with, or None; not read where there
                is one of this trial.
            known_branches: Branches of this trial, in the order in which they began.

        Raises:
            CheckpointError: The checkpoint is damaged, of another trial, or cannot be gone on
                with by another branch.
            ConfigError: The configuration cannot begin with what it is to be forked from.
            SecretError: A root cannot be read or kept.
        """
        begun = self._beginning(resume_from, fork_from)
        self.frozen = self.runner.frozen = self.topology.everywhere(begun.frozen)
        self.runner.traced = self.topology.everywhere(
            self.traced._replace(averages_start=np.float32(begun.averages_start))
        )
        self.averages_start = begun.averages_start
        kept = self._kept_branch(begun, known_branches, secrets_dir)
        if kept is None:
            if resume_from is not None and self.plan.noise_strategy:
                raise CheckpointError(
                    f"checkpoint {str(resume_from)!r}: its noise is correlated with that of "
                    "earlier steps, so only a process that has its key and repeats its steps bit "
                    "for bit may go on; allowed is to begin anew"
                )
            return self._new_branch(begun, secrets_dir)
        keys, branch = kept
        self.may_shrink = False
        noise_keys = keys.noise_keys(range(branch.start_step + 1, begun.step + 1))
        stddev = self.plan.grad_noise_multiplier * self.plan.l2_clip_norm
        noise = replay(self.plan.noise_strategy, begun.state.params, noise_keys, stddev)
        return self._started(begun, noise, keys, branch)

    def _beginning(self, resume_from: Path | None, fork_from: Path | None) -> Beginning:
        beginnings = Beginnings(
            config=self.config,
            plan=self.plan,
            network=self.network,
            initial=self.initial,
            architecture=self.architecture,
            fingerprint=self.data.info.fingerprint,
            spent_before=self.spent_before,
        )
        if resume_from is not None:
            return beginnings.resumed(resume_from)
        if fork_from is not None:
            return beginnings.forked(fork_from)
        return beginnings.fresh()

    def _kept_branch(
        self, begun: Beginning, known: Sequence[Branch], secrets_dir: Path | None
    ) -> tuple[BranchKeys, Branch] | None:
        """A branch whose root is kept and whose steps from here can be repeated bit for bit."""
        here = (begun.step, begun.digest)
        candidates = [each for each in reversed(known) if (each.start_step, each.origin) == here]
        candidates += [begun.branch] if begun.branch is not None else []
        found: list[BranchKeys] = []

        def look() -> int:
            """The number of the first that can be gone on with, from 1; 0 for none."""
            for number, branch in enumerate(candidates, 1):
                keys = self._keys_of(branch, secrets_dir)
                if keys is not None:
                    found.append(keys)
                    return number
            return 0

        number = self.topology.agreed(look)
        if not number:
            return None
        branch = candidates[number - 1]
        self.recipe, self.lane = self._recipe_of(branch), self._ways_of(branch)[0]
        return self.topology.agreed_keys(found[0] if found else None), branch

    def _keys_of(self, branch: Branch, secrets_dir: Path | None) -> BranchKeys | None:
        clipping = self.config.clipping
        if secrets_dir is None or branch.program is None:
            return None
        if not branch.computes_as(clipping.engine, clipping.microbatch_size):
            return None
        if not self._ways_of(branch):
            return None
        return BranchKeys.load(secrets_dir, branch.branch_id)

    def _ways_of(self, branch: Branch) -> list[Lane | None]:
        """Where this process would repeat a branch's steps bit for bit."""
        recipe = self._recipe_of(branch)
        return [lane for lane in self._ways if self._digest(recipe, lane) == branch.program]

    def _recipe_of(self, branch: Branch) -> Recipe:
        return dataclasses.replace(
            self.recipe, engine=branch.engine, microbatch_size=branch.microbatch_size
        )

    def _new_branch(self, begun: Beginning, secrets_dir: Path | None) -> Start:
        keys = self.topology.new_keys()
        if secrets_dir is not None and self.topology.leads:
            keys.save(secrets_dir)
        self._settle_engine(begun.state)
        self.lane = self._ways[0]
        branch = Branch(
            keys.branch_id,
            begun.step,
            origin=begun.digest,
            asked_microbatch_size=self.config.clipping.microbatch_size,
        )
        noise = start_noise(self.plan.noise_strategy, begun.state.params)
        return self._started(begun, noise, keys, self._as_computed(branch))

    def _started(self, begun: Beginning, noise: Any, keys: BranchKeys, branch: Branch) -> Start:
        state = self.topology.everywhere(begun.state._replace(noise=noise))
        return Start(state, begun.step, keys, branch)

    def _as_computed(self, branch: Branch) -> Branch:
        """A branch with how its steps are computed now."""
        return dataclasses.replace(
            branch,
            program=self._digest(self.recipe, self.lane),
            engine=self.recipe.engine,
            microbatch_size=self.recipe.microbatch_size,
        )

    def _settle_engine(self, state: TrainState) -> None:
        self.recipe = settled(
            self.recipe, state, self.frozen, self.runner.data, self.runner.capacity
        )

    def _digest(self, recipe: Recipe, lane: Lane | None) -> str:
        config = self.config
        # Where one of these differs, the same noise would be used for something else.
        schedule = None
        if config.learning_rate_schedule != "constant":
            schedule = config.iterations
        counting = None
        if config.evaluation.protection == "dp":
            counting = (config.evaluation, config.report_every_steps)
        trial = (config_digest(config), self.data.info.fingerprint, self.architecture)
        more = (self.placement, schedule, counting, trial, lane)
        return program_digest(recipe, self.topology, more)

    # -- training -----------------------------------------------------------------------------

    def advance(self, at: Start, stop: int, on_step: OnStep) -> Start:
        """Takes the steps up to ``stop``, with smaller microbatches if the memory is too short.

        Microbatches change neither the batch nor its noise, but rounding. So a branch that is
        gone on with keeps to its own, and fails where they do not fit. Only the first call
        shrinks them: all others want as much memory as that did.

        Raises:
            OutOfMemory: The microbatch does not fit, and may not or cannot be smaller.
        """
        # The state is donated, so it may be gone when the program fails.
        shrinks = self.may_shrink and not self.has_fitted
        spare = _copied(self.topology.here(at.state)) if shrinks else None
        state = at.state
        while True:
            try:
                state = self.runner.advance(
                    self.recipe, state, keys=at.keys, start=at.step, stop=stop, on_step=on_step
                )
                if not self.has_fitted:
                    jax.block_until_ready(state)
                break
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size = self.recipe.microbatch_size or self.runner.capacity
                if not shrinks or size == 1:
                    raise OutOfMemory(_too_large(size), microbatch_size=size) from error
            self.recipe = dataclasses.replace(self.recipe, microbatch_size=size // 2)
            LOGGER.warning("out of memory with %d at a time; going on with %d", size, size // 2)
            state = self.topology.everywhere(spare)
        self.has_fitted = True
        branch = self._as_computed(at.branch) if shrinks else at.branch
        return at._replace(state=state, step=stop, branch=branch)

    # -- what is told -------------------------------------------------------------------------

    def models(self, at: Start) -> dict[str, Any]:
        """The parameters that are measured: the last, and averages, by their fields' prefix."""
        state = self.topology.here(at.state)
        averages = {
            f"{name}_": state.averages[name] for name in (EMA, POLYAK) if name in state.averages
        }
        return {"": state.params, **averages}

    def utilities(self, at: Start) -> dict[str, Utility]:
        """Measures `models` on the held-out examples, exactly."""
        images, labels = self.eval_arrays()
        frozen = self.topology.here(self.frozen)
        return {
            prefix: evaluate(self.network, params, frozen, images, labels)
            for prefix, params in self.models(at).items()
        }

    def report(
        self,
        at: Start,
        charged: int,
        counts_charged: int,
        utilities: Mapping[str, Utility] | None = None,
    ) -> TrialReport:
        """Tells how good the parameters are after some steps, and what they have cost.

        Args:
            at: Where the trial is.
            charged: Iterations that have been charged by now.
            counts_charged: Noisy counts that have been charged by now.
            utilities: What `utilities` gives, where it is known; None to measure.
        """
        config = self.config
        state = self.topology.here(at.state)
        rng = at.keys.evaluation_rng(at.step)
        fields: dict[str, Any] = {}
        for prefix, utility in (utilities or self.utilities(at)).items():
            fields |= self._told(prefix, utility, rng)
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
            epsilon=self._epsilon(*self.spent_before, self.plan.mechanism.after(charged)),
            delta=config.target_delta,
            eval_epsilon=counting and self._epsilon(counting.after(counts_charged)),
            l2_clip_norm=float(state.l2_clip_norm),
            outcome=outcome,
            **fields,
        )

    def _told(self, prefix: str, utility: Utility, rng: np.random.Generator) -> dict[str, Any]:
        noise_multiplier = self.config.evaluation.noise_multiplier
        if noise_multiplier is not None:
            num_examples = len(self.eval_arrays()[1])
            utility = with_noise(utility, num_examples, noise_multiplier, rng)
        return {f"{prefix}eval_accuracy": utility.accuracy, f"{prefix}eval_loss": utility.loss}

    def eval_arrays(self) -> tuple[jax.Array, jax.Array]:
        """Images and labels of the held-out examples, on the device."""
        return _eval_on_device(self.data)

    def _epsilon(self, *spent: accounting.Mechanism) -> float:
        return accounting.epsilon_of_list(
            composed(spent), delta=self.config.target_delta, accountant=self.config.accountant
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
            "branch": at.branch,
            "parts": state_parts(self.config),
            "averages_start": self.averages_start,
            "spent_before": tuple(mechanism.to_json() for mechanism in self.spent_before),
        }

    def close(self) -> None:
        """Ends what runs in the background."""
        self.runner.close()


def _too_large(size: int) -> str:
    if size == 1:
        return (
            "out of memory with clipping.microbatch_size=1: allowed is a device with more memory, "
            "or a smaller model"
        )
    return (
        f"out of memory with clipping.microbatch_size={size}: allowed is a smaller one, which "
        "begins another branch where steps were taken with this one, or a device with more memory"
    )


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


# Drawing takes as long as many steps of a small model.
@functools.lru_cache(maxsize=1)
def _drawn(network: Network, image_shape: tuple[int, ...], seed: int) -> Parameters:
    """A network's first parameters, on the host."""
    return jax.tree.map(np.asarray, network.init(image_shape, seed))


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
