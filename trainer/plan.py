"""One object from which sampling, clipping, noise and accounting all take their numbers.

The accounted mechanism is the executed one because there is a single place that holds the
facts: the sampler draws with the mechanism's probability, the compiled step scales its noise by
the mechanism's multiplier, and the loop runs and charges the mechanism's iterations.

With `quantile` clipping a step releases two noisy sums, of gradients and of a count
(`trainer.quantile_clipping`). The mechanism's multiplier is that of both together, and
`noise_of_gradients` splits it between them.
"""

import dataclasses
import math

import numpy as np

from accounting import DpSgdMechanism
from trainer.config import TrialConfig
from trainer.sampling import PoissonSampler
from trainer.schedules import learning_rate_factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a trial does to its data.

    Attributes:
        mechanism: What the accountant sees.
        sampler: Draws the batches.
        l2_clip_norm: Bound on one example's gradient norm: the sum's sensitivity. With
            `quantile` clipping that of the first step.
        expected_batch_size: Divisor of the noisy sum.
        grad_noise_multiplier: Noise on the sum of gradients / clip norm. The mechanism's,
            where the gradients are all that a step releases.
        count_noise_stddev: Noise on the count of unclipped gradients; None where there is none.
        learning_rate_factors: float32 ``[iterations]``, what the learning rate of each step is
            multiplied with.
    """

    mechanism: DpSgdMechanism
    sampler: PoissonSampler
    l2_clip_norm: float
    expected_batch_size: float
    grad_noise_multiplier: float
    count_noise_stddev: float | None
    learning_rate_factors: np.ndarray


def make_plan(config: TrialConfig, num_examples: int) -> TrainingPlan:
    """The plan of a configuration on a training set of ``num_examples`` examples."""
    mechanism = mechanism_of(config)
    return TrainingPlan(
        mechanism=mechanism,
        sampler=PoissonSampler(num_examples, mechanism.sampling_prob),
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
    most 1/2, under both neighbouring relations (`trainer.quantile_clipping.shifted_count`). With
    noise of standard deviation ``z_g C`` on the one and ``sigma_b`` on the other, each divided by
    its noise, the pair is one Gaussian mechanism of standard deviation 1 and of L2 sensitivity
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


def mechanism_of(config: TrialConfig) -> DpSgdMechanism:
    """The mechanism that a trial of this configuration runs; needs no data and no JAX."""
    return DpSgdMechanism(
        noise_multiplier=config.noise_multiplier,
        sampling_prob=config.sampling_prob,
        iterations=config.iterations,
        neighboring_relation=config.neighboring_relation,
    )
