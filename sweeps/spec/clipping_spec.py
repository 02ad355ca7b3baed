"""The clipping section: how gradients are clipped, the same for every trial of a sweep.

Whether the count of `quantile` leaves anything for the gradients depends on a trial's batch size
and noise, so `sweeps.admission` decides it for each of them.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from sweeps.spec.domains import MAX_WHOLE
from sweeps.spec.refusals import Allowed, Refusal, one_of, refused
from sweeps.spec.section import PositiveNumber, Section
from trainer.config import ClippingEngine, ClippingModeName


class ClippingSpec(Section):
    """How per-example gradients are clipped. All modes cost the same privacy."""

    mode: Annotated[ClippingModeName, one_of(ClippingModeName)] = Field(
        default="flat",
        description="flat: each gradient as a whole. per_layer: each layer to its part of "
        "l2_clip_norm. automatic: each gradient is scaled to l2_clip_norm. quantile: flat, with "
        "a clip norm that begins at l2_clip_norm and follows a quantile of the norms, counted "
        "with noise of its own.",
    )
    target_quantile: Annotated[float, Field(gt=0, lt=1), Allowed("a number in (0, 1)")] = Field(
        default=0.5, description="For quantile: the fraction of gradients to leave unclipped."
    )
    learning_rate: PositiveNumber = Field(
        default=0.2, description="For quantile: step size of the clip norm's geometric update."
    )
    count_noise_stddev: Annotated[
        Annotated[float, Field(gt=0)] | None, Allowed("null or a number > 0")
    ] = Field(
        default=None,
        description="For quantile: standard deviation of the noise on a step's number of "
        "unclipped gradients, more than half of noise_multiplier; null is "
        "expected_batch_size / 20.",
    )
    engine: Annotated[ClippingEngine, one_of(ClippingEngine)] = Field(
        default="auto",
        description="How gradients are computed; it changes time and memory, not the result.",
    )
    microbatch_size: Annotated[
        Annotated[int, Field(ge=1, le=MAX_WHOLE)] | None,
        Allowed("null or a whole number >= 1"),
    ] = Field(
        default=None,
        description="Examples processed at a time, to bound memory; null lets the engine choose.",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> "ClippingSpec":
        refusals = list(_refusals(self))
        if refusals:
            raise refused(*refusals)
        return self


def _refusals(clipping: ClippingSpec) -> Iterator[Refusal]:
    """What is asked for and would have no effect."""
    if clipping.mode == "quantile":
        return
    for name in ("target_quantile", "learning_rate", "count_noise_stddev"):
        default = ClippingSpec.model_fields[name].default
        value = getattr(clipping, name)
        if value != default:
            shown = "null" if default is None else f"{default:g}"
            message = (
                f"{value:g} is not allowed with mode {clipping.mode}, which does not read it; "
                f"allowed: {shown}, or mode quantile"
            )
            yield Refusal((name,), message)
