"""One object from which sampling, clipping, noise and accounting all take their numbers.

The accounted mechanism is the executed one because there is a single place that holds the
facts: the sampler draws with the mechanism's probability, the compiled step scales its noise by
the mechanism's multiplier, and the loop runs and charges the mechanism's iterations.

With `quantile` clipping a step releases two noisy sums, of gradients and of a count
(`trainer.mechanism.quantile_clipping`). The mechanism's multiplier is that of both together, and
`noise_of_gradients` splits it between them.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from accounting import (
    BandedMatrixFactorizationMechanism,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Mechanism,
    TruncatedDpSgdMechanism,
    TruncatedSampledGaussian,
)
from accounting.mechanism import composed
from trainer.config import TrialConfig
from trainer.errors import ConfigError
from trainer.mechanism.sampling import Sampler
from trainer.training.schedules import learning_rate_factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a trial does to its data.

    Attributes:
        mechanism: What the accountant sees.
        sampler: Draws the batches.
        noise_strategy: Coefficients that correlate the noise of several steps
            (`trainer.mechanism.noise_strategy`); empty where it is independent.
        l2_clip_norm: Bound on one unit's gradient norm: the sum's sensitivity. With
            `quantile` clipping that of the first step.
        expected_batch_size: Divisor of the noisy sum.
        grad_noise_multiplier: Noise on the sum of gradients / clip norm. The mechanism's,
            where the gradients are all that a step releases.
        count_noise_stddev: Noise on the count of unclipped gradients; None where there is none.
        learning_rate_factors: float32 ``[iterations]``, what the learning rate of each step is
            multiplied with.
    """

    mechanism: Mechanism
    sampler: Sampler
    noise_strategy: tuple[float, ...]
    l2_clip_norm: float
    expected_batch_size: float
    grad_noise_multiplier: float
    count_noise_stddev: float | None
    learning_rate_factors: np.ndarray


class Batches(NamedTuple):
    """How large batches are, in two of `TrialConfig`'s numbers.

    Attributes:
        sampling_prob: Probability with which each unit of the step's group joins, in (0, 1].
        expected_batch_size: The mean of their size, > 0, before any is truncated.
    """

    sampling_prob: float
    expected_batch_size: float


def batches_of(
    expected_batch_size: float | Literal["full"], num_units: int, bands: int = 1
) -> Batches:
    """The batches of an expected size, where the number of units is public.

    Where noise is banded a step draws from one of ``bands`` groups of ``num_units / bands`` units.
    Truncation changes neither number: it is accounted for by itself.

    Args:
        expected_batch_size: > 0; or ``full``, all units of the step's group.
        num_units: Public number of units, >= 1.
        bands: Number of groups, >= 1.

    Raises:
        ConfigError: The size is more than the units of a group.
    """
    if expected_batch_size == "full":
        return Batches(1.0, num_units / bands)
    # In this order whole numbers are rounded once.
    sampling_prob = expected_batch_size * bands / num_units
    if sampling_prob > 1:
        groups = f" in each of {bands} groups" if bands > 1 else ""
        raise ConfigError(
            f"expected_batch_size={expected_batch_size!r}: allowed is a number in (0, "
            f"{num_units / bands:g}], for so many units there are{groups}; or full"
        )
    return Batches(sampling_prob, float(expected_batch_size))


def make_plan(config: TrialConfig, num_units: int) -> TrainingPlan:
    """The plan of a configuration on a training set of ``num_units`` examples or users.

    Raises:
        ConfigError: The mechanism is not accounted for, or reckons with another number of units.
    """
    try:
        mechanism = mechanism_of(config)
    except InvalidPrivacyParameter as error:
        raise ConfigError(f"mechanism: {error}") from error
    chosen = config.mechanism
    if chosen.num_units not in (None, num_units):
        raise ConfigError(
            f"mechanism.num_units={chosen.num_units!r}: allowed is the number of units in the "
            "data, on which the cost of truncated batches depends"
        )
    strategy: tuple[float, ...] = ()
    if chosen.bands > 1:
        # JAX, which planning does without.
        from trainer.mechanism.noise_strategy import toeplitz_strategy

        strategy = toeplitz_strategy(config.iterations, chosen.bands)
    return TrainingPlan(
        mechanism=mechanism,
        sampler=Sampler(
            num_units=num_units,
            sampling_prob=mechanism.sampling_prob,
            bands=chosen.bands,
            truncated_batch_size=chosen.truncated_batch_size,
            draws_groups=chosen.bands > 1 and config.neighboring_relation == "add_or_remove_one",
        ),
        noise_strategy=strategy,
        l2_clip_norm=config.l2_clip_norm,
        expected_batch_size=config.expected_batch_size,
        grad_noise_multiplier=noise_of_gradients(
            mechanism.noise_multiplier, config.count_noise_stddev
        ),
        count_noise_stddev=config.count_noise_stddev,
        learning_rate_factors=learning_rate_factors(
            config.learning_rate_schedule, config.warmup_steps, config.iterations
        ),
    )


