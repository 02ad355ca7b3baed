"""What every section of a specification is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sweeps.spec.domains import MAX_WHOLE
from sweeps.spec.refusals import Allowed

MAX_SEED = 2**31 - 1

PositiveNumber = Annotated[float, Field(gt=0), Allowed("a number > 0")]
PositiveWhole = Annotated[int, Field(ge=1, le=MAX_WHOLE), Allowed("a whole number >= 1")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), Allowed(f"a whole number from 0 to {MAX_SEED}")]
YesOrNo = Annotated[bool, Allowed("true or false")]


class Section(BaseModel):
    """A frozen section that takes nothing it does not know."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )
