"""Whose code may be trained: the list of user models that an installation allows.

A user model is imported in the worker, with everything that the worker may do. So it has to be
on a list that is not part of the specification: the environment variable
``DP_SWEEPS_USER_MODELS``. It is looked at when a specification is read, before anything starts,
and again in the worker, before anything is imported.
"""

import os
import re
from collections.abc import Mapping

from sweeps.errors import Problem, SpecError, SweepError
from trainer.config import USER_MODEL_PATTERN, is_user_model

USER_MODELS_VARIABLE = "DP_SWEEPS_USER_MODELS"

_NAME = "[A-Za-z_][A-Za-z0-9_]*"
_WILDCARD_PATTERN = rf"{_NAME}(\.{_NAME})*(\.|:)\*"


def check_model_allowed(name: str, environment: Mapping[str, str] | None = None) -> None:
    """Refuses a user model that is not on the list; models of `trainer` always pass.

    The list is separated by commas: ``package.module:attribute``, ``package.module:*`` for every
    attribute of a module, ``package.*`` for every module below a package.

    Args:
        name: ``model.name`` of a specification.
        environment: By default that of this process.

    Raises:
        SpecError: The model is not on the list.
        SweepError: The list cannot be read.
    """
    if not is_user_model(name):
        return
    listed = (os.environ if environment is None else environment).get(USER_MODELS_VARIABLE, "")
    entries = [entry.strip() for entry in listed.split(",") if entry.strip()]
    for entry in entries:
        if not re.fullmatch(f"{USER_MODEL_PATTERN}|{_WILDCARD_PATTERN}", entry):
            raise SweepError(
                f"{USER_MODELS_VARIABLE}: {entry!r} is not allowed; allowed: "
                "package.module:attribute, package.module:* or package.*, separated by commas"
            )
    if not any(_covers(entry, name) for entry in entries):
        allowed = ", ".join(entries) or "none, for it is empty"
        message = (
            f"{name!r} is not among the user models that {USER_MODELS_VARIABLE} lists; allowed: "
            f"{allowed}. Whoever runs this installation can add it there"
        )
        raise SpecError([Problem(message=message, key_path="model.name")])


def _covers(entry: str, name: str) -> bool:
    return name.startswith(entry[:-1]) if entry.endswith("*") else name == entry
