"""The scheduler section: whether and when trials are pruned. Names are Ray Tune's."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from accounting.policies import Policy
from sweeps.spec.allowed_domains import DRAWN_NUMBERS, DRAWN_NUMBERS_OR_ZERO
from sweeps.spec.domains import MAX_WHOLE, Domain
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


_DrawnNumber = Annotated[
    Annotated[Domain, DRAWN_NUMBERS] | None, Allowed(f"null or {DRAWN_NUMBERS.words}")
]
_DrawnNumberOrZero = Annotated[
    Annotated[Domain, DRAWN_NUMBERS_OR_ZERO] | None,
    Allowed(f"null or {DRAWN_NUMBERS_OR_ZERO.words}"),
]


class HyperparamMutations(Section):
    """What differs between a trial and the one that takes its place; null for what does not."""

    learning_rate: _DrawnNumber = Field(default=None, description="Step size.")
    l2_clip_norm: _DrawnNumber = Field(
        default=None, description="Bound on one example's gradient norm."
    )
    weight_decay: _DrawnNumberOrZero = Field(default=None, description="Decoupled weight decay.")
    noise_multiplier: _DrawnNumber = Field(
        default=None, description="Noise; with less of it the rest of a trial costs more."
    )

    def given(self) -> dict[str, Domain]:
        """The fields that differ, in the order in which they are declared."""
        found = ((name, getattr(self, name)) for name in type(self).model_fields)
        return {name: domain for name, domain in found if domain is not None}


class PbtSpec(Section):
    """Population based training: the worst make room for variants of the best."""

    name: Annotated[Literal["pbt"], Allowed("pbt")] = Field(description="The scheduler.")
    perturbation_interval: PositiveWhole = Field(
        description="After so many steps the population is compared, and again after as many "
        "more; from report_every_steps to below the most iterations."
    )
    hyperparam_mutations: HyperparamMutations = Field(
        description="Fields that differ between a trial and its variant, and what they are drawn "
        "from when they are drawn anew. Else a number is multiplied by 1.2 or 0.8, and one of a "
        "choice becomes its neighbour."
    )
    quantile_fraction: Annotated[
        float, Field(gt=0, le=0.5), Allowed("a number > 0, at most 0.5")
    ] = Field(
        default=0.25,
        description="How large a part of the population makes room, for variants of as large a "
        "part; at most half.",
    )
    resample_probability: Annotated[float, Field(ge=0, le=1), Allowed("a number from 0 to 1")] = (
        Field(default=0.25, description="How often a field is drawn anew.")
    )


SchedulerSpec = Annotated[
    AsyncHyperBandSpec | FifoSpec | HyperBandSpec | MedianStoppingRuleSpec | PbtSpec,
    Field(discriminator="name"),
    Allowed(
        "{name: fifo}, {name: async_hyperband, grace_period: ...}, {name: hyperband}, "
        "{name: median_stopping_rule, grace_period: ...} or {name: pbt, ...}"
    ),
]
SCHEDULERS: dict[str, type[BaseModel]] = {
    "async_hyperband": AsyncHyperBandSpec,
    "fifo": FifoSpec,
    "hyperband": HyperBandSpec,
    "median_stopping_rule": MedianStoppingRuleSpec,
    "pbt": PbtSpec,
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
        case PbtSpec(perturbation_interval=interval):
            if not every <= interval < most:
                message = (
                    f"{interval} is not allowed; allowed: from report_every_steps, {every}, to "
                    f"below the most iterations, {most} {_NOTHING}"
                )
                yield Refusal(("scheduler", "perturbation_interval"), message)
            if not scheduler.hyperparam_mutations.given():
                names = ", ".join(HyperparamMutations.model_fields)
                message = f"names no field; allowed: at least one of {names}"
                yield Refusal(("scheduler", "hyperparam_mutations"), message, at_key=True)
        case AsyncHyperBandSpec(grace_period=grace) | MedianStoppingRuleSpec(grace_period=grace):
            if not every <= grace < most:
                message = (
                    f"{grace} is not allowed; allowed: from report_every_steps, {every}, to below "
                    f"the most iterations, {most} {_NOTHING}"
                )
                yield Refusal(path, message)


def population_refusals(
    scheduler: SchedulerSpec, *, policy: Policy, search: str, num_listed: int, bands: int
) -> Iterator[Refusal]:
    """What does not go with pbt, whose trials go on from each other's checkpoints.

    Args:
        scheduler: The section.
        policy: Of the privacy section; private_selection allows no scheduler at all.
        search: The name of the search.
        num_listed: How many trials are known before anything runs.
        bands: Over how many steps noise is correlated.
    """
    if not isinstance(scheduler, PbtSpec):
        return
    if policy == "declared":
        message = (
            "pbt is not allowed under declared, whose list of trials is fixed before the first of "
            "them runs; allowed: another scheduler, or the policy open or per_trial"
        )
        yield Refusal(("scheduler", "name"), message)
    if search == "optuna":
        message = (
            "optuna is not allowed with pbt, whose population is there from the beginning; "
            "allowed: random or quasi_random"
        )
        yield Refusal(("search", "name"), message)
    elif num_listed < 2:
        message = (
            "1 is not allowed with pbt and a space without a grid; allowed: at least 2, the size "
            "of the population"
        )
        yield Refusal(("search", "num_samples"), message)
    if bands > 1:
        message = (
            f"{bands} is not allowed with pbt, for noise that is correlated is that of a whole "
            "trial, from its first step; allowed: 1"
        )
        yield Refusal(("mechanism", "bands"), message)
