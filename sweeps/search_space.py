"""From a specification to the trials it proposes; Ray Tune's semantics without Ray.

`expand` lists every hyperparameter setting that is known up front, so that all of them can be put
before the accountant before any of them runs.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from sweeps.errors import Problem, SpecError
from sweeps.spec.domains import (
    CALIBRATED,
    FULL,
    AnyDomain,
    ConditionalDomain,
    Domain,
    Value,
    step_indices,
)
from sweeps.spec.search_spec import OptunaSpec
from sweeps.spec.section import MAX_SEED
from sweeps.spec.sweep_spec import SweepSpec
from trainer.config import (
    ClippingConfig,
    DataConfig,
    ModelConfig,
    OptimizerName,
    ScheduleName,
    TrialConfig,
)
from trainer.config_sections import AugmentationConfig, AveragingConfig, MechanismConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:
    from trainer.training.plan import Batches

# Slowest first. Neighbours in the list differ in what is cheap to change: settings that share
# a batch size share a compiled program and one reckoning of their privacy.
GRID_ORDER = (
    "noise_multiplier",
    "l2_clip_norm",
    "iterations",
    "expected_batch_size",
    "optimizer",
    "weight_decay",
    "learning_rate_schedule",
    "warmup_steps",
    "learning_rate",
)

# What a trial's privacy depends on.
COSTLY = ("noise_multiplier", "iterations", "expected_batch_size")

# Which of the independent random streams a field draws from. These numbers are part of what a
# seed means: a new field gets a new number, and no number changes.
_STREAMS = {
    "optimizer": 0,
    "learning_rate": 1,
    "expected_batch_size": 2,
    "iterations": 3,
    "noise_multiplier": 4,
    "l2_clip_norm": 5,
    "weight_decay": 6,
    "learning_rate_schedule": 7,
    "warmup_steps": 8,
}


_NO_POINTS: Iterable[Mapping[str, Value]] = itertools.repeat({})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters:
    """One point of a search space.

    Attributes:
        optimizer: Optimizer, as in optax.
        learning_rate: Step size, > 0.
        expected_batch_size: Mean size of a Poisson-sampled batch, >= 1; or ``full``, everybody
            in every step.
        iterations: How often the mechanism runs, >= 1.
        noise_multiplier: Noise standard deviation / sensitivity, > 0; or ``calibrated``, the
            smallest that keeps the trial within the target.
        l2_clip_norm: Bound on one example's gradient norm, > 0.
        weight_decay: Decoupled weight decay, >= 0.
        learning_rate_schedule: How the learning rate falls.
        warmup_steps: Steps over which it rises first, >= 0.
    """

    optimizer: OptimizerName
    learning_rate: float
    expected_batch_size: float | Literal["full"]
    iterations: int
    noise_multiplier: float | Literal["calibrated"]
    l2_clip_norm: float
    weight_decay: float = 0.0
    learning_rate_schedule: ScheduleName = "constant"
    warmup_steps: int = 0


def expand(spec: SweepSpec) -> list[Hyperparameters]:
    """Lists the settings that a sweep knows before anything runs.

    As in Ray Tune, the product of all ``grid_search`` fields is run ``search.num_samples`` times,
    and every other domain is drawn anew for each setting. The order is stable: one sample after
    the other; within a sample the grid in `GRID_ORDER`, learning rate fastest, each field's
    values as they are listed. Equal settings are kept.

    A field that depends on another takes its values, or is drawn, from the branch of that one's
    value; the other field then comes just before it in the order, if not earlier.

    The first samples take what ``search.points_to_evaluate`` says. Of a search that learns, these
    are the settings that it begins with.

    Random domains depend on ``search.seed`` and on the setting's position alone, and each field
    draws from a stream of its own, so a change to one field leaves the draws of others as they
    were. That holds for ``quasi_random``, too: each field has a dimension of its own of the
    Sobol' sequence, shifted by a random number of its own (Cranley and Patterson 1976).

    Args:
        spec: The specification, whose number of trials was bounded when it was read.

    Returns:
        ``spec.num_listed`` settings, each once however many repeats it is to have.
    """
    search, domains = spec.search, in_order(spec)
    chance = _chance(spec)
    samples = spec.num_listed if isinstance(search, OptunaSpec) else search.num_samples
    settings: list[Hyperparameters] = []
    for point in itertools.islice(itertools.chain(search.points_to_evaluate, _NO_POINTS), samples):
        for values in _product(domains, _listed, point):
            for name, domain in domains.items():
                if name not in values:
                    values[name] = value_at(domain.given(values), chance[name][len(settings)])
            settings.append(hyperparameters(values))
    return settings


def in_order(spec: SweepSpec) -> dict[str, AnyDomain]:
    """The fields of a search space in `GRID_ORDER`, but each after the one that it depends on."""
    domains = dict(spec.search_space.domains())
    ordered: dict[str, AnyDomain] = {}
    for name in GRID_ORDER:
        domain = domains[name]
        if isinstance(domain, ConditionalDomain):
            ordered.setdefault(domain.by, domains[domain.by])
        ordered.setdefault(name, domain)
    return ordered


def _product(
    domains: Mapping[str, AnyDomain],
    values: Callable[[str, Domain], Sequence[Value] | None],
    point: Mapping[str, Value],
) -> list[dict[str, Value]]:
    """Every combination of some fields' values, the last field's fastest.

    Args:
        domains: The fields, each after the one that it depends on.
        values: Gives a field's values by its domain; None leaves it out, and what depends on it.
        point: The values of some fields, which take no others.
    """
    places = [dict(point)]
    for name, domain in domains.items():
        depends_on = domain.by if isinstance(domain, ConditionalDomain) else None
        if name in point or (depends_on is not None and depends_on not in places[0]):
            continue
        longer: list[dict[str, Value]] = []
        for place in places:
            found = values(name, domain.given(place))
            longer += [place] if found is None else [{**place, name: value} for value in found]
        places = longer
    return places


def _listed(_name: str, domain: Domain) -> Sequence[Value] | None:
    """What a field goes through in a grid; None where it is drawn."""
    return None if domain.is_random else domain.values


def _chance(spec: SweepSpec) -> Mapping[str, NDArray[np.float64]]:
    """For each field a number in [0, 1) for each setting."""
    count, seed = spec.num_listed, spec.search.seed
    streams = {name: np.random.default_rng([seed, _STREAMS[name]]) for name in GRID_ORDER}
    if spec.search.name != "quasi_random":
        return {name: stream.random(count) for name, stream in streams.items()}
    # SciPy has no stubs, and this part of it takes nearly a second.
    from scipy.stats import qmc  # pyright: ignore[reportMissingTypeStubs]

    power = max(count - 1, 0).bit_length()
    even = qmc.Sobol(len(_STREAMS), scramble=False).random_base2(power)[:count]
    return {
        name: (even[:, _STREAMS[name]] + stream.random()) % 1.0 for name, stream in streams.items()
    }


def candidates(spec: SweepSpec) -> list[Hyperparameters]:
    """Lists settings that cost, between them, at least what any draw of the spec can cost.

    A selection among trials that are drawn independently costs what its dearest candidate costs.
    So listed values of batch size, iterations and noise are combined, of a range the dearest end
    is taken (the largest batch, the most iterations, the least noise), and what costs no privacy
    has one value, unless one of these depends on it.

    Args:
        spec: A specification under private_selection.
    """
    domains = in_order(spec)
    decisive = {
        domain.by
        for name, domain in domains.items()
        if name in COSTLY and isinstance(domain, ConditionalDomain)
    }

    def values(name: str, domain: Domain) -> tuple[Value, ...]:
        if name in decisive:
            return domain.values
        if name not in COSTLY:
            return domain.values[:1]
        if not domain.is_range:
            return domain.values
        low, high = domain.bounds()
        return (low if name == "noise_multiplier" else high,)

    return [hyperparameters(point) for point in _product(domains, values, {})]


def value_at(domain: Domain, chance: float) -> Value:
    """The value of a domain below which a part ``chance`` of what it gives lies.

    ``quniform`` gives every multiple of its step the same probability, both ends included; Ray
    Tune's gives the two ends half of it.

    Args:
        domain: A random domain, or a constant.
        chance: In [0, 1).

    Raises:
        ValueError: The domain is a grid.
    """
    if domain.kind in ("choice", "constant"):
        return domain.values[int(chance * len(domain.values))]
    if not domain.is_random:
        raise ValueError(f"domain.kind={domain.kind!r}: allowed is a random domain")
    low, high = (float(value) for value in domain.values[:2])
    match domain.kind:
        case "randint":
            return int(low) + int(chance * (int(high) - int(low)))
        case "lograndint":
            value = math.floor(_log_uniform(low, high, chance))
            return min(max(value, int(low)), int(high) - 1)
        case "quniform":
            step = float(domain.values[2])
            first, last = step_indices(low, high, step)
            # Twelve digits, so that 3 * 0.1 is shown as 0.3.
            value = float(f"{(first + int(chance * (last - first + 1))) * step:.12g}")
        case "loguniform":
            value = _log_uniform(low, high, chance)
        case _:
            value = low + chance * (high - low)
    return min(max(value, low), high)


def _log_uniform(low: float, high: float, chance: float) -> float:
    return math.exp(math.log(low) + chance * (math.log(high) - math.log(low)))


def hyperparameters(values: Mapping[str, Value]) -> Hyperparameters:
    """A setting from a value of each field of the search space."""
    noise, batch = values["noise_multiplier"], values["expected_batch_size"]
    return Hyperparameters(
        optimizer=cast("OptimizerName", values["optimizer"]),
        learning_rate=float(values["learning_rate"]),
        expected_batch_size=FULL if batch == FULL else float(batch),
        iterations=int(values["iterations"]),
        noise_multiplier=CALIBRATED if noise == CALIBRATED else float(noise),
        l2_clip_norm=float(values["l2_clip_norm"]),
        weight_decay=float(values["weight_decay"]),
        learning_rate_schedule=cast("ScheduleName", values["learning_rate_schedule"]),
        warmup_steps=int(values["warmup_steps"]),
    )


def repeat_seed(seed: int, repeat: int) -> int:
    """Seeds the initialisation of a repeat of a configuration.

    Args:
        seed: The specification's, which the first repeat has itself.
        repeat: From 0.

    Returns:
        A whole number from 0 to `MAX_SEED`.
    """
    if repeat == 0:
        return seed
    (drawn,) = np.random.SeedSequence([seed, repeat]).generate_state(1)
    return int(drawn) & MAX_SEED


def public_num_units(spec: SweepSpec, num_units: int | None) -> int:
    """The number of units, examples or users, with which sampling may reckon in public.

    Args:
        spec: The specification.
        num_units: How many the data set holds. It is used where ``zero_out`` makes it public, and
            never looked at where ``add_or_remove_one`` protects it; None is then fine.

    Raises:
        ValueError: The public number is not a whole number >= 1.
    """
    if spec.privacy.neighboring_relation == "zero_out":
        field, size = "num_units", num_units
    else:
        field, size = "data.declared_num_examples", spec.data.declared_num_examples
    if type(size) is not int or size < 1:
        raise ValueError(f"{field}={size!r}: allowed is a whole number >= 1")
    return size


def expected_batch_size(
    spec: SweepSpec, hyperparameters: Hyperparameters, num_units: int | None
) -> float:
    """The mean size of the batches that a trial draws: of everybody where it says ``full``.

    Args:
        spec: The specification.
        hyperparameters: One setting of `expand`.
        num_units: As in `public_num_units`.

    Raises:
        SpecError: As `sampling_prob`.
        ValueError: Likewise.
    """
    return _batches(spec, hyperparameters, num_units).expected_batch_size


def sampling_prob(
    spec: SweepSpec, hyperparameters: Hyperparameters, num_units: int | None
) -> float:
    """The probability with which a unit joins a step; with bands, a unit of the step's group.

    Args:
        spec: The specification.
        hyperparameters: One setting of `expand`.
        num_units: How many units the data set holds, as in `public_num_units`.

    Raises:
        SpecError: The expected batch is larger than the data set, or than a group of it.
        ValueError: `num_units` is missing.
    """
    return _batches(spec, hyperparameters, num_units).sampling_prob


def _batches(
    spec: SweepSpec, hyperparameters: Hyperparameters, num_units: int | None
) -> "Batches":
    # SciPy, which reading a specification does without.
    from trainer.training.plan import batches_of

    public, bands = public_num_units(spec, num_units), spec.mechanism.bands
    batch = hyperparameters.expected_batch_size
    try:
        return batches_of(batch if batch == FULL else batch / spec.proxy.scale, public, bands)
    except ConfigError as error:
        units = f"{public} {spec.privacy_unit}s of {spec.data.name} {spec.data.train_split}"
        whole = f"the {units}"
        if bands > 1:
            whole = f"a group, one of {bands} into which mechanism.bands splits {whole}"
        message = (
            f"expected_batch_size {batch:g} exceeds {whole}; allowed: at most "
            f"{public / bands:.10g}"
        )
        problem = Problem(message=message, key_path="search_space.expected_batch_size")
        raise SpecError([problem]) from error


def data_config(spec: SweepSpec) -> DataConfig:
    """The data of a specification's trials."""
    return DataConfig(**spec.data.model_dump(exclude={"declared_num_examples"}))


