"""The mechanism that is accounted: one frozen value with the public facts of one training run.

A training run repeats a *step*: draw some of the people in the data, clip what each contributes,
sum, and add Gaussian noise. Only a few numbers of it decide the privacy cost; learning rate,
model and clip norm do not. A mechanism therefore comes down to a step and how often it is
repeated, and everything that computes a cost (`accounting.accountants`, the ledger) sees nothing
else: two mechanisms with equal steps draw on the same curve, whatever they are called.

    mechanism                               step                          repetitions
    DpSgdMechanism                          SampledGaussian               iterations
    DpSgdMechanism.full_batch               SampledGaussian, q = 1        iterations
    TruncatedDpSgdMechanism                 TruncatedSampledGaussian      iterations
    BandedMatrixFactorizationMechanism      SampledGaussian               ceil(iterations / bands)
"""

# dp-accounting and scipy ship no stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from accounting import _validate
from accounting.errors import InvalidPrivacyParameter

if TYPE_CHECKING:
    import dp_accounting

NeighboringRelation = Literal["add_or_remove_one", "zero_out"]
NEIGHBORING_RELATIONS: tuple[NeighboringRelation, ...] = ("add_or_remove_one", "zero_out")

PrivacyUnit = Literal["example", "user"]
PRIVACY_UNITS: tuple[PrivacyUnit, ...] = ("example", "user")

