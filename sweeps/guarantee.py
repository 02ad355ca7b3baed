"""What a sweep promises, in the words that stand on everything it shows."""

from collections.abc import Mapping
from typing import Any

import accounting

_EVALUATION = "The evaluation examples are treated as public and get no protection."


def guarantee(privacy: Mapping[str, Any]) -> str:
    """The promise of a specification's privacy section, and its limits.

    Args:
        privacy: The section as plain data: ``policy``, ``target_epsilon``, ``target_delta`` and
            ``neighboring_relation``.
    """
    promise = accounting.guarantee(
        privacy["policy"],
        epsilon=privacy["target_epsilon"],
        delta=privacy["target_delta"],
        neighboring_relation=privacy["neighboring_relation"],
    )
    return f"{promise} {_EVALUATION}"