def trial_config(
    spec: SweepSpec,
    hyperparameters: Hyperparameters,
    *,
    num_units: int | None,
    noise_multiplier: float,
) -> TrialConfig:
    """The configuration of one trial.

    Args:
        spec: The specification.
        hyperparameters: One setting of `expand`.
        num_units: How many units the data set holds, as in `public_num_units`.
        noise_multiplier: The setting's own, or the calibrated one where it says so; a proxy has
            as much less.

    Raises:
        SpecError: The expected batch is larger than the data set, or than a group of it.
        ConfigError: With `quantile` clipping, the count leaves nothing for the gradients; or the
            mechanism does not go with the rest.
        ValueError: `noise_multiplier` is not the setting's own, or `num_units` is missing.
    """
    if hyperparameters.noise_multiplier not in (CALIBRATED, noise_multiplier):
        raise ValueError(
            f"noise_multiplier={noise_multiplier!r}: the setting says "
            f"{hyperparameters.noise_multiplier!r}"
        )
    return TrialConfig(
        data=data_config(spec),
        model=ModelConfig(**spec.model.model_dump()),
        optimizer=hyperparameters.optimizer,
        learning_rate=hyperparameters.learning_rate,
        l2_clip_norm=hyperparameters.l2_clip_norm,
        weight_decay=hyperparameters.weight_decay,
        learning_rate_schedule=hyperparameters.learning_rate_schedule,
        warmup_steps=hyperparameters.warmup_steps,
        noise_multiplier=noise_multiplier / spec.proxy.scale,
        sampling_prob=sampling_prob(spec, hyperparameters, num_units),
        expected_batch_size=expected_batch_size(spec, hyperparameters, num_units),
        iterations=hyperparameters.iterations,
        report_every_steps=spec.report_every_steps,
        target_delta=spec.privacy.target_delta,
        accountant=spec.privacy.accountant,
        neighboring_relation=spec.privacy.neighboring_relation,
        seed=spec.seed,
        clipping=ClippingConfig(**spec.clipping.model_dump()),
        mechanism=_mechanism(spec, num_units),
        augmentation=AugmentationConfig(**spec.augmentation.model_dump()),
        averaging=AveragingConfig(**spec.averaging.model_dump()),
    )


