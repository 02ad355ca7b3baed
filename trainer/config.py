"""What one trial is: frozen, plain data that may cross a process boundary.

Nothing here imports JAX, so that a sweep's specification can be read and checked on a
machine that trains nothing. Every number is validated on construction: a config that exists
is a config that may run.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from trainer._validate import number, one_of, whole
from trainer.config_sections import (
    AugmentationConfig,
    AveragingConfig,
    EvaluationConfig,
    MechanismConfig,
)
from trainer.errors import ConfigError

ModelName = Literal[
    "logistic_regression",
    "mlp",
    "cnn",
    "resnet18",
    "resnet50",
    "wrn_16_4",
    "wrn_28_10",
    "wrn_40_4",
    "nf_resnet50",
    "vit_tiny",
    "vit_small",
    "vit_base",
]
ComputeType = Literal["float32", "bfloat16"]
TrainableName = Literal["all", "head", "biases", "lora"]
OptimizerName = Literal[
    "sgd",
    "momentum",
    "nesterov",
    "adam",
    "adamw",
    "lamb",
    "lars",
    "dp_adam_bc",
    "scale_then_privatize",
]
ScheduleName = Literal["constant", "linear", "cosine"]
ClippingModeName = Literal["flat", "per_layer", "automatic", "quantile"]
ClippingEngine = Literal["auto", "vmap", "two_pass", "book_keeping"]
Scaling = Literal["unit_norm", "per_image_standardization", "divide_by_255"]
Placement = Literal["auto", "device", "streamed"]
NeighboringRelation = Literal["zero_out", "add_or_remove_one"]
Accountant = Literal["pld", "rdp"]

# Models whose only dense layer is the head, so that no layer is left for a low-rank update.
WITHOUT_INNER_DENSE = frozenset(
    {
        "logistic_regression",
        "cnn",
        "resnet18",
        "resnet50",
        "wrn_16_4",
        "wrn_28_10",
        "wrn_40_4",
        "nf_resnet50",
    }
)

# A TFDS name: name[/config][:version]. It becomes part of a path, so nothing else may pass.
DATASET_NAME_PATTERN = r"^[a-z][a-z0-9_]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?(:\d+\.\d+\.\d+)?$"

# Draws compare 32 random bits with the probability (`trainer.mechanism.sampling`).
LEAST_SAMPLING_PROB = 2.0**-32
# A user model: package.module:attribute. It is imported, so nothing but names may pass.
USER_MODEL_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$"
MAX_USER_MODEL_CHARS = 200

# What the accountant answers for; below it rounding would rival delta itself.
_LEAST_DELTA = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples a trial learns from and is measured on.

    Attributes:
        name: TFDS name, ``name[/config][:version]``.
        data_dir: TFDS data directory. None searches the usual places (`trainer.data.datasets`).
        train_split: TFDS split expression of the protected training examples.
        eval_split: TFDS split expression of the held-out examples, which are treated as public.
        scaling: How an example's pixels become model inputs. Each choice reads one example
            alone, so it does not touch the guarantee.
        placement: Where the training examples are kept: ``device`` in the devices' memory,
            ``streamed`` on disk, read as they are drawn; ``auto`` takes the former where they
            fit. It does not touch the mechanism.
        user_feature: Name of the feature that says whose example it is. Given, users are
            protected, each with all their examples; None protects examples.
    """

    name: str
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    scaling: Scaling = "unit_norm"
    placement: Placement = "auto"
    user_feature: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(DATASET_NAME_PATTERN, self.name):
            raise ConfigError(
                f"data.name={self.name!r}: allowed is a TFDS name such as 'digits' or "
                "'cifar10:3.0.2'"
            )
        one_of("data.scaling", self.scaling, get_args(Scaling))
        one_of("data.placement", self.placement, get_args(Placement))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model of a trial.

    Attributes:
        name: One of `ModelName`, or ``package.module:attribute`` for a model of the user's own
            (`trainer.models.user_models`). Nothing is imported to check it.
        hidden_sizes: Widths of the hidden layers of ``mlp``; each >= 1.
        channels: Widths of the convolutions of ``cnn``; each >= 1.
        init_from: File or directory of weights that start the trial, or None for a fresh
            initialisation (`trainer.weights.initial_weights`). They must be public with respect to
            the protected data.
        init_is_public: Says so of weights that do not tell what they were trained on: all but
            checkpoints of this package.
        fresh_head: Whether the head starts afresh even where ``init_from`` has one that fits.
        trainable: What is trained, one of `TrainableName` (`trainer.models.network`).
        lora_rank: Rank of the update of each layer, >= 1; read where ``trainable`` is ``lora``.
        head_init_scale: What the kernel of a fresh head is multiplied with, >= 0.
        dtype: Type that the model computes in, one of `ComputeType`. Parameters, logits, losses,
            gradient norms and sums are float32 either way. A user model chooses its own.
    """

    name: str
    hidden_sizes: tuple[int, ...] = (64,)
    channels: tuple[int, ...] = (16, 32)
    init_from: str | None = None
    init_is_public: bool = False
    fresh_head: bool = False
    trainable: TrainableName = "all"
    lora_rank: int = 8
    head_init_scale: float = 1.0
    dtype: ComputeType = "float32"

    def __post_init__(self) -> None:
        if not is_user_model(self.name) and self.name not in get_args(ModelName):
            names = ", ".join(get_args(ModelName))
            raise ConfigError(
                f"model.name={self.name!r}: allowed is one of {names}, or "
                "package.module:attribute for a model of your own"
            )
        one_of("model.dtype", self.dtype, get_args(ComputeType))
        if is_user_model(self.name) and self.dtype != "float32":
            raise ConfigError(
                f"model.dtype={self.dtype!r}: allowed is float32 with model.name={self.name!r}, "
                "for a user model chooses itself what it computes in"
            )
        for field in ("hidden_sizes", "channels"):
            sizes = getattr(self, field)
            if not isinstance(sizes, tuple) or not sizes:
                raise ConfigError(f"model.{field}={sizes!r}: allowed is a non-empty tuple")
            for size in sizes:
                whole(f"model.{field}", size, least=1)
        one_of("model.trainable", self.trainable, get_args(TrainableName))
        whole("model.lora_rank", self.lora_rank, least=1)
        number("model.head_init_scale", self.head_init_scale, low=0.0, or_low=True)
        for field in ("init_is_public", "fresh_head"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(
                    f"model.{field}={getattr(self, field)!r}: allowed is true or false"
                )
        for field, words in contradictions(self):
            raise ConfigError(f"model.{field}={getattr(self, field)!r}: {words}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippingConfig:
    """How per-example gradients are clipped, and how that is computed.

    Every mode bounds what one example adds to the sum by the clip norm, so all are accounted
    alike. `quantile` moves that clip norm from step to step (Andrew et al. 2021,
    "Differentially Private Learning with Adaptive Clipping", arXiv 1905.03871); the three
    numbers below are read in that mode alone.

    Attributes:
        mode: ``flat``, ``per_layer`` or ``automatic`` (`trainer.clipping`) with a fixed clip
            norm, or ``quantile``: flat, with a clip norm that follows a quantile of the norms.
        target_quantile: Fraction of gradients that the clip norm should leave unclipped, in
            (0, 1); the paper's gamma.
        learning_rate: Step size of the clip norm's geometric update, > 0; the paper's eta_C.
        count_noise_stddev: Noise on the number of unclipped gradients in a step, > 0; the
            paper's sigma_b. None is ``expected_batch_size / 20``, as the paper suggests.
        engine: How gradients are computed. Neither this nor the next touches the mechanism.
        microbatch_size: Examples processed at a time, >= 1; None lets the engine choose.
    """

    mode: ClippingModeName = "flat"
    target_quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise_stddev: float | None = None
    engine: ClippingEngine = "auto"
    microbatch_size: int | None = None

    def __post_init__(self) -> None:
        one_of("clipping.mode", self.mode, get_args(ClippingModeName))
        one_of("clipping.engine", self.engine, get_args(ClippingEngine))
        number("clipping.target_quantile", self.target_quantile, low=0.0, high=1.0, or_high=False)
        number("clipping.learning_rate", self.learning_rate, low=0.0)
        if self.count_noise_stddev is not None:
            number("clipping.count_noise_stddev", self.count_noise_stddev, low=0.0)
        if self.microbatch_size is not None:
            whole("clipping.microbatch_size", self.microbatch_size, least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """One configuration of one trial.

    Attributes:
        data: The data set.
        model: The model.
        optimizer: One of `OptimizerName`, as in optax.
        learning_rate: Step size, > 0; the largest of a schedule.
        weight_decay: Decoupled weight decay, >= 0 (`trainer.training.optimizers`).
        learning_rate_schedule: How the learning rate falls, one of `ScheduleName`
            (`trainer.training.schedules`).
        warmup_steps: Steps over which the learning rate rises first, >= 0.
        l2_clip_norm: Bound on one example's gradient norm, > 0; with `quantile` clipping the
            first of them.
        noise_multiplier: Noise standard deviation / sensitivity, > 0, of everything that a
            step releases together.
        sampling_prob: Probability with which each unit (example, or user) joins a batch, in
            [2^-32, 1]; where noise is banded, each unit of the step's group.
        expected_batch_size: Divisor of the noisy sum, > 0: a public number, never the
            realised batch size.
        iterations: How often the mechanism runs, >= 1.
        report_every_steps: Steps between two reports, >= 1.
        target_delta: The delta at which epsilon is reported, in [1e-10, 1).
        accountant: ``pld`` or ``rdp``.
        neighboring_relation: Which data sets count as neighbours.
        seed: Steers initialisation alone; noise and sampling never see it.
        clipping: How gradients are clipped.
        mechanism: What is drawn and what noise is added.
        augmentation: Views of an example.
        averaging: Averages of the iterates.
        evaluation: How the evaluation examples are protected.
    """

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerName
    learning_rate: float
    l2_clip_norm: float
    noise_multiplier: float
    sampling_prob: float
    expected_batch_size: float
    iterations: int
    report_every_steps: int
    target_delta: float
    accountant: Accountant = "pld"
    neighboring_relation: NeighboringRelation = "zero_out"
    seed: int = 0
    weight_decay: float = 0.0
    learning_rate_schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    clipping: ClippingConfig = dataclasses.field(default_factory=ClippingConfig)
    mechanism: MechanismConfig = dataclasses.field(default_factory=MechanismConfig)
    augmentation: AugmentationConfig = dataclasses.field(default_factory=AugmentationConfig)
    averaging: AveragingConfig = dataclasses.field(default_factory=AveragingConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        one_of("optimizer", self.optimizer, get_args(OptimizerName))
        one_of("accountant", self.accountant, get_args(Accountant))
        one_of("neighboring_relation", self.neighboring_relation, get_args(NeighboringRelation))
        for field in ("learning_rate", "l2_clip_norm", "noise_multiplier"):
            number(field, getattr(self, field), low=0.0)
        number("sampling_prob", self.sampling_prob, low=LEAST_SAMPLING_PROB, high=1.0, or_low=True)
        number("expected_batch_size", self.expected_batch_size, low=0.0)
        number("target_delta", self.target_delta, low=0.0, high=1.0)
        if not _LEAST_DELTA <= self.target_delta < 1:
            raise ConfigError(
                f"target_delta={self.target_delta!r}: allowed is a number in [{_LEAST_DELTA:g}, 1)"
            )
        for field in ("iterations", "report_every_steps"):
            whole(field, getattr(self, field), least=1)
        for field in ("seed", "warmup_steps"):
            whole(field, getattr(self, field), least=0)
        one_of("learning_rate_schedule", self.learning_rate_schedule, get_args(ScheduleName))
        number("weight_decay", self.weight_decay, low=0.0, or_low=True)
        self._check_count_leaves_something()
        self._check_mechanism()

    @property
    def privacy_unit(self) -> Literal["example", "user"]:
        """Whose data is protected."""
        return "example" if self.data.user_feature is None else "user"

    @property
    def counts_per_report(self) -> int:
        """How many models a report measures: the last iterate and each average."""
        return 1 + (self.averaging.ema_decay is not None) + self.averaging.polyak

    @property
    def count_noise_stddev(self) -> float | None:
        """Noise on a step's number of unclipped gradients; None where none is released."""
        if self.clipping.mode != "quantile":
            return None
        given = self.clipping.count_noise_stddev
        return self.expected_batch_size / 20 if given is None else given

    def _check_count_leaves_something(self) -> None:
        """The count alone must cost less than a step may (`plan.noise_of_gradients`)."""
        stddev, least = self.count_noise_stddev, self.noise_multiplier / 2
        if stddev is not None and not stddev > least:
            origin = "" if self.clipping.count_noise_stddev else " (expected_batch_size / 20)"
            raise ConfigError(
                f"clipping.count_noise_stddev={stddev!r}{origin}: allowed is a number "
                f"> {least:g}, half of noise_multiplier={self.noise_multiplier!r}; with less, the "
                "count alone would cost all that a step may, and leave nothing for the gradients"
            )

    def _check_mechanism(self) -> None:
        """What the mechanisms cannot be combined with, or need."""
        mechanism = self.mechanism
        if mechanism.bands > self.iterations:
            raise ConfigError(
                f"mechanism.bands={mechanism.bands}: allowed is at most iterations="
                f"{self.iterations}"
            )
        if mechanism.bands > 1:
            # Both reckon with noise of one scale that is independent from step to step.
            for field, value, refused in (
                ("clipping.mode", self.clipping.mode, "quantile"),
                ("optimizer", self.optimizer, "dp_adam_bc"),
            ):
                if value == refused:
                    raise ConfigError(
                        f"{field}={value!r}: allowed with mechanism.bands={mechanism.bands} is "
                        "another, for this one needs noise that is independent in every step"
                    )
        truncated = mechanism.truncated_batch_size is not None
        if truncated and self.neighboring_relation != "zero_out":
            raise ConfigError(
                f"neighboring_relation={self.neighboring_relation!r}: allowed with "
                "mechanism.truncated_batch_size is zero_out, for its cost depends on the number "
                "of units"
            )
        if truncated and self.accountant != "pld":
            raise ConfigError(
                f"accountant={self.accountant!r}: allowed with mechanism.truncated_batch_size is "
                "pld"
            )
        if self.evaluation.protection == "dp":
            # What is reckoned is an example's share of a count among a public number of them.
            for field, value, allowed in (
                ("neighboring_relation", self.neighboring_relation, "zero_out"),
                ("data.user_feature", self.data.user_feature, None),
            ):
                if value != allowed:
                    raise ConfigError(
                        f"{field}={value!r}: allowed with evaluation.protection dp is {allowed}"
                    )
        if (mechanism.examples_per_user is None) != (self.data.user_feature is None):
            raise ConfigError(
                f"mechanism.examples_per_user={mechanism.examples_per_user!r}: allowed is a whole "
                "number >= 1 with data.user_feature, and none without"
            )

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "TrialConfig":
        """The configuration that `to_json` gave.

        Raises:
            ConfigError: If a field is unknown, missing or not allowed.
        """
        try:
            model = dict(data["model"])
            for sizes in ("hidden_sizes", "channels"):
                model[sizes] = tuple(model[sizes])
            sections = {
                "data": DataConfig(**data["data"]),
                "model": ModelConfig(**model),
                # What was written before there was a choice was clipped flat.
                "clipping": ClippingConfig(**data.get("clipping", {})),
                "mechanism": MechanismConfig(**data.get("mechanism", {})),
                "augmentation": AugmentationConfig(**data.get("augmentation", {})),
                "averaging": AveragingConfig(**data.get("averaging", {})),
                "evaluation": EvaluationConfig(**data.get("evaluation", {})),
            }
            if "weight_decay" not in data:
                sections["weight_decay"] = fixed_weight_decay(data["optimizer"])
            return cls(**{**data, **sections})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a trial's configuration: {error}") from error


