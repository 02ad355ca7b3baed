"""The averaging section: averages of the parameters, the same for every trial of a sweep."""

from typing import Annotated

from pydantic import Field

from sweeps.spec.refusals import Allowed
from sweeps.spec.section import Section, YesOrNo


class AveragingSpec(Section):
    """Averages of the iterates, measured beside the last one.

    They cost no privacy. Schedulers and pictures go by the last iterate all the same.
    """

    ema_decay: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None, Allowed("null or a number in (0, 1)")
    ] = Field(
        default=None,
        description="Decay of an exponential moving average, such as 0.99; null for none.",
    )
    polyak: YesOrNo = Field(default=False, description="Keeps the mean of all iterates.")
