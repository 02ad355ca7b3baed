"""From a model's name to its module and first parameters.

A module says what to compute, not for which images: what depends on their size (a stem, a patch
size) is chosen by the module when it first sees them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from trainer.config import ModelConfig
from trainer.models.resnet import ResNet
from trainer.models.small_networks import Cnn, LogisticRegression, Mlp
from trainer.models.vision_transformer import VisionTransformer
from trainer.models.wide_resnet import WideResNet


def make_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The module that a configuration names."""
    match config.name:
        case "logistic_regression":
            return LogisticRegression(num_classes)
        case "mlp":
            return Mlp(config.hidden_sizes, num_classes)
        case "cnn":
            return Cnn(config.channels, num_classes)
        case "resnet18":
            return ResNet(num_classes, stage_sizes=(2, 2, 2, 2))
        case "wrn_16_4":
            return WideResNet(num_classes, depth=16, widening=4)
        case "wrn_40_4":
            return WideResNet(num_classes, depth=40, widening=4)
        case "vit_tiny":
            return VisionTransformer(num_classes, width=192, heads=3)
        case "vit_small":
            return VisionTransformer(num_classes, width=384, heads=6)
        case "vit_base":
            return VisionTransformer(num_classes, width=768, heads=12)


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
