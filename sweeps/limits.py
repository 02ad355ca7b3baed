"""What a specification allows one trial by itself. Its budget may allow more.

A budget that several sweeps share may be larger than what one of them promises of a trial; under
`open` and `declared` it is that of all trials together, of which one may have a part
(``trial_epsilon``); and a sweep may reckon with a looser accountant than the budget. Whoever lets
a trial spend, at first or later, asks here beside the budget.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import accounting


def limit_of(privacy: Mapping[str, Any]) -> accounting.PrivacyBudget:
    """The limit for one trial.

    Args:
        privacy: The privacy section of a specification as plain data.
    """
    return accounting.PrivacyBudget(
        epsilon=privacy.get("trial_epsilon") or privacy["target_epsilon"],
        delta=privacy["target_delta"],
    )


def check_limit(
    privacy: Mapping[str, Any],
    mechanism: accounting.Mechanism,
    prefix: Sequence[accounting.Mechanism] = (),
    *,
    hint: bool = True,
) -> accounting.Decision:
    """Decides whether a trial keeps to the limit for one trial.

    Args:
        privacy: The privacy section of a specification as plain data.
        mechanism: All that the trial would run.
        prefix: What was spent before on the parameters that it starts from; it counts.
        hint: Whether a refusal also says what would fit, which takes ten times as long.
    """
    return accounting.check_per_trial(
        mechanism, limit_of(privacy), prefix=prefix, accountant=privacy["accountant"], hint=hint
    )
