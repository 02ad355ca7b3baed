"""The mechanism that is accounted: one frozen value with the public facts of one training run.

DP-SGD repeats one step `iterations` times. A step draws every example independently with
probability `sampling_prob` (Poisson sampling), clips the gradient of each drawn example, sums,
and adds Gaussian noise whose standard deviation is `noise_multiplier` times the sensitivity of
the sum. Those three numbers and the neighbouring relation decide the privacy cost; learning
rate, model and clip norm do not.
"""

# dp-accounting and scipy ship no stubs.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from accounting import _validate

if TYPE_CHECKING:
    import dp_accounting

NeighboringRelation = Literal["add_or_remove_one", "zero_out"]
NEIGHBORING_RELATIONS: tuple[NeighboringRelation, ...] = ("add_or_remove_one", "zero_out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpSgdMechanism:
    """Poisson-sampled Gaussian mechanism, repeated.

    Numbers are normalised to Python `float` and `int`, so that mechanisms built from numpy
    numbers compare equal, hash equal and cost the same.

    Attributes:
        noise_multiplier: Standard deviation of the noise divided by the sensitivity; finite, > 0.
        sampling_prob: Probability with which each example takes part in a step; in (0, 1].
        iterations: How often the step runs; an integer from 1 to 1e12.
        neighboring_relation: What one person's data may change.
            "add_or_remove_one": one example more or less; the size of the data set is private.
            "zero_out": one example is blanked, so that its clipped gradient is zero; the size of
            the data set is public. Both cost the same for this mechanism.

    Raises:
        InvalidPrivacyParameter: A field is of the wrong type or out of range.

    Formal guarantees:
        `dp_event` describes this mechanism only if sampling really is Poisson, the sum is divided
        by a constant such as the expected batch size, and no batch is truncated.

    References:
        Abadi et al., "Deep Learning with Differential Privacy", 2016,
        https://arxiv.org/abs/1607.00133
    """

    noise_multiplier: float
    sampling_prob: float
    iterations: int
    neighboring_relation: NeighboringRelation = "add_or_remove_one"

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # The class is frozen; this is its constructor.
        noise_multiplier = _validate.positive("noise_multiplier", self.noise_multiplier)
        set_field(self, "noise_multiplier", noise_multiplier)
        sampling_prob = _validate.probability("sampling_prob", self.sampling_prob)
        set_field(self, "sampling_prob", sampling_prob)
        set_field(self, "iterations", _validate.count("iterations", self.iterations))
        _validate.one_of("neighboring_relation", self.neighboring_relation, NEIGHBORING_RELATIONS)

    def after(self, iterations: int) -> DpSgdMechanism:
        """Returns the same mechanism run another number of times.

        Args:
            iterations: How often the step runs; an integer from 1 to 1e12.

        Raises:
            InvalidPrivacyParameter: `iterations` is not such an integer.
        """
        return dataclasses.replace(self, iterations=iterations)

    def dp_event(self) -> dp_accounting.DpEvent:
        """Returns the mechanism as an event of the accounting library.

        At `sampling_prob` 1 the event is the plain Gaussian, which is the same mechanism.
        """
        import dp_accounting  # Costs about a second, so only on demand.

        event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_prob < 1:
            event = dp_accounting.PoissonSampledDpEvent(self.sampling_prob, event)
        return dp_accounting.SelfComposedDpEvent(event, self.iterations)
