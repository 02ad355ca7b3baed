"""What a team asks for: the specification of one sweep.

A `SweepSpec` is read by `sweeps.spec.reading`. It fails closed: an unknown key, a missing privacy
field, a number in quotes, NaN, or two fields that contradict each other are refused.

What the fields must satisfy together:

- ``report_every_steps`` <= the fewest iterations, so that every trial reports before it ends.
- Schedulers prune only at reports and only before the last step (`scheduler_refusals`).
- ``data.declared_num_examples`` is given exactly where the neighbouring relation hides the data
  set's size, and no batch is then larger than it.
- The mechanism is one that the rest can be combined with (`sweeps.spec.mechanism_spec`).
- Nothing voids the policy of the privacy section (`_policy_refusals`).
- The two splits share no example: metrics of the evaluation split are shown as they are.
- What comes first (``search.points_to_evaluate``) lies in the search space, and a search that
  learns goes with the policy.
- The sweep has at most `MAX_TRIALS` trials.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import Field, WithJsonSchema, model_validator

from accounting import PrivacyUnit
from sweeps.spec.augmentation_spec import AugmentationSpec
from sweeps.spec.averaging_spec import AveragingSpec
from sweeps.spec.clipping_spec import ClippingSpec
from sweeps.spec.domains import CALIBRATED, FULL, MAX_WHOLE
from sweeps.spec.mechanism_spec import MechanismSpec, mechanism_refusals
from sweeps.spec.privacy_spec import PrivacySpec
from sweeps.spec.proxy_spec import ProxySpec, proxy_refusals
from sweeps.spec.refusals import Allowed, Refusal, one_of, refused
from sweeps.spec.resources_spec import ResourcesSpec, resource_refusals
from sweeps.spec.scheduler_spec import (
    FifoSpec,
    SchedulerSpec,
    population_refusals,
    scheduler_refusals,
)
from sweeps.spec.search_spec import MAX_TRIALS, OptunaSpec, RandomSpec, SearchSpec
from sweeps.spec.section import PositiveWhole, Section, Seed, YesOrNo
from sweeps.spec.space_spec import SearchSpace
from sweeps.spec.splits import SPLIT_PATTERN, may_overlap
from sweeps.spec.stop_spec import StopSpec
from trainer.config import (
    DATASET_NAME_PATTERN,
    MAX_USER_MODEL_CHARS,
    USER_MODEL_PATTERN,
    ComputeType,
    ModelName,
    Placement,
    Scaling,
    TrainableName,
    contradictions,
    is_user_model,
)

_NO_CONTROL_CHARACTERS = r"^[^\x00-\x1f\x7f]+$"

_Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_WHOLE)], ...],
    # Strictness would refuse a list for a tuple; the numbers inside stay strict.
    Field(min_length=1, strict=False),
    Allowed("a list of one or more whole numbers >= 1"),
]
_MODELS = get_args(ModelName)
_Model = Annotated[
    str,
    Field(
        max_length=MAX_USER_MODEL_CHARS, pattern=f"^({'|'.join(_MODELS)})$|{USER_MODEL_PATTERN}"
    ),
    # The same, in a form from which an editor can complete the names.
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": list(_MODELS)},
                {
                    "type": "string",
                    "maxLength": MAX_USER_MODEL_CHARS,
                    "pattern": USER_MODEL_PATTERN,
                },
            ]
        }
    ),
    Allowed(f"one of {', '.join(_MODELS)}, or package.module:attribute for a model of your own"),
]
_PathOrNull = Annotated[
    Annotated[str, Field(max_length=4096, pattern=_NO_CONTROL_CHARACTERS)] | None,
    Allowed("null or a path"),
]
_Split = Annotated[
    str,
    Field(max_length=256, pattern=SPLIT_PATTERN),
    Allowed("a TFDS split such as train, train[:80%] or train[1000:]+validation"),
]


# --- The sections --------------------------------------------------------------------------


class DataSpec(Section):
    """The protected examples, and the public ones on which trials are measured."""

    name: Annotated[
        str,
        Field(max_length=200, pattern=DATASET_NAME_PATTERN),
        Allowed("a TFDS name such as digits or cifar10:3.0.2"),
    ] = Field(description="TFDS name: name[/config][:version].")
    data_dir: _PathOrNull = Field(
        default=None, description="TFDS data directory; null searches the usual places."
    )
    train_split: _Split = Field(
        default="train", description="TFDS split of the protected training examples."
    )
    eval_split: _Split = Field(
        default="test",
        description="TFDS split of the evaluation examples. They are treated as public, so "
        "none of them may be a training example.",
    )
    scaling: Annotated[Scaling, one_of(Scaling)] = Field(
        default="unit_norm",
        description="How one example's pixels become inputs; reads that example alone.",
    )
    placement: Annotated[Placement, one_of(Placement)] = Field(
        default="auto",
        description="Where training examples are kept: device, in the devices' memory; streamed, "
        "on disk, read as they are drawn; auto takes the former where they fit.",
    )
    user_feature: Annotated[
        Annotated[str, Field(min_length=1, max_length=256, pattern=_NO_CONTROL_CHARACTERS)] | None,
        Allowed("null or a feature's name"),
    ] = Field(
        default=None,
        description="Feature that says whose example it is. Users are then protected, each with "
        "all their examples, and every number is one of users; null protects single examples.",
    )
    declared_num_examples: Annotated[
        Annotated[int, Field(ge=1, le=MAX_WHOLE)] | None,
        Allowed("null or a whole number >= 1"),
    ] = Field(
        default=None,
        description="A public number to reckon with instead of the data set's size, chosen "
        "without looking at the data. Required with add_or_remove_one, where the size itself is "
        "protected; not allowed with zero_out, where it is public. With user_feature a number of "
        "users.",
    )


class ModelSpec(Section):
    """The model that every trial trains."""

    name: _Model = Field(
        description="Which model; package.module:attribute is one of your own, which is called "
        "with the number of classes and gives a Flax module."
    )
    hidden_sizes: _Sizes = Field(default=(64,), description="Widths of mlp's hidden layers.")
    channels: _Sizes = Field(default=(16, 32), description="Widths of cnn's convolutions.")
    init_from: _PathOrNull = Field(
        default=None,
        description="Weights that start each trial: a checkpoint directory of a sweep or of "
        "Orbax, an .npz or a .safetensors file; null initialises afresh. They must be public "
        "with respect to the protected data.",
    )
    init_is_public: YesOrNo = Field(
        default=False,
        description="Says that the weights of init_from were not trained on the protected data. "
        "Required for all but checkpoints of a sweep, which tell what they were trained on.",
    )
    fresh_head: YesOrNo = Field(
        default=False,
        description="Starts the last layer afresh even where init_from has one that fits.",
    )
    trainable: Annotated[TrainableName, one_of(TrainableName)] = Field(
        default="all",
        description="What is trained. head: the last layer. biases: every bias, and the head. "
        "lora: a low-rank update of each other dense layer, and the head.",
    )
    lora_rank: PositiveWhole = Field(default=8, description="For lora: the rank of each update.")
    head_init_scale: Annotated[float, Field(ge=0), Allowed("a number >= 0")] = Field(
        default=1.0,
        description="What the weights of a fresh head are multiplied with, its biases excepted.",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> "ModelSpec":
        refusals: list[Refusal] = []
        for field, why in contradictions(self):
            value = getattr(self, field)
            shown = repr(value) if isinstance(value, str) else json.dumps(value)
            refusals.append(Refusal((field,), f"{shown} is not allowed: {why}"))
        if refusals:
            raise refused(*refusals)
        return self

    dtype: Annotated[ComputeType, one_of(ComputeType)] = Field(
        default="float32",
        description="Type that the model computes in; parameters, logits, losses, norms and sums "
        "are float32 either way. A model of your own chooses by itself.",
    )


class SweepSpec(Section):
    """One sweep: data, model, guarantee, and the configurations to try."""

    # Not Literal[1], which takes true and 1.0 for 1.
    version: Annotated[int, Field(ge=1, le=1), Allowed("1")] = Field(
        description="Version of this format."
    )
    name: Annotated[
        str,
        Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$"),
        Allowed("1 to 64 of a-z, 0-9, _ and -, beginning with a letter or digit"),
    ] = Field(description="The sweep's name.")
    data: DataSpec
    model: ModelSpec
    privacy: PrivacySpec
    search_space: SearchSpace
    clipping: ClippingSpec = ClippingSpec()
    mechanism: MechanismSpec = MechanismSpec()
    augmentation: AugmentationSpec = AugmentationSpec()
    averaging: AveragingSpec = AveragingSpec()
    proxy: ProxySpec = ProxySpec()
    search: SearchSpec = Field(
        default=RandomSpec(), description="Where the sweep's configurations come from."
    )
    scheduler: SchedulerSpec = Field(
        default=FifoSpec(name="fifo"), description="Whether and when trials are pruned."
    )
    stop: StopSpec = StopSpec()
    report_every_steps: PositiveWhole = Field(
        default=25, description="Steps between two reports; at most the fewest iterations."
    )
    seed: Seed = Field(
        default=0, description="Seed of the model's initialisation; never of noise or sampling."
    )
    resources: ResourcesSpec = ResourcesSpec()

    @property
    def num_listed(self) -> int:
        """How many configurations are known before anything runs."""
        search = self.search
        if isinstance(search, OptunaSpec):
            first = max(search.n_startup_trials, len(search.points_to_evaluate))
            return min(first, search.num_samples)
        points = search.points_to_evaluate[: search.num_samples]
        size = self.search_space.num_listed
        return sum(map(size, points)) + size({}) * (search.num_samples - len(points))

    @property
    def real(self) -> "SweepSpec":
        """The same, but that trials run what the search space says."""
        return self.model_copy(update={"proxy": ProxySpec()})

    @property
    def privacy_unit(self) -> PrivacyUnit:
        """Whose data is protected."""
        return "example" if self.data.user_feature is None else "user"

    def canonical_json(self) -> str:
        """The one JSON text of this specification, defaults included; `parse_spec` reads it."""
        return json.dumps(
            self.model_dump(mode="json"),
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
            allow_nan=False,
        )

    def spec_hash(self) -> str:
        """SHA-256 of the canonical JSON, in hexadecimal.

        Layout, comments and spelled-out defaults leave it unchanged, and so does 8 for 8.0.
        """
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    @model_validator(mode="after")
    def _fields_agree(self) -> "SweepSpec":
        checks = (
            _size_refusals,
            _model_refusals,
            _split_refusals,
            _mechanism_refusals,
            _proxy_refusals,
            _pace_refusals,
            _search_refusals,
            _policy_refusals,
            _resource_refusals,
        )
        refusals = [refusal for check in checks for refusal in check(self)]
        if not refusals and self.num_listed * self.search.repeats > MAX_TRIALS:
            product = "search.num_samples" + " times search.repeats" * (self.search.repeats > 1)
            message = (
                f"the grid times {product} gives {self.num_listed * self.search.repeats} trials; "
                f"allowed: at most {MAX_TRIALS}"
            )
            refusals.append(Refusal(("search_space",), message, at_key=True))
        if refusals:
            raise refused(*refusals)
        return self


# --- What the fields must satisfy together -------------------------------------------------


def _size_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    declared = spec.data.declared_num_examples
    path = ("data", "declared_num_examples")
    if spec.privacy.neighboring_relation == "zero_out":
        if declared is not None:
            message = (
                f"{declared} is not allowed; allowed: null, for under zero_out the data set's "
                "size is public and the real one is used"
            )
            yield Refusal(path, message)
        return
    if declared is None:
        message = (
            "is missing; allowed: a whole number >= 1. Under add_or_remove_one the data set's "
            "real size is protected, so give a public number chosen without looking at the data"
        )
        yield Refusal(path, message)
        return
    numbers = [v for v in spec.search_space.expected_batch_size.values if v != FULL]
    largest = spec.search_space.expected_batch_size.bounds()[1] if numbers else 0.0
    if largest > declared:
        message = (
            f"{largest:g} exceeds the {declared} declared {spec.privacy_unit}s; allowed: at most "
            "that"
        )
        yield Refusal(("search_space", "expected_batch_size"), message)


def _model_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    name, dtype = spec.model.name, spec.model.dtype
    if is_user_model(name) and dtype != "float32":
        message = f"{dtype} is not allowed with {name}, which chooses itself; allowed: float32"
        yield Refusal(("model", "dtype"), message)


def _split_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    train, held_out = spec.data.train_split, spec.data.eval_split
    if may_overlap(train, held_out):
        message = (
            f"{held_out!r} may share examples with the train_split {train!r}; allowed: a split "
            "without training examples, for its metrics are shown as they are"
        )
        yield Refusal(("data", "eval_split"), message)


def _mechanism_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    space = spec.search_space
    return mechanism_refusals(
        spec.mechanism,
        privacy=spec.privacy,
        user_feature=spec.data.user_feature,
        clipping_mode=spec.clipping.mode,
        optimizer=space.optimizer,
        expected_batch_size=space.expected_batch_size,
        iterations=space.iterations,
    )


def _proxy_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    return proxy_refusals(
        spec.proxy,
        mechanism=spec.mechanism,
        clipping_mode=spec.clipping.mode,
        expected_batch_size=spec.search_space.expected_batch_size,
        noise_multiplier=spec.search_space.noise_multiplier,
    )


def _pace_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    fewest, most = (int(bound) for bound in spec.search_space.iterations.bounds())
    every = spec.report_every_steps
    if every > fewest:
        origin = "" if "report_every_steps" in spec.model_fields_set else " (the default)"
        message = (
            f"{every}{origin} exceeds the fewest iterations of a trial, {fewest}; "
            f"allowed: a whole number from 1 to {fewest}"
        )
        yield Refusal(("report_every_steps",), message)
    yield from scheduler_refusals(spec.scheduler, every=every, most=most)
    yield from population_refusals(
        spec.scheduler,
        policy=spec.privacy.policy,
        search=spec.search.name,
        num_listed=spec.num_listed,
        bands=spec.mechanism.bands,
    )


def _search_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    search = spec.search
    for index, point in enumerate(search.points_to_evaluate):
        for refusal in spec.search_space.point_refusals(point):
            path = ("search", "points_to_evaluate", index, *refusal.path)
            yield refusal._replace(path=path)
    if len(search.points_to_evaluate) > search.num_samples:
        message = (
            f"{len(search.points_to_evaluate)} points are more than num_samples; allowed: at most "
            f"{search.num_samples}"
        )
        yield Refusal(("search", "points_to_evaluate"), message)
    if not isinstance(search, OptunaSpec):
        return
    if search.num_samples * search.repeats > MAX_TRIALS:
        message = (
            f"{search.repeats} is not allowed with num_samples {search.num_samples}; allowed: at "
            f"most {MAX_TRIALS} trials in all"
        )
        yield Refusal(("search", "repeats"), message)
    for path, domain in spec.search_space.parts():
        if domain.kind == "grid_search":
            message = (
                "grid_search is not allowed with optuna, which goes through no grid; allowed: "
                "choice of the same values"
            )
            yield Refusal(("search_space", *path), message)
    if (search.objective == "epsilon") != (search.min_utility is not None):
        given = "null" if search.min_utility is None else f"{search.min_utility:g}"
        allowed = "null" if search.objective != "epsilon" else "a number from 0 to 1"
        message = f"{given} is not allowed with {search.objective}; allowed: {allowed}"
        yield Refusal(("search", "min_utility"), message)
    if spec.privacy.policy in ("declared", "private_selection"):
        kept = (
            "whose list of trials is fixed before the first of them runs"
            if spec.privacy.policy == "declared"
            else "whose trials are drawn independently of each other"
        )
        message = (
            f"optuna is not allowed under {spec.privacy.policy}, {kept}; allowed: random or "
            "quasi_random, or the policy open or per_trial"
        )
        yield Refusal(("search", "name"), message)


def _policy_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    """What would void the policy of the privacy section, or leaves it without a number."""
    privacy = spec.privacy
    calibrated = CALIBRATED in spec.search_space.noise_multiplier.values
    by_trial = calibrated and not spec.proxy.is_proxy
    if by_trial and privacy.policy != "per_trial" and privacy.trial_epsilon is None:
        message = (
            f"is missing; allowed: a number > 0. {CALIBRATED} noise needs the epsilon of one "
            f"trial by itself, for under {privacy.policy} target_epsilon is that of all of them"
        )
        yield Refusal(("privacy", "trial_epsilon"), message)
    for name in ("epsilon", "budget_left") if privacy.policy == "per_trial" else ():
        if (given := getattr(spec.stop, name)) is not None:
            message = (
                f"{given:g} is not allowed under per_trial, where nothing adds up; allowed: null"
            )
            yield Refusal(("stop", name), message)
    if privacy.policy != "private_selection":
        return
    if spec.stop != StopSpec():
        message = (
            "is not allowed under private_selection, whose number of trials is drawn in secret "
            "and nothing else; allowed: no rule"
        )
        yield Refusal(("stop",), message, at_key=True)
    if not isinstance(spec.scheduler, FifoSpec):
        message = (
            f"{spec.scheduler.name} is not allowed under private_selection, for it compares "
            "trials with each other before the best is chosen; allowed: fifo"
        )
        yield Refusal(("scheduler", "name"), message)
    if spec.search.num_samples != 1:
        message = (
            f"{spec.search.num_samples} is not allowed under private_selection, which draws the "
            "number of trials in secret; allowed: 1, and privacy.selection.mean"
        )
        yield Refusal(("search", "num_samples"), message)
    if spec.search.repeats != 1:
        message = (
            f"{spec.search.repeats} is not allowed under private_selection, which lets the best "
            "trial out and nothing else: a mean over repeats would be of others, too; allowed: 1"
        )
        yield Refusal(("search", "repeats"), message)
    if spec.search.name == "quasi_random" or spec.search.points_to_evaluate:
        field = "points_to_evaluate" if spec.search.points_to_evaluate else "name"
        message = (
            "is not allowed under private_selection, whose trials are drawn independently of "
            "each other; allowed: {name: random}"
        )
        yield Refusal(("search", field), message, at_key=True)
    for path, domain in spec.search_space.parts():
        if domain.kind == "grid_search":
            message = (
                "grid_search is not allowed under private_selection, whose trials are drawn "
                "independently of each other; allowed: choice of the same values"
            )
            yield Refusal(("search_space", *path), message)
        elif calibrated and path[0] in ("expected_batch_size", "iterations") and domain.is_range:
            message = (
                f"{domain.kind} is not allowed with {CALIBRATED} noise under private_selection, "
                "whose candidates are then counted one by one; allowed: a constant or choice"
            )
            yield Refusal(("search_space", *path), message)


def _resource_refusals(spec: SweepSpec) -> Iterator[Refusal]:
    return resource_refusals(
        spec.resources,
        placement=spec.data.placement,
        bands=spec.mechanism.bands,
        policy=spec.privacy.policy,
    )


# --- As JSON Schema ------------------------------------------------------------------------


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a specification, for editors and for other programs.

    It is looser than `sweeps.spec.reading`, which also checks what fields must satisfy together.
    """
    schema = SweepSpec.model_json_schema()
    heading = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dp-sweeps sweep specification",
    }
    definitions = schema.pop("$defs")
    return {**heading, **{k: v for k, v in schema.items() if k != "title"}, "$defs": definitions}
