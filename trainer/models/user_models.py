"""Models of a user's own, by import path.

``package.module:attribute`` names something that is called with the number of classes and gives
a Flax module: a module class whose first field that is, or a function. The module maps float32
images ``[batch, height, width, channels]`` to float32 logits ``[batch, num_classes]``.

Importing runs the user's code, so whoever serves others decides before this is called whose code
that may be; here everything is loaded that the caller names.
"""

import difflib
import functools
import importlib
from types import ModuleType
from typing import Any

import flax.linen as nn

from trainer.errors import ModelError


@functools.lru_cache(maxsize=64)
def load_user_model(path: str, num_classes: int) -> nn.Module:
    """Loads a user model, once per process: trials of one model share compiled programs.

    Args:
        path: ``package.module:attribute``, as `trainer.config.ModelConfig` takes it.
        num_classes: What the attribute is called with, >= 1.

    Raises:
        ModelError: If there is no such module or attribute, or what it gives is no Flax module.
    """
    module_name, _, attribute = path.partition(":")
    make = _attribute(path, _module(path, module_name), attribute)
    if not callable(make):
        raise ModelError(
            f"model {path!r}: {attribute} is {make!r}; allowed is a flax.linen module class, or a "
            "function of the number of classes that gives a module"
        )
    try:
        model = make(num_classes)
    except Exception as error:
        raise ModelError(
            f"model {path!r}: {attribute}({num_classes}) failed with {said(error)}; it is called "
            "with the number of classes alone"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model {path!r}: {attribute}({num_classes}) gave {type(model).__qualname__}; allowed "
            "is an instance of flax.linen.Module"
        )
    try:
        hash(model)
    except TypeError as error:
        raise ModelError(
            f"model {path!r}: {attribute}({num_classes}) has fields that cannot be hashed, so its "
            "compiled programs could not be found again; allowed are tuples instead of lists"
        ) from error
    return model


def _module(path: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name + ".").startswith(error.name + "."):
            raise ModelError(
                f"model {path!r}: there is no module {error.name!r} here; install its package "
                "where trials run, or put its folder on PYTHONPATH"
            ) from error
        raise ModelError(f"model {path!r}: importing {name} failed with {said(error)}") from error
    except Exception as error:
        raise ModelError(f"model {path!r}: importing {name} failed with {said(error)}") from error


def _attribute(path: str, module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name)
    except AttributeError as error:
        similar = difflib.get_close_matches(name, dir(module), n=1)
        hint = f" (did you mean {similar[0]}?)" if similar else ""
        raise ModelError(
            f"model {path!r}: {module.__name__} has no attribute {name}{hint}"
        ) from error


def said(error: Exception) -> str:
    """An error's class and the first line of what it says."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