LEAST_TRUNCATION_STDDEVS = 4.0
"""A truncated batch must hold the mean and so many standard deviations of the batch size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledGaussian:
    """One step with Poisson sampling: every unit joins on its own.

    Attributes:
        noise_multiplier: Standard deviation of the noise divided by the sensitivity; > 0.
        sampling_prob: In (0, 1]; at 1 this is the plain Gaussian mechanism.
    """

    noise_multiplier: float
    sampling_prob: float

    def dp_event(self) -> dp_accounting.DpEvent:
        """Returns the step as an event of the accounting library."""
        import dp_accounting  # Costs about a second, so only on demand.

        event = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_prob == 1:
            return event
        return dp_accounting.PoissonSampledDpEvent(self.sampling_prob, event)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedSampledGaussian:
    """One step with Poisson sampling whose batch is cut, at random, to a largest size.

    Attributes:
        noise_multiplier: Standard deviation of the noise divided by the sensitivity; > 0.
        sampling_prob: In (0, 1).
        num_examples: Number of units in the data, public; >= 1.
        truncated_batch_size: Largest batch; >= 1.
    """

    noise_multiplier: float
    sampling_prob: float
    num_examples: int
    truncated_batch_size: int

    def dp_event(self) -> dp_accounting.DpEvent:
        """Returns the step as an event of the accounting library."""
        import dp_accounting  # Costs about a second, so only on demand.

        return dp_accounting.TruncatedSubsampledGaussianDpEvent(
            dataset_size=self.num_examples,
            sampling_probability=self.sampling_prob,
            truncated_batch_size=self.truncated_batch_size,
            noise_multiplier=self.noise_multiplier,
        )


Step = SampledGaussian | TruncatedSampledGaussian


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """What every mechanism has. Use one of the kinds below.

    Numbers are normalised to Python `float` and `int`, so that mechanisms built from numpy
    numbers compare equal, hash equal and cost the same.

    Attributes:
        noise_multiplier: Standard deviation of the noise divided by the sensitivity; finite, > 0.
        sampling_prob: Probability with which each unit takes part in a step; in (0, 1].
        iterations: How often the step runs; an integer from 1 to 1e12.
        neighboring_relation: What one unit's data may change.
            "add_or_remove_one": one unit more or less; their number is private.
            "zero_out": one unit is blanked, so that its clipped contribution is zero; the number
            of units is public.
        privacy_unit: Whose data that is: one "example", or all examples of one "user". The unit
            is what is drawn and clipped: with "user", sampling draws users and the bound is on a
            user's whole contribution to the sum. The numbers are those of that sampling.

    Raises:
        InvalidPrivacyParameter: A field is of the wrong type or out of range.
    """

    kind: ClassVar[str]

    noise_multiplier: float
    sampling_prob: float
    iterations: int
    neighboring_relation: NeighboringRelation = "add_or_remove_one"
    privacy_unit: PrivacyUnit = "example"

    def __post_init__(self) -> None:
        if type(self) is Mechanism:
            raise InvalidPrivacyParameter("mechanism", "Mechanism", "one of its kinds")
        self._set("noise_multiplier", _validate.positive)
        self._set("sampling_prob", _validate.probability)
        self._set("iterations", _validate.count)
        _validate.one_of("neighboring_relation", self.neighboring_relation, NEIGHBORING_RELATIONS)
        _validate.one_of("privacy_unit", self.privacy_unit, PRIVACY_UNITS)

    def _set(self, field: str, check: Any) -> None:
        object.__setattr__(self, field, check(field, getattr(self, field)))  # frozen to others

    @property
    def step(self) -> Step:
        """What is repeated."""
        return SampledGaussian(
            noise_multiplier=self.noise_multiplier, sampling_prob=self.sampling_prob
        )

    @property
    def repetitions(self) -> int:
        """How often `step` is composed."""
        return self.repetitions_after(self.iterations)

    def after(self, iterations: int) -> Self:
        """Returns the same mechanism run another number of times.

        Args:
            iterations: How often the step runs; an integer from 1 to 1e12.

        Raises:
            InvalidPrivacyParameter: `iterations` is not such an integer.
        """
        return dataclasses.replace(self, iterations=iterations)

    def repetitions_after(self, iterations: int) -> int:
        """Returns how often `step` is composed after so many iterations, 0 included."""
        return iterations

    def dp_event(self) -> dp_accounting.DpEvent:
        """Returns the mechanism as an event of the accounting library."""
        import dp_accounting  # Costs about a second, so only on demand.

        return dp_accounting.SelfComposedDpEvent(self.step.dp_event(), self.repetitions)

    def to_json(self) -> dict[str, Any]:
        """Returns the mechanism as plain JSON data, for `mechanism_from_json`."""
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpSgdMechanism(Mechanism):
    """Poisson-sampled Gaussian mechanism, repeated: DP-SGD.

    Formal guarantees:
        `dp_event` describes the run only if sampling really is Poisson, the sum is divided by a
        constant such as the expected batch size, and no batch is truncated. Both neighbouring
        relations cost the same.

    References:
        Abadi et al., "Deep Learning with Differential Privacy", 2016,
        https://arxiv.org/abs/1607.00133
    """

    kind: ClassVar[str] = "dp_sgd"

    @classmethod
    def full_batch(
        cls,
        *,
        noise_multiplier: float,
        iterations: int = 1,
        neighboring_relation: NeighboringRelation = "add_or_remove_one",
        privacy_unit: PrivacyUnit = "example",
    ) -> DpSgdMechanism:
        """Every unit in every step: the Gaussian mechanism; by default a single step.

        References:
            Mehta et al., "Large Scale Transfer Learning for Differentially Private Image
            Classification", 2022, https://arxiv.org/abs/2205.02973 (one step, last layer)
        """
        return cls(
            noise_multiplier=noise_multiplier,
            sampling_prob=1.0,
            iterations=iterations,
            neighboring_relation=neighboring_relation,
            privacy_unit=privacy_unit,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TruncatedDpSgdMechanism(Mechanism):
    """DP-SGD whose Poisson batches are cut to `truncated_batch_size`, for programs of one shape.

    Attributes:
        num_examples: Number of units in the data; public, hence not under "add_or_remove_one".
        truncated_batch_size: Largest batch. At least 4 standard deviations of the batch size
            above its mean: below that, truncation costs more than it saves (at the mean itself,
            eight times the epsilon).

    References:
        Chua et al., "Scalable DP-SGD: Shuffling vs. Poisson Subsampling", 2024,
        https://arxiv.org/abs/2411.04205
        Ganesh et al., 2025, https://arxiv.org/abs/2508.15089
    """

    kind: ClassVar[str] = "truncated_dp_sgd"

    neighboring_relation: NeighboringRelation = "zero_out"
    num_examples: int
    truncated_batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("num_examples", _validate.count)
        self._set("truncated_batch_size", _validate.count)
        if self.neighboring_relation != "zero_out":
            raise InvalidPrivacyParameter(
                "neighboring_relation",
                self.neighboring_relation,
                "'zero_out' with truncated batches, whose cost depends on num_examples, which "
                "'add_or_remove_one' protects",
            )
        if self.sampling_prob == 1:
            raise InvalidPrivacyParameter(
                "sampling_prob", self.sampling_prob, "< 1 with truncated batches"
            )
        least = least_truncated_batch_size(self.num_examples, self.sampling_prob)
        if self.truncated_batch_size < least:
            raise InvalidPrivacyParameter(
                "truncated_batch_size",
                self.truncated_batch_size,
                f"at least {least}, {LEAST_TRUNCATION_STDDEVS:g} standard deviations above the "
                f"mean batch of {self.num_examples * self.sampling_prob:g}",
            )

    @property
    def step(self) -> Step:
        """What is repeated."""
        return TruncatedSampledGaussian(
            noise_multiplier=self.noise_multiplier,
            sampling_prob=self.sampling_prob,
            num_examples=self.num_examples,
            truncated_batch_size=self.truncated_batch_size,
        )


def least_truncated_batch_size(num_examples: int, sampling_prob: float) -> int:
    """Returns the smallest `truncated_batch_size` accepted, never above `num_examples`."""
    stddev = math.sqrt(num_examples * sampling_prob * (1 - sampling_prob))
    enough = math.ceil(num_examples * sampling_prob + LEAST_TRUNCATION_STDDEVS * stddev)
    return max(1, min(enough, num_examples))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BandedMatrixFactorizationMechanism(Mechanism):
    """DP-SGD with noise that is correlated over `bands` steps, amplified by sampling.

    The data are split into `bands` groups, step t draws from group t mod `bands` alone, and the
    noise is that of a strategy matrix with `bands` bands, for example one of
    `jax_privacy.matrix_factorization`. Each unit then takes part in at most every `bands`-th
    step, and the run costs as much as DP-SGD with ceil(iterations / bands) steps.

    Attributes:
        noise_multiplier: With respect to a strategy matrix whose columns have L2 norm <= 1.
        sampling_prob: Probability with which each unit *of the group* takes part in a step.
        bands: From 1 (then this is DP-SGD) to `iterations`.

    Formal guarantees:
        Under "add_or_remove_one" each unit must choose its group independently of all others;
        under "zero_out" any fixed split will do. A run stopped early is the same mechanism with
        fewer iterations.

    References:
        Choquette-Choo et al., "(Amplified) Banded Matrix Factorization: A Unified Approach to
        Private Training", 2023, Theorem 4, https://arxiv.org/abs/2306.08153
    """

    kind: ClassVar[str] = "banded_matrix_factorization"

    bands: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("bands", _validate.count)

    def repetitions_after(self, iterations: int) -> int:
        """Returns how often `step` is composed after so many iterations, 0 included."""
        return -(-iterations // self.bands)


_KINDS: dict[str, type[Mechanism]] = {
    kind.kind: kind
    for kind in (DpSgdMechanism, TruncatedDpSgdMechanism, BandedMatrixFactorizationMechanism)
}


def mechanism_from_json(data: Mapping[str, Any]) -> Mechanism:
    """Returns the mechanism that `Mechanism.to_json` wrote.

    Raises:
        InvalidPrivacyParameter: The kind or a field is unknown, missing or not allowed.
    """
    fields = dict(data)
    kind = _KINDS.get(str(fields.pop("kind", None)))
    if kind is None:
        raise InvalidPrivacyParameter(
            "mechanism.kind", data.get("kind"), " or ".join(repr(name) for name in _KINDS)
        )
    try:
        return kind(**fields)
    except TypeError as error:
        raise InvalidPrivacyParameter("mechanism", fields, f"the fields of {kind.kind}") from error


def composed(mechanisms: Iterable[Mechanism]) -> collections.Counter[Step]:
    """Returns how often each step is composed by several mechanisms together."""
    counts: collections.Counter[Step] = collections.Counter()
    for mechanism in mechanisms:
        counts[mechanism.step] += mechanism.repetitions
    return counts


@functools.lru_cache(maxsize=65536)
def step_key(step: Step) -> str:
    """Returns a text that equal steps share and no others; exact to the last bit."""
    numbers = dataclasses.astuple(step)
    texts = [n.hex() if isinstance(n, float) else str(n) for n in numbers]
    return ":".join([type(step).__name__, *texts])


@functools.lru_cache(maxsize=65536)
def step_from_key(key: str) -> Step:
    """Returns the step whose `step_key` this is.

    Raises:
        ValueError: No step has such a key.
    """
    name, *texts = key.split(":")
    if name == SampledGaussian.__name__ and len(texts) == 2:
        noise_multiplier, sampling_prob = map(float.fromhex, texts)
        return SampledGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    if name == TruncatedSampledGaussian.__name__ and len(texts) == 4:
        return TruncatedSampledGaussian(
            noise_multiplier=float.fromhex(texts[0]),
            sampling_prob=float.fromhex(texts[1]),
            num_examples=int(texts[2]),
            truncated_batch_size=int(texts[3]),
        )
    raise ValueError(f"no step has the key {key!r}")
