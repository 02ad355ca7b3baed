"""What a trial tells the world, and how private each part of it is.

The type of every field of a report says which of three it is:

* ``Public``: known without looking at the training data (the step, delta).
* ``Dp``: computed from private data through an accounted mechanism alone, so covered by
  the trial's guarantee (epsilon, the accuracy of the released parameters on public examples).
* ``Private``: an un-noised function of private data.

`releasable` is the only way out of the trainer for a report's numbers. A field whose type says
nothing counts as private, so forgetting a label cannot leak.
"""

import dataclasses
import typing
from typing import Annotated, Any, Literal, TypeVar

Label = Literal["public", "dp", "private"]
Outcome = Literal["running", "completed", "diverged"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Stands in a field's type and says how private the field is."""

    label: Label


Public = Annotated[T, Labelled("public")]
Dp = Annotated[T, Labelled("dp")]
Private = Annotated[T, Labelled("private")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialReport:
    """One report of a trial, made after every ``report_every_steps`` steps.

    Attributes:
        step: Steps taken, in [1, iterations].
        epsilon: Privacy spent by this trial so far at ``delta``, all its branches included.
        delta: The delta that epsilon is stated at.
        eval_accuracy: Fraction of held-out examples classified correctly, in [0, 1]; with noise,
            and then possibly outside, where they are private. None where it may not be told.
        eval_loss: Mean cross-entropy on held-out examples in nats; may be NaN when diverged.
            None where they are private.
        ema_eval_accuracy: The same for the moving average of the parameters, if it is kept.
        ema_eval_loss: Likewise.
        polyak_eval_accuracy: The same for the mean of all iterates, if it is kept.
        polyak_eval_loss: Likewise.
        eval_epsilon: What counting with noise has cost the held-out examples so far at ``delta``;
            None where nothing is counted with noise.
        l2_clip_norm: Bound on one example's gradient norm in the next step. A constant of the
            configuration, or with `quantile` clipping computed from noisy counts alone.
        outcome: ``running``, ``completed`` (all iterations done) or ``diverged`` (the
            parameters are no longer finite; they are a DP output, so looking is free).
        non_private_eval_accuracy: Exact accuracy on private held-out examples, for who asked for
            non-private evaluation.
        non_private_eval_loss: Likewise.
    """

    step: Public[int]
    epsilon: Dp[float]
    delta: Public[float]
    eval_accuracy: Dp[float | None]
    eval_loss: Dp[float | None]
    ema_eval_accuracy: Dp[float | None] = None
    ema_eval_loss: Dp[float | None] = None
    polyak_eval_accuracy: Dp[float | None] = None
    polyak_eval_loss: Dp[float | None] = None
    eval_epsilon: Dp[float | None] = None
    l2_clip_norm: Dp[float]
    outcome: Dp[Outcome]
    non_private_eval_accuracy: Private[float | None] = None
    non_private_eval_loss: Private[float | None] = None


def label_of(report_type: type, field: str) -> Label:
    """How private a field of a report is."""
    hint = typing.get_type_hints(report_type, include_extras=True).get(field)
    for note in getattr(hint, "__metadata__", ()):
        if isinstance(note, Labelled):
            return note.label
    return "private"


def releasable(report: Any) -> dict[str, Any]:
    """The fields of a report that may leave the trainer.

    Args:
        report: A `TrialReport`, or a dataclass like it.

    Returns:
        Field name to value, for fields labelled ``public`` or ``dp`` only, without those that
        are None.
    """
    return {
        field.name: value
        for field in dataclasses.fields(report)
        if label_of(type(report), field.name) in ("public", "dp")
        and (value := getattr(report, field.name)) is not None
    }