def contradictions(model: Any) -> Iterator[tuple[str, str]]:
    """What a model's section asks for and nothing would read, or the model has not.

    Args:
        model: A `ModelConfig`, or another object with its attributes.

    Yields:
        The field, and why it has no effect and what is allowed instead.
    """
    if model.trainable == "lora" and model.name in WITHOUT_INNER_DENSE:
        yield (
            "trainable",
            f"{model.name} has no dense layer besides its head to update; allowed: all, head or "
            "biases",
        )
    rank = ModelConfig.lora_rank
    if model.trainable != "lora" and model.lora_rank != rank:
        yield (
            "lora_rank",
            f"nothing reads it with trainable {model.trainable}; allowed: {rank}, or trainable "
            "lora",
        )
    if model.init_from is None:
        for field in ("init_is_public", "fresh_head"):
            if getattr(model, field):
                yield (
                    field,
                    "nothing reads it without init_from; allowed: false, or a path in init_from",
                )


def is_user_model(name: str) -> bool:
    """Whether a model's name is the import path of a user model."""
    return len(name) <= MAX_USER_MODEL_CHARS and bool(re.fullmatch(USER_MODEL_PATTERN, name))


def fixed_weight_decay(optimizer: str) -> float:
    """The weight decay that an optimizer had before it could be chosen."""
    return 1e-4 if optimizer == "adamw" else 0.0
