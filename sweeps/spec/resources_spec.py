"""The resources section: what trials take from the cluster, and how many share that."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from sweeps.spec.refusals import Allowed, Refusal
from sweeps.spec.section import PositiveNumber, PositiveWhole, Section


class ResourcesSpec(Section):
    """What trials take from the cluster."""

    max_concurrent_trials: PositiveWhole = Field(
        default=1, description="Trials at a time; with trials_per_worker, workers at a time."
    )
    cpus_per_trial: PositiveNumber = Field(
        default=1.0, description="CPUs of a trial; a fraction only below 1."
    )
    gpus_per_trial: Annotated[float, Field(ge=0), Allowed("a number >= 0")] = Field(
        default=0.0, description="GPUs of a trial; a fraction only below 1."
    )
    trials_per_worker: PositiveWhole = Field(
        default=1,
        description="Trials of one shape that a worker runs at once, as one program, with what "
        "one trial takes of the cluster.",
    )


def resource_refusals(
    resources: ResourcesSpec, *, placement: str, bands: int, policy: str
) -> Iterator[Refusal]:
    """What is wrong with the resources, by themselves and beside other sections.

    Args:
        resources: The section.
        placement: Where the examples are.
        bands: Of the mechanism.
        policy: Of the budget.
    """
    for name in ("cpus_per_trial", "gpus_per_trial"):
        amount = float(getattr(resources, name))
        if amount > 1 and not amount.is_integer():
            message = f"{amount:g} is not allowed; allowed: a whole number, or a fraction below 1"
            yield Refusal(("resources", name), message)
    several = resources.trials_per_worker
    if several == 1:
        return
    reasons = {
        "gpus_per_trial above 1, for one device runs the program": resources.gpus_per_trial > 1,
        "placement: streamed, for the examples have to be on the device": placement == "streamed",
        "mechanism.bands above 1, whose trials are gone on with by one program alone": bands > 1,
        "policy: private_selection, whose trials run one by one": policy == "private_selection",
    }
    for reason, holds in reasons.items():
        if holds:
            message = f"{several} is not allowed with {reason}; allowed: 1"
            yield Refusal(("resources", "trials_per_worker"), message)
