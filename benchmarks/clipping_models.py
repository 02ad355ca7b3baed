"""The models of the clipping benchmark: what they are, their losses and their example inputs.

Inputs are random from a fixed seed: how long a gradient takes does not depend on what the
pictures show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.config import ModelConfig
from trainer.models import TextTransformer, init_params, make_model

Batch = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Case:
    """A model and the batch that it is measured on.

    Attributes:
        name: What the case is called in the table.
        batch_size: Examples of one call.
        example_shape: Shape of one input, without the batch axis.
        num_classes: Width of the logits.
        model: Makes the module.
        vocabulary: How many tokens there are, where inputs are tokens and not pixels.
        opt_in: Whether it is measured only when asked for by name.
    """

    name: str
    batch_size: int
    example_shape: tuple[int, ...]
    num_classes: int
    model: Callable[[], nn.Module]
    vocabulary: int | None = None
    opt_in: bool = False


def _images(
    name: str, batch_size: int, side: int = 32, num_classes: int = 10, **config: Any
) -> Case:
    """A case of one of the trainer's models on square images."""
    options = {"name": name, **config}
    model = partial(_trainer_model, options, num_classes)
    return Case(name, batch_size, (side, side, 3), num_classes, model)


def _trainer_model(options: dict[str, Any], num_classes: int) -> nn.Module:
    return make_model(ModelConfig(**options), num_classes)


CASES: dict[str, Case] = {
    "mlp": _images("mlp", 64, hidden_sizes=(512, 512, 512)),
    "cnn": _images("cnn", 64, channels=(16, 32)),
    "wrn_16_4": _images("wrn_16_4", 32),
    "resnet18": _images("resnet18", 32),
    "wrn_40_4": _images("wrn_40_4", 16),
    "vit_small": _images("vit_small", 16),
    "vit_base": _images("vit_base", 8),
    "text_transformer": Case(
        "text_transformer",
        16,
        (128,),
        2,
        partial(TextTransformer, 2, 8192, 128, width=256, depth=4, heads=4),
        vocabulary=8192,
    ),
    "vit_base_224": Case(
        "vit_base_224",
        4,
        (224, 224, 3),
        1000,
        partial(_trainer_model, {"name": "vit_base"}, 1000),
        opt_in=True,
    ),
}


@dataclass(frozen=True)
class Problem:
    """A case with everything that JAX needs for it.

    Attributes:
        loss: ``loss(params, inputs, labels)``, the mean cross entropy of a batch.
        params: Fresh parameters.
        batch: ``batch(size)`` gives inputs and labels.
    """

    loss: Callable[[Any, jax.Array, jax.Array], jax.Array]
    params: Any
    batch: Callable[[int], Batch]


def make_problem(case: Case) -> Problem:
    """The loss of a case, its parameters and its example inputs."""
    model = case.model()
    dtype = jnp.float32 if case.vocabulary is None else jnp.int32

    def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def batch(size: int) -> Batch:
        rng = np.random.default_rng(1)
        shape = (size, *case.example_shape)
        if case.vocabulary is None:
            inputs = rng.standard_normal(shape, np.float32)
        else:
            inputs = rng.integers(0, case.vocabulary, shape, np.int32)
        labels = rng.integers(0, case.num_classes, size, np.int32)
        return jnp.asarray(inputs), jnp.asarray(labels)

    initialize = jax.jit(partial(init_params, model, case.example_shape, 0, input_dtype=dtype))
    return Problem(loss, initialize(), batch)
