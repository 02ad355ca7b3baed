"""Per-example gradient clipping, exact for any model and as cheap as it can be."""

from trainer.clipping.choice import Choice
from trainer.clipping.gradient import Engine, clipped_grad, settle
from trainer.clipping.modes import AUTOMATIC_STABILITY, ClippingMode

__all__ = ["AUTOMATIC_STABILITY", "Choice", "ClippingMode", "Engine", "clipped_grad", "settle"]
