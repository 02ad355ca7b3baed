"""The scheduler section: whether and when trials are pruned. Names are Ray Tune's."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from sweeps.spec.domains import MAX_WHOLE
from sweeps.spec.refusals import Allowed, Refusal
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


class HyperBandSpec(Section):
    """HyperBand: brackets of trials, each of which goes on with its best from rung to rung."""

    name: Annotated[Literal["hyperband"], Allowed("hyperband")] = Field(
        description="The scheduler."
    )
    grace_period: Annotated[PositiveWhole | None, Allowed("null or a whole number >= 1")] = Field(
        default=None,
        description="Steps before a trial may be pruned; from report_every_steps, which null "
        "stands for, to the most iterations / reduction_factor.",
    )
    reduction_factor: Annotated[int, Field(ge=2, le=MAX_WHOLE), Allowed("a whole number >= 2")] = (
        Field(default=3, description="One trial in so many of a bracket goes on from each rung.")
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
    AsyncHyperBandSpec | FifoSpec | HyperBandSpec | MedianStoppingRuleSpec,
    Field(discriminator="name"),
    Allowed(
        "{name: fifo}, {name: async_hyperband, grace_period: ...}, {name: hyperband} or "
        "{name: median_stopping_rule, grace_period: ...}"
    ),
]
SCHEDULERS: dict[str, type[BaseModel]] = {
    "async_hyperband": AsyncHyperBandSpec,
    "fifo": FifoSpec,
    "hyperband": HyperBandSpec,
    "median_stopping_rule": MedianStoppingRuleSpec,
}


_NOTHING = "(otherwise nothing can be pruned: {name: fifo})"


def scheduler_refusals(scheduler: SchedulerSpec, *, every: int, most: int) -> Iterator[Refusal]:
    """Why a scheduler could not prune anything: that is done at reports, before the last step.

    Args:
        scheduler: The section.
        every: Steps between two reports.
        most: The most iterations of a trial.
    """
    path = ("scheduler", "grace_period")
    match scheduler:
        case FifoSpec():
            return
        case HyperBandSpec(grace_period=grace, reduction_factor=factor):
            if most // factor < every:
                message = (
                    f"{factor} is not allowed; allowed: at most the most iterations, {most}, / "
                    f"report_every_steps, {every} {_NOTHING}"
                )
                yield Refusal(("scheduler", "reduction_factor"), message)
            elif grace is not None and not every <= grace <= most // factor:
                message = (
                    f"{grace} is not allowed; allowed: from report_every_steps, {every}, to the "
                    f"most iterations / reduction_factor, {most // factor} {_NOTHING}"
                )
                yield Refusal(path, message)
        case AsyncHyperBandSpec(grace_period=grace) | MedianStoppingRuleSpec(grace_period=grace):
            if not every <= grace < most:
                message = (
                    f"{grace} is not allowed; allowed: from report_every_steps, {every}, to below "
                    f"the most iterations, {most} {_NOTHING}"
                )
                yield Refusal(path, message)
