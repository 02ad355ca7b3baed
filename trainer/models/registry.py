"""From a model's name to its module and first parameters.

A module says what to compute, not for which images: what depends on their size (a stem, a patch
size) is chosen by the module when it first sees them.
"""

from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.config import ModelConfig, ModelName
from trainer.models.coupling import check_examples_are_apart
from trainer.models.nf_resnet import NfResNet
from trainer.models.resnet import BottleneckBlock, ResNet
from trainer.models.small_networks import Cnn, LogisticRegression, Mlp
from trainer.models.user_models import load_user_model
from trainer.models.vision_transformer import VisionTransformer
from trainer.models.wide_resnet import WideResNet


def make_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The module that a configuration names; the last layer's parameters are under ``head``.

    Args:
        config: A model of a user is imported here, and not checked: `make_checked_model`.
        num_classes: Classes, >= 1.

    Raises:
        ModelError: If a user model cannot be loaded.
    """
    # None is the type of inputs and parameters, which is float32.
    dtype = jnp.bfloat16 if config.dtype == "bfloat16" else None
    match config.name:
        case "logistic_regression":
            return LogisticRegression(num_classes)
        case "mlp":
            return Mlp(config.hidden_sizes, num_classes, dtype=dtype)
        case "cnn":
            return Cnn(config.channels, num_classes, dtype=dtype)
        case "resnet18":
            return ResNet(num_classes, stage_sizes=(2, 2, 2, 2), dtype=dtype)
        case "resnet50":
            return ResNet(num_classes, (3, 4, 6, 3), BottleneckBlock, dtype=dtype)
        case "wrn_16_4":
            return WideResNet(num_classes, depth=16, widening=4, dtype=dtype)
        case "wrn_28_10":
            return WideResNet(num_classes, depth=28, widening=10, dtype=dtype)
        case "wrn_40_4":
            return WideResNet(num_classes, depth=40, widening=4, dtype=dtype)
        case "nf_resnet50":
            return NfResNet(num_classes, stage_sizes=(3, 4, 6, 3), dtype=dtype)
        case "vit_tiny":
            return VisionTransformer(num_classes, width=192, heads=3, dtype=dtype)
        case "vit_small":
            return VisionTransformer(num_classes, width=384, heads=6, dtype=dtype)
        case "vit_base":
            return VisionTransformer(num_classes, width=768, heads=12, dtype=dtype)
        case _:
            return load_user_model(config.name, num_classes)


def make_checked_model(
    config: ModelConfig, image_shape: tuple[int, ...], num_classes: int
) -> nn.Module:
    """The module that a configuration names, once it is known to keep examples apart.

    The models of this package are checked by its tests, a user's before it is trained.

    Args:
        config: The model.
        image_shape: ``(height, width, channels)`` of one example.
        num_classes: Classes, >= 1.

    Raises:
        ModelError: If a user model cannot be loaded, or does not keep examples apart.
    """
    model = make_model(config, num_classes)
    if config.name not in get_args(ModelName):
        check_examples_are_apart(model, image_shape, num_classes)
    return model


def init_params(
    model: nn.Module,
    image_shape: tuple[int, ...],
    seed: int,
    *,
    input_dtype: jax.typing.DTypeLike = jnp.float32,
) -> Any:
    """Fresh parameters, a float32 pytree that depends on ``seed`` and shapes alone.

    Args:
        model: From `make_model`, or any module of this package.
        image_shape: Shape of one example: ``(height, width, channels)``, or ``(length,)`` for
            token sequences.
        seed: Seed of the initialisation.
        input_dtype: Type of the examples; an integer type for token sequences.
    """
    inputs = jnp.zeros((1, *image_shape), input_dtype)
    return model.init(jax.random.key(seed), inputs)["params"]
