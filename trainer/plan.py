"""One object from which sampling, clipping, noise and accounting all take their numbers.

The accounted mechanism is the executed one because there is a single place that holds the
facts: the sampler draws with the mechanism's probability, the compiled step scales its noise by
the mechanism's multiplier, and the loop runs and charges the mechanism's iterations.
"""

import dataclasses

from accounting import DpSgdMechanism
from trainer.config import TrialConfig
from trainer.sampling import PoissonSampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a trial does to its data.

    Attributes:
        mechanism: What the accountant sees.
        sampler: Draws the batches.
        l2_clip_norm: Bound on one example's gradient norm: the sum's sensitivity.
        expected_batch_size: Divisor of the noisy sum.
    """

    mechanism: DpSgdMechanism
    sampler: PoissonSampler
    l2_clip_norm: float
    expected_batch_size: float


def make_plan(config: TrialConfig, num_examples: int) -> TrainingPlan:
    """The plan of a configuration on a training set of ``num_examples`` examples."""
    mechanism = mechanism_of(config)
    return TrainingPlan(
        mechanism=mechanism,
        sampler=PoissonSampler(num_examples, mechanism.sampling_prob),
        l2_clip_norm=config.l2_clip_norm,
        expected_batch_size=config.expected_batch_size,
    )


def mechanism_of(config: TrialConfig) -> DpSgdMechanism:
    """The mechanism that a trial of this configuration runs; needs no data and no JAX."""
    return DpSgdMechanism(
        noise_multiplier=config.noise_multiplier,
        sampling_prob=config.sampling_prob,
        iterations=config.iterations,
        neighboring_relation=config.neighboring_relation,
    )