def shown_setting(
    spec: SweepSpec, hyperparameters: Hyperparameters, num_units: int | None
) -> dict[str, Any]:
    """A setting as people see it: that of the run that it describes, even if a proxy runs.

    Args:
        spec: The specification.
        hyperparameters: One setting of `expand`.
        num_units: As in `public_num_units`.

    Raises:
        SpecError: The expected batch is larger than the data set, or than a group of it.
        ValueError: `num_units` is missing.
    """
    return {
        **dataclasses.asdict(hyperparameters),
        "expected_batch_size": expected_batch_size(spec.real, hyperparameters, num_units),
        "sampling_prob": sampling_prob(spec.real, hyperparameters, num_units),
    }


def shown_proxy(spec: SweepSpec, config: TrialConfig) -> dict[str, float]:
    """What really runs of a setting, where that is a proxy; else nothing."""
    if not spec.proxy.is_proxy:
        return {}
    return {
        "proxy_expected_batch_size": config.expected_batch_size,
        "proxy_noise_multiplier": config.noise_multiplier,
    }


def _mechanism(spec: SweepSpec, num_units: int | None) -> MechanismConfig:
    mechanism = spec.mechanism
    # What truncation costs depends on how many there are; the specification has checked that
    # their number is public then.
    truncated = mechanism.truncated_batch_size is not None
    return MechanismConfig(
        **mechanism.model_dump(),
        num_units=public_num_units(spec, num_units) if truncated else None,
    )