def noise_of_gradients(noise_multiplier: float, count_noise_stddev: float | None) -> float:
    """The gradients' noise multiplier beside a noisy count, at the cost of ``noise_multiplier``.

    One example moves the sum of gradients by at most the clip norm C and the shifted count by at
    most 1/2, under both neighbouring relations
    (`trainer.mechanism.quantile_clipping.shifted_count`). With noise of standard deviation ``z_g
    C`` on the one and ``sigma_b`` on the other, each divided by its noise, the pair is one
    Gaussian mechanism of standard deviation 1 and of L2 sensitivity
    ``sqrt(z_g^-2 + (2 sigma_b)^-2)``. That is 1 / z, with z accounted, for

        z_g = (z^-2 - (2 sigma_b)^-2)^(-1/2)

    (Andrew et al. 2021, Theorem 1). The clip norm may depend on earlier releases, since the
    normalised pair does not depend on it.

    Args:
        noise_multiplier: z, of both together; > 0.
        count_noise_stddev: sigma_b > z / 2, which `TrialConfig` ensures; None for no count.

    Returns:
        z_g >= z.
    """
    if count_noise_stddev is None:
        return noise_multiplier
    # 1 - ratio^2 as a product: exact near 1, where the square would have rounded it away.
    ratio = noise_multiplier / (2 * count_noise_stddev)
    return noise_multiplier / math.sqrt((1 - ratio) * (1 + ratio))


def mechanism_of(config: TrialConfig) -> Mechanism:
    """The mechanism that a trial of this configuration runs; needs no data and no JAX."""
    facts = {
        "noise_multiplier": config.noise_multiplier,
        "sampling_prob": config.sampling_prob,
        "iterations": config.iterations,
        "neighboring_relation": config.neighboring_relation,
        "privacy_unit": config.privacy_unit,
    }
    chosen = config.mechanism
    if chosen.bands > 1:
        return BandedMatrixFactorizationMechanism(**facts, bands=chosen.bands)
    if chosen.truncated_batch_size is not None and chosen.num_units is not None:
        return TruncatedDpSgdMechanism(
            **facts,
            num_examples=chosen.num_units,
            truncated_batch_size=chosen.truncated_batch_size,
        )
    return DpSgdMechanism(**facts)


def shape_of(config: TrialConfig) -> Hashable:
    """What a trial's compiled programs depend on: equal where two trials share them.

    All other numbers of a configuration reach the programs as arguments.
    """
    averaging, bands = config.averaging, config.mechanism.bands
    return (
        config.data,
        config.model,
        config.optimizer,
        config.sampling_prob,  # by which a row's capacity is chosen
        config.neighboring_relation,
        config.clipping.mode,
        config.clipping.engine,
        config.clipping.microbatch_size,
        config.mechanism,
        config.iterations if bands > 1 else None,  # how noise is correlated depends on it
        config.augmentation,
        (averaging.ema_decay is None, averaging.polyak),
    )


def check_spent_before(config: TrialConfig, spent_before: Sequence[Mechanism]) -> None:
    """Checks that what was spent before a trial can be added to what it spends.

    Raises:
        ConfigError: It speaks of other neighbours or of another unit, or the trial's accountant
            does not serve it.
    """
    for index, mechanism in enumerate(spent_before):
        field = f"spent_before[{index}]"
        if not isinstance(mechanism, Mechanism):
            raise ConfigError(f"{field}={mechanism!r}: allowed is an accounting.Mechanism")
        for fact in ("neighboring_relation", "privacy_unit"):
            theirs, ours = getattr(mechanism, fact), getattr(config, fact)
            if theirs != ours:
                raise ConfigError(
                    f"{field}.{fact}={theirs!r}: allowed is the trial's own, {ours!r}, for costs "
                    "of two kinds cannot be added"
                )
    truncated = any(isinstance(step, TruncatedSampledGaussian) for step in composed(spent_before))
    if truncated and config.accountant != "pld":
        raise ConfigError(
            f"accountant={config.accountant!r}: allowed is pld where batches were truncated before"
        )


def evaluation_mechanism(config: TrialConfig) -> Mechanism | None:
    """What measuring costs the evaluation examples; None where it costs nothing that is kept.

    A report counts right answers. One example more, less or other changes a count by at most 1,
    so noise of standard deviation ``evaluation.noise_multiplier`` makes it one run of the
    Gaussian mechanism.

    Args:
        config: The trial.
    """
    noise_multiplier = config.evaluation.noise_multiplier
    if noise_multiplier is None:
        return None
    reports = -(-config.iterations // config.report_every_steps)
    return DpSgdMechanism.full_batch(
        noise_multiplier=noise_multiplier,
        iterations=reports * config.counts_per_report,
        neighboring_relation=config.neighboring_relation,
    )
