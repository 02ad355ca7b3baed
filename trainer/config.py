"""What one trial is: frozen, plain data that may cross a process boundary.

Nothing here imports JAX, so that a sweep's specification can be read and checked on a
machine that trains nothing. Every number is validated on construction: a config that exists
is a config that may run.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from trainer.errors import ConfigError

ModelName = Literal[
    "logistic_regression",
    "mlp",
    "cnn",
    "resnet18",
    "wrn_16_4",
    "wrn_40_4",
    "vit_tiny",
    "vit_small",
    "vit_base",
]
OptimizerName = Literal["sgd", "momentum", "nesterov", "adam", "adamw", "lamb", "lars"]
ScheduleName = Literal["constant", "linear", "cosine"]
ClippingModeName = Literal["flat", "per_layer", "automatic", "quantile"]
ClippingEngine = Literal["auto", "vmap", "two_pass", "book_keeping"]
Scaling = Literal["unit_norm", "per_image_standardization", "divide_by_255"]
NeighboringRelation = Literal["zero_out", "add_or_remove_one"]
Accountant = Literal["pld", "rdp"]

# A TFDS name: name[/config][:version]. It becomes part of a path, so nothing else may pass.
DATASET_NAME_PATTERN = r"^[a-z][a-z0-9_]*(/[A-Za-z0-9_][A-Za-z0-9_.\-]*)?(:\d+\.\d+\.\d+)?$"

# What the accountant answers for; below it rounding would rival delta itself.
_LEAST_DELTA = 1e-10


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples a trial learns from and is measured on.

    Attributes:
        name: TFDS name, ``name[/config][:version]``.
        data_dir: TFDS data directory. None searches the usual places (`trainer.datasets`).
        train_split: TFDS split expression of the protected training examples.
        eval_split: TFDS split expression of the held-out examples, which are treated as public.
        scaling: How an example's pixels become model inputs. Each choice reads one example
            alone, so it does not touch the guarantee.
    """

    name: str
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    scaling: Scaling = "unit_norm"

    def __post_init__(self) -> None:
        if not re.fullmatch(DATASET_NAME_PATTERN, self.name):
            raise ConfigError(
                f"data.name={self.name!r}: allowed is a TFDS name such as 'digits' or "
                "'cifar10:3.0.2'"
            )
        _one_of("data.scaling", self.scaling, get_args(Scaling))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model of a trial.

    Attributes:
        name: One of `ModelName`.
        hidden_sizes: Widths of the hidden layers of ``mlp``; each >= 1.
        channels: Widths of the convolutions of ``cnn``; each >= 1.
        init_from: Directory of a checkpoint whose parameters start the trial, or None for a
            fresh initialisation. They must be public with respect to the protected data.
    """

    name: ModelName
    hidden_sizes: tuple[int, ...] = (64,)
    channels: tuple[int, ...] = (16, 32)
    init_from: str | None = None

    def __post_init__(self) -> None:
        _one_of("model.name", self.name, get_args(ModelName))
        for field in ("hidden_sizes", "channels"):
            sizes = getattr(self, field)
            if not isinstance(sizes, tuple) or not sizes:
                raise ConfigError(f"model.{field}={sizes!r}: allowed is a non-empty tuple")
            for size in sizes:
                _whole(f"model.{field}", size, least=1)


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
        _one_of("clipping.mode", self.mode, get_args(ClippingModeName))
        _one_of("clipping.engine", self.engine, get_args(ClippingEngine))
        _number("clipping.target_quantile", self.target_quantile, low=0.0, high=1.0)
        if self.target_quantile == 1:
            raise ConfigError(
                f"clipping.target_quantile={self.target_quantile!r}: allowed is a number in (0, 1)"
            )
        _number("clipping.learning_rate", self.learning_rate, low=0.0)
        if self.count_noise_stddev is not None:
            _number("clipping.count_noise_stddev", self.count_noise_stddev, low=0.0)
        if self.microbatch_size is not None:
            _whole("clipping.microbatch_size", self.microbatch_size, least=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialConfig:
    """One configuration of one trial.

    Attributes:
        data: The data set.
        model: The model.
        optimizer: One of `OptimizerName`, as in optax.
        learning_rate: Step size, > 0; the largest of a schedule.
        weight_decay: Decoupled weight decay, >= 0 (`trainer.optimizers`).
        learning_rate_schedule: How the learning rate falls, one of `ScheduleName`
            (`trainer.schedules`).
        warmup_steps: Steps over which the learning rate rises first, >= 0.
        l2_clip_norm: Bound on one example's gradient norm, > 0; with `quantile` clipping the
            first of them.
        noise_multiplier: Noise standard deviation / sensitivity, > 0, of everything that a
            step releases together.
        sampling_prob: Probability with which each example joins a batch, in (0, 1].
        expected_batch_size: Divisor of the noisy sum, > 0: a public number, never the
            realised batch size.
        iterations: How often the mechanism runs, >= 1.
        report_every_steps: Steps between two reports, >= 1.
        target_delta: The delta at which epsilon is reported, in [1e-10, 1).
        accountant: ``pld`` or ``rdp``.
        neighboring_relation: Which data sets count as neighbours.
        seed: Steers initialisation alone; noise and sampling never see it.
        clipping: How gradients are clipped.
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

    def __post_init__(self) -> None:
        _one_of("optimizer", self.optimizer, get_args(OptimizerName))
        _one_of("accountant", self.accountant, get_args(Accountant))
        _one_of("neighboring_relation", self.neighboring_relation, get_args(NeighboringRelation))
        for field in ("learning_rate", "l2_clip_norm", "noise_multiplier"):
            _number(field, getattr(self, field), low=0.0)
        _number("sampling_prob", self.sampling_prob, low=0.0, high=1.0)
        _number("expected_batch_size", self.expected_batch_size, low=0.0)
        _number("target_delta", self.target_delta, low=0.0, high=1.0)
        if not _LEAST_DELTA <= self.target_delta < 1:
            raise ConfigError(
                f"target_delta={self.target_delta!r}: allowed is a number in [{_LEAST_DELTA:g}, 1)"
            )
        for field in ("iterations", "report_every_steps"):
            _whole(field, getattr(self, field), least=1)
        for field in ("seed", "warmup_steps"):
            _whole(field, getattr(self, field), least=0)
        _one_of("learning_rate_schedule", self.learning_rate_schedule, get_args(ScheduleName))
        _number("weight_decay", self.weight_decay, low=0.0, or_low=True)
        self._check_count_leaves_something()

    @property
    def count_noise_stddev(self) -> float | None:
        """Noise on a step's number of unclipped gradients; None where none is released."""
        if self.clipping.mode != "quantile":
            return None
        given = self.clipping.count_noise_stddev
        return self.expected_batch_size / 20 if given is None else given

    def _check_count_leaves_something(self) -> None:
        """The count alone must cost less than a step may (`trainer.plan.noise_of_gradients`)."""
        stddev, least = self.count_noise_stddev, self.noise_multiplier / 2
        if stddev is not None and not stddev > least:
            origin = "" if self.clipping.count_noise_stddev else " (expected_batch_size / 20)"
            raise ConfigError(
                f"clipping.count_noise_stddev={stddev!r}{origin}: allowed is a number "
                f"> {least:g}, half of noise_multiplier={self.noise_multiplier!r}; with less, the "
                "count alone would cost all that a step may, and leave nothing for the gradients"
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
            }
            if "weight_decay" not in data:
                sections["weight_decay"] = fixed_weight_decay(data["optimizer"])
            return cls(**{**data, **sections})
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a trial's configuration: {error}") from error


def fixed_weight_decay(optimizer: str) -> float:
    """The weight decay that an optimizer had before it could be chosen."""
    return 1e-4 if optimizer == "adamw" else 0.0


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field}={value!r}: allowed is one of {', '.join(allowed)}")


def _number(
    field: str, value: object, *, low: float, high: float = math.inf, or_low: bool = False
) -> None:
    """Accepts finite numbers in (low, high], and low itself with ``or_low``."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if ok and (low < value <= high or (or_low and value == low)):  # type: ignore[operator]
        return
    bound = f"in {'[' if or_low else '('}{low:g}, {high:g}]"
    if not math.isfinite(high):
        bound = f">{'=' if or_low else ''} {low:g}"
    raise ConfigError(f"{field}={value!r}: allowed is a finite number {bound}")


def _whole(field: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{field}={value!r}: allowed is a whole number >= {least}")
