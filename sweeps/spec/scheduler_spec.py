"""The scheduler section: whether and when trials are pruned. Names are Ray Tune's."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from sweeps.spec.domains import MAX_WHOLE
from sweeps.spec.refusals import Allowed
from sweeps.spec.section import PositiveWhole, Section, YesOrNo


class FifoSpec(Section):
    """Every trial runs to its end."""

    name: Annotated[Literal["fifo"], Allowed("fifo")] = Field(description="The scheduler.")


class AsyncHyperBandSpec(Section):
    """Asynchronous successive halving: trials that lag behind are pruned."""

    name: Annotated[Literal["async_hyperband"], Allowed("async_hyperband")] = Field(
        description="The scheduler."
    )
    grace_period: PositiveWhole = Field(
        description="Steps before a trial may be pruned; from report_every_steps to below the "
        "most iterations."
    )
    reduction_factor: Annotated[int, Field(ge=2, le=MAX_WHOLE), Allowed("a whole number >= 2")] = (
        Field(default=4, description="One trial in so many goes on from each rung.")
    )
    promotion: YesOrNo = Field(
        default=False,
        description="Whether a trial that is not among the best of a rung waits there, and goes "
        "on once it is; else it is pruned. For one to come to its end it takes reduction_factor "
        "times as many trials for each rung.",
    )


class MedianStoppingRuleSpec(Section):
    """The median rule: trials that were never as good as the others' means are pruned."""

    name: Annotated[Literal["median_stopping_rule"], Allowed("median_stopping_rule")] = Field(
        description="The scheduler."
    )
    grace_period: PositiveWhole = Field(
        description="Steps before a trial may be pruned, and before its reports count in its "
        "mean; from report_every_steps to below the most iterations."
    )
    min_samples_required: PositiveWhole = Field(
        default=3, description="With fewer others that have come as far nothing is pruned."
    )


SchedulerSpec = Annotated[
    AsyncHyperBandSpec | FifoSpec | MedianStoppingRuleSpec,
    Field(discriminator="name"),
    Allowed(
        "{name: fifo}, {name: async_hyperband, grace_period: ...} or "
        "{name: median_stopping_rule, grace_period: ...}"
    ),
]
SCHEDULERS: dict[str, type[BaseModel]] = {
    "async_hyperband": AsyncHyperBandSpec,
    "fifo": FifoSpec,
    "median_stopping_rule": MedianStoppingRuleSpec,
}
