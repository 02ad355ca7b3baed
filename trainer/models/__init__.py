"""The models, free of anything that mixes examples.

Batch normalisation would make one example's gradient depend on the others and void the
guarantee, so every network here normalises within one example: by groups of channels (Wu & He
2018) or by layer (Ba et al. 2016). None draws random numbers after initialisation.

`registry` turns a configuration into a module, `loss` is what training minimises. The networks:
`small_networks`, `resnet`, `wide_resnet` (with `standardized_conv`), `vision_transformer` and
`text_transformer` (both made of `transformer_block`). Parameters are created in float32, and the
larger networks compute in any ``dtype`` (`precision`).
"""

from trainer.models.loss import cross_entropy
from trainer.models.registry import init_params, make_model
from trainer.models.resnet import ResNet
from trainer.models.small_networks import Cnn, LogisticRegression, Mlp
from trainer.models.standardized_conv import StandardizedConv
from trainer.models.text_transformer import TextTransformer
from trainer.models.vision_transformer import VisionTransformer
from trainer.models.wide_resnet import WideResNet

__all__ = [
    "Cnn",
    "LogisticRegression",
    "Mlp",
    "ResNet",
    "StandardizedConv",
    "TextTransformer",
    "VisionTransformer",
    "WideResNet",
    "cross_entropy",
    "init_params",
    "make_model",
]
