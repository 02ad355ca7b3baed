"""The augmentation section: random views of an example, the same for every trial of a sweep."""

from typing import Annotated

from pydantic import Field, model_validator

from sweeps.spec.domains import MAX_WHOLE
from sweeps.spec.refusals import Allowed, Refusal, refused
from sweeps.spec.section import Section, YesOrNo
from trainer.config_sections import MOST_PADDING


class AugmentationSpec(Section):
    """Random views of an example, whose gradients are averaged before they are clipped.

    They cost no privacy: an example still adds one clipped gradient.
    """

    views: Annotated[Annotated[int, Field(ge=1, le=MAX_WHOLE)], Allowed("a whole number >= 1")] = (
        Field(default=1, description="Views of an example in a step; time grows with them.")
    )
    flip: YesOrNo = Field(
        default=False, description="Mirrors a view left to right, with probability 1/2."
    )
    crop_padding: Annotated[
        Annotated[int, Field(ge=0, le=MOST_PADDING)],
        Allowed(f"a whole number from 0 to {MOST_PADDING}"),
    ] = Field(
        default=0,
        description="Crops a view at random from the image padded by so many pixels on each "
        "side; 0 crops nothing.",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> "AugmentationSpec":
        if self.views > 1 and not self.flip and self.crop_padding == 0:
            message = (
                f"{self.views} is not allowed without flip and crop_padding, for all views would "
                "be the same; allowed: 1, or one of these"
            )
            raise refused(Refusal(("views",), message))
        return self
