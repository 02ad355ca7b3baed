"""What a trial tells the world, and how private each part of it is.

Every field of a report carries one of three labels in its metadata:

* ``public``: known without looking at the training data (the step, delta).
* ``dp``: computed from the training data through the accounted mechanism alone, so covered by
  the trial's guarantee (epsilon, the accuracy of the released parameters on public examples).
* ``private``: an un-noised function of the training data.

`releasable` is the only way out of the trainer for a report's numbers. A field that nobody
labelled counts as private, so forgetting a label cannot leak.
"""

import dataclasses
from typing import Any, Literal

Label = Literal["public", "dp", "private"]
Outcome = Literal["running", "completed", "diverged"]


PUBLIC: dict[str, Label] = {"label": "public"}
DP: dict[str, Label] = {"label": "dp"}
PRIVATE: dict[str, Label] = {"label": "private"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialReport:
    """One report of a trial, made after every ``report_every_steps`` steps.

    Attributes:
        step: Steps taken, in [1, iterations].
        epsilon: Privacy spent by this trial so far at ``delta``, all its branches included.
        delta: The delta that epsilon is stated at.
        eval_accuracy: Fraction of held-out examples classified correctly, in [0, 1].
        eval_loss: Mean cross-entropy on held-out examples in nats; may be NaN when diverged.
        l2_clip_norm: Bound on one example's gradient norm in the next step. A constant of the
            configuration, or with `quantile` clipping computed from noisy counts alone.
        outcome: ``running``, ``completed`` (all iterations done) or ``diverged`` (the
            parameters are no longer finite; they are a DP output, so looking is free).
    """

    step: int = dataclasses.field(metadata=PUBLIC)
    epsilon: float = dataclasses.field(metadata=DP)
    delta: float = dataclasses.field(metadata=PUBLIC)
    eval_accuracy: float = dataclasses.field(metadata=DP)
    eval_loss: float = dataclasses.field(metadata=DP)
    l2_clip_norm: float = dataclasses.field(metadata=DP)
    outcome: Outcome = dataclasses.field(metadata=DP)


def releasable(report: Any) -> dict[str, Any]:
    """The fields of a report that may leave the trainer.

    Args:
        report: A `TrialReport`, or a dataclass like it.

    Returns:
        Field name to value, for fields labelled ``public`` or ``dp`` only.
    """
    return {
        field.name: getattr(report, field.name)
        for field in dataclasses.fields(report)
        if field.metadata.get("label") in ("public", "dp")
    }
