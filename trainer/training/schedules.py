"""How the learning rate moves over a trial: a factor for each step, reckoned before it is taken.

A factor depends on the step's number and on the trial's length alone, so schedules hold no state,
touch no data, and a resumed trial is on its curve at once. They reach the compiled program as
numbers, one for each step: trials that differ in their schedules share it. They are optax's
schedules of the same names; a plan is made where no JAX is imported, so not by optax.
"""

import numpy as np

from trainer.config import ScheduleName


def learning_rate_factors(
    schedule: ScheduleName, warmup_steps: int, iterations: int
) -> np.ndarray:
    """What the learning rate of each step is multiplied with.

    Warm-up rises in equal parts, ``1 / warmup_steps`` in the first step and 1 in the last of its
    steps. After it ``constant`` stays at 1, and ``linear`` and ``cosine`` (Loshchilov & Hutter
    2017, "SGDR", equation 5, without restarts) fall so that the step after the last would
    have 0.

    Args:
        schedule: One of `ScheduleName`.
        warmup_steps: How many steps the warm-up takes, >= 0.
        iterations: How many steps the trial takes, >= 1.

    Returns:
        float32 ``[iterations]``, each in (0, 1].
    """
    steps = np.arange(iterations)
    warm = np.minimum(1.0, (steps + 1) / max(1, warmup_steps))
    part = np.maximum(0, steps - warmup_steps) / max(1, iterations - warmup_steps)
    match schedule:
        case "constant":
            falling = np.ones(iterations)
        case "linear":
            falling = 1 - part
        case "cosine":
            falling = (1 + np.cos(np.pi * part)) / 2
    return (warm * falling).astype(np.float32)
