"""The benchmark's models once more, in PyTorch and as Opacus can take them.

Same layers, same sizes, written so that every parameter lies in a layer that Opacus has a rule
of its own for; anything else it would differentiate example by example through functorch, which
is slower. So positions and the class token are embeddings, attention is made of linear layers,
and the wide residual network has plain convolutions where the trainer's are weight-standardised:
a little less work for PyTorch, in its plain gradient and in Opacus alike.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch  # type: ignore[import-not-found]
from torch import nn  # type: ignore[import-not-found]

_EPSILON = 1e-6  # of normalisations, as in Flax


def _norm(channels: int, most_groups: int) -> Any:
    return nn.GroupNorm(math.gcd(most_groups, channels), channels, eps=_EPSILON)


def _conv(channels: int, features: int, size: int, stride: int = 1, bias: bool = True) -> Any:
    return nn.Conv2d(channels, features, size, stride, padding=size // 2, bias=bias)


def mlp(inputs: int, hidden_sizes: Sequence[int], num_classes: int) -> Any:
    """Fully connected layers with ReLU."""
    layers: list[Any] = [nn.Flatten()]
    for size in hidden_sizes:
        layers += [nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, num_classes))


def cnn(side: int, widths: Sequence[int], num_classes: int) -> Any:
    """3x3 convolutions, each with group normalisation, ReLU and 2x2 pooling."""
    layers: list[Any] = []
    channels = 3
    for width in widths:
        layers += [_conv(channels, width, 3), _norm(width, 8), nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)]
        channels, side = width, -(-side // 2)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side**2, num_classes))


class _Pooled(nn.Module):
    """The mean over height and width."""

    def forward(self, images: Any) -> Any:
        return images.mean(dim=(2, 3))


class _Residual(nn.Module):
    """Layers beside a shortcut."""

    def __init__(self, body: Any, shortcut: Any, after: Any) -> None:
        super().__init__()
        self.body, self.shortcut, self.after = body, shortcut, after

    def forward(self, inputs: Any) -> Any:
        return self.after(self.body(inputs) + self.shortcut(inputs))


def _basic_block(channels: int, features: int, stride: int) -> Any:
    shortcut: Any = nn.Identity()
    if stride != 1 or channels != features:
        shortcut = nn.Sequential(
            _conv(channels, features, 1, stride, bias=False), _norm(features, 32)
        )
    body = nn.Sequential(
        _conv(channels, features, 3, stride, bias=False),
        _norm(features, 32),
        nn.ReLU(),
        _conv(features, features, 3, bias=False),
        _norm(features, 32),
    )
    return _Residual(body, shortcut, nn.ReLU())


def resnet18(num_classes: int) -> Any:
    """ResNet-18 with group normalisation and the stem for small images."""
    layers: list[Any] = [_conv(3, 64, 3, bias=False), _norm(64, 32), nn.ReLU()]
    channels = 64
    for stage, features in enumerate((64, 128, 256, 512)):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(_basic_block(channels, features, stride))
            channels = features
    return nn.Sequential(*layers, _Pooled(), nn.Linear(channels, num_classes))


def _wide_layer(channels: int, features: int, size: int, stride: int = 1) -> list[Any]:
    return [nn.ReLU(), _norm(channels, 16), _conv(channels, features, size, stride)]


def wide_resnet(depth: int, widening: int, num_classes: int) -> Any:
    """WRN-``depth``-``widening`` of De et al. 2022, with plain convolutions."""
    layers: list[Any] = [_conv(3, 16, 3)]
    channels = 16
    for stage in range(3):
        features = 16 * widening * 2**stage
        for block in range((depth - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut: Any = nn.Identity()
            if block == 0:
                shortcut = nn.Sequential(*_wide_layer(channels, features, 1, stride))
            first = _wide_layer(channels, features, 3, stride)
            body = nn.Sequential(*first, *_wide_layer(features, features, 3))
            layers.append(_Residual(body, shortcut, nn.Identity()))
            channels = features
    layers += [nn.ReLU(), _norm(channels, 16), _Pooled()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))


class _Attention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, inputs: Any) -> Any:
        batch, length, width = inputs.shape

        def split(values: Any) -> Any:
            return values.view(batch, length, self.heads, -1).transpose(1, 2)

        mixed = nn.functional.scaled_dot_product_attention(
            split(self.query(inputs)), split(self.key(inputs)), split(self.value(inputs))
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


def _transformer_blocks(width: int, heads: int, depth: int) -> Any:
    blocks: list[Any] = []
    for _ in range(depth):
        attention = nn.Sequential(nn.LayerNorm(width, eps=_EPSILON), _Attention(width, heads))
        network = nn.Sequential(
            nn.LayerNorm(width, eps=_EPSILON),
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )
        blocks += [_Residual(part, nn.Identity(), nn.Identity()) for part in (attention, network)]
    return nn.Sequential(*blocks, nn.LayerNorm(width, eps=_EPSILON))


def _numbered(embedding: Any, inputs: Any) -> Any:
    """The rows of an embedding in order, for every example of a batch."""
    numbers = torch.arange(embedding.num_embeddings, device=inputs.device)
    return embedding(numbers.expand(inputs.shape[0], -1).contiguous())


class _VisionTransformer(nn.Module):
    """An image as a sequence of patches, read off a class token."""

    def __init__(self, side: int, patch: int, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Embedding(1, width)
        self.positions = nn.Embedding(1 + (side // patch) ** 2, width)
        self.blocks = _transformer_blocks(width, heads, 12)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Any) -> Any:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([_numbered(self.token, images), patches], dim=1)
        hidden = self.blocks(hidden + _numbered(self.positions, images))
        return self.head(hidden[:, 0])


class _TextTransformer(nn.Module):
    """Token and position embeddings, blocks, the mean over positions."""

    def __init__(self, vocabulary: int, length: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = _transformer_blocks(width, 4, 4)
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: Any) -> Any:
        hidden = self.tokens(tokens) + _numbered(self.positions, tokens)
        return self.head(self.blocks(hidden).mean(dim=1))


def make_twin(name: str) -> Any:
    """The PyTorch module for one of the benchmark's cases, from a fixed seed."""
    torch.manual_seed(0)
    match name:
        case "mlp":
            return mlp(32 * 32 * 3, (512, 512, 512), 10)
        case "cnn":
            return cnn(32, (16, 32), 10)
        case "resnet18":
            return resnet18(10)
        case "wrn_16_4":
            return wide_resnet(16, 4, 10)
        case "wrn_40_4":
            return wide_resnet(40, 4, 10)
        case "vit_small":
            return _VisionTransformer(32, 4, 384, 6, 10)
        case "vit_base":
            return _VisionTransformer(32, 4, 768, 12, 10)
        case "vit_base_224":
            return _VisionTransformer(224, 16, 768, 12, 1000)
        case "text_transformer":
            return _TextTransformer(8192, 128, 256, 2)
        case _:
            raise KeyError(name)
