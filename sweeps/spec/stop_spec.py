"""The stop section: when a sweep begins no more trials. What runs goes to its end."""

from typing import Annotated

from pydantic import Field

from sweeps.spec.refusals import Allowed
from sweeps.spec.section import PositiveNumber, PositiveWhole, Section

_NumberOrNull = Annotated[PositiveNumber | None, Allowed("null or a number > 0")]
_PartOrNull = Annotated[
    Annotated[float, Field(gt=0, le=1)] | None, Allowed("null or a number above 0, up to 1")
]


class StopSpec(Section):
    """Rules of which the first that holds ends a sweep, once what runs has ended."""

    utility: _PartOrNull = Field(
        default=None, description="A trial has reported this eval_accuracy or more."
    )
    epsilon: _NumberOrNull = Field(
        default=None,
        description="The budget has spent this epsilon or more, whoever spent it. Not under "
        "per_trial, where nothing adds up.",
    )
    budget_left: _PartOrNull = Field(
        default=None,
        description="This part of the budget, or less, is neither spent nor promised. Not under "
        "per_trial.",
    )
    trials: Annotated[PositiveWhole | None, Allowed("null or a whole number >= 1")] = Field(
        default=None, description="So many trials have run to their end or been pruned."
    )
    time_budget_s: _NumberOrNull = Field(
        default=None,
        description="Trials have run for so many seconds: the time in which any did.",
    )
    accelerator_hours: _NumberOrNull = Field(
        default=None,
        description="Trials have taken so many hours of their workers, each times its GPUs, or "
        "times its CPUs where it has no GPU.",
    )
