"""The models, free of anything that mixes examples.

Batch normalisation would make one example's gradient depend on the others and void the
guarantee, so every network here normalises within one example: by groups of channels (Wu & He
2018) or by layer (Ba et al. 2016). None draws random numbers after initialisation.

`registry` turns a configuration into a module, `loss` is what training minimises. The networks:
`small_networks`, `resnet`, `wide_resnet` and `nf_resnet` (with `standardized_conv`),
`vision_transformer` and `text_transformer` (both made of `transformer_block`). Parameters are
created in float32, and networks compute in any ``dtype`` (`precision`). `user_models` loads models
from elsewhere, and `coupling` refuses those that mix examples.
"""

from trainer.models.coupling import check_examples_are_apart
from trainer.models.loss import cross_entropy
from trainer.models.nf_resnet import NfResNet
from trainer.models.registry import init_params, make_checked_model, make_model
from trainer.models.resnet import BottleneckBlock, ResNet
from trainer.models.small_networks import Cnn, LogisticRegression, Mlp
from trainer.models.standardized_conv import StandardizedConv
from trainer.models.text_transformer import TextTransformer
from trainer.models.vision_transformer import VisionTransformer
from trainer.models.wide_resnet import WideResNet

__all__ = [
    "BottleneckBlock",
    "Cnn",
    "LogisticRegression",
    "Mlp",
    "NfResNet",
    "ResNet",
    "StandardizedConv",
    "TextTransformer",
    "VisionTransformer",
    "WideResNet",
    "check_examples_are_apart",
    "cross_entropy",
    "init_params",
    "make_checked_model",
    "make_model",
]
