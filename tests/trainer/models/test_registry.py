"""Every model that a configuration can name: sizes, shapes, types. Nothing large is allocated."""

from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from trainer.config import ModelConfig, ModelName
from trainer.models import (
    ResNet,
    TextTransformer,
    VisionTransformer,
    WideResNet,
    cross_entropy,
    init_params,
    make_model,
)
from trainer.models.network import Network

NAMES = get_args(ModelName)


def params_shapes(model: nn.Module, shape: tuple[int, ...]) -> Any:
    return jax.eval_shape(lambda: init_params(model, shape, 0))


def num_params(model: nn.Module, shape: tuple[int, ...]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params_shapes(model, shape)))


@pytest.mark.parametrize(
    ("name", "side", "num_classes", "published"),
    [
        # torchvision's ResNet-18, and its usual form for CIFAR-10: 11.7M and 11.2M.
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet18", 32, 10, 11_173_962),
        # torchvision's ResNet-50 (25.6M), and its usual form for CIFAR-10: 23.5M.
        ("resnet50", 224, 1000, 25_557_032),
        ("resnet50", 32, 10, 23_520_842),
        # Brock et al. 2021: ResNet-50's, whose gains and biases stand in for those of its norms,
        # and a SkipInit gain for each of 16 blocks. (Their stem lacks its 64 biases.)
        ("nf_resnet50", 224, 1000, 25_557_032 + 16),
        # timm's deit_tiny, vit_small and vit_base with patches of 16: 5.7M, 22M, 86M.
        ("vit_tiny", 224, 1000, 5_717_416),
        ("vit_small", 224, 1000, 22_050_664),
        ("vit_base", 224, 1000, 86_567_656),
    ],
)
def test_parameter_counts_are_the_published_ones(name, side, num_classes, published):
    model = make_model(ModelConfig(name=name), num_classes)
    assert num_params(model, (side, side, 3)) == published


# Zagoruyko & Komodakis 2016, table 4 and their repository: 2.7M, 36.5M and 8.9M.
@pytest.mark.parametrize(
    ("name", "published"), [("wrn_16_4", 2.75e6), ("wrn_28_10", 36.5e6), ("wrn_40_4", 8.95e6)]
)
def test_wide_resnets_have_the_published_size(name, published):
    # Published with batch normalisation and unbiased convolutions: gains and biases come on top.
    model = make_model(ModelConfig(name=name), 10)
    assert num_params(model, (32, 32, 3)) == pytest.approx(published, rel=3e-3)


@pytest.mark.parametrize("name", NAMES)
def test_every_model_takes_the_smallest_images(name):
    shape = (8, 8, 1)
    model = make_model(ModelConfig(name=name), 7)
    params = params_shapes(model, shape)
    assert params["head"]["kernel"].shape[-1] == 7
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jax.ShapeDtypeStruct((3, *shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((3,), jnp.int32)
    losses, correct = jax.eval_shape(
        lambda params, images, labels: cross_entropy(
            Network(model).logits(params, {}, images), labels
        ),
        params,
        images,
        labels,
    )
    assert (losses.shape, losses.dtype) == ((3,), jnp.float32)
    assert (correct.shape, correct.dtype) == ((3,), jnp.bool_)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "logistic_regression"])
def test_bfloat16_reaches_every_model_that_is_more_than_a_head(name):
    wide, narrow = (
        make_model(ModelConfig(name=name, dtype=t), 7) for t in ("float32", "bfloat16")
    )
    assert narrow == wide.clone(dtype=jnp.bfloat16) != wide


@pytest.mark.parametrize("name", NAMES)
def test_models_of_equal_configurations_are_equal(name):
    # Compiled programs are kept by the model's value.
    first, second = (make_model(ModelConfig(name=name), 10) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_the_stem_depends_on_the_image():
    small = params_shapes(ResNet(10, stage_sizes=(1,)), (63, 63, 3))["stem_conv"]["kernel"]
    large = params_shapes(ResNet(10, stage_sizes=(1,)), (64, 64, 3))["stem_conv"]["kernel"]
    assert (small.shape, large.shape) == ((3, 3, 3, 64), (7, 7, 3, 64))
    chosen = params_shapes(ResNet(10, stage_sizes=(1,), small_images=True), (64, 64, 3))[
        "stem_conv"
    ]["kernel"]
    assert chosen.shape == small.shape


@pytest.mark.parametrize(
    ("shape", "patch_size", "patch", "patches"),
    [
        ((8, 8, 1), None, 2, 16),
        ((28, 28, 1), None, 4, 49),
        ((32, 32, 3), None, 4, 64),
        ((224, 224, 3), None, 16, 196),
        ((224, 224, 3), 32, 32, 49),
        ((30, 45, 3), None, 4, 8 * 12),  # padded, nothing is left out
    ],
)
def test_patches_depend_on_the_image(shape, patch_size, patch, patches):
    params = params_shapes(VisionTransformer(10, depth=1, patch_size=patch_size), shape)
    assert params["patches"]["kernel"].shape == (patch, patch, shape[-1], 192)
    assert params["positions"].shape == (1, patches + 1, 192)


@pytest.mark.parametrize("depth", [4, 12, 17])
def test_a_depth_without_whole_blocks_is_refused(depth):
    with pytest.raises(ValueError, match=rf"depth={depth}: allowed is 6 n \+ 4"):
        WideResNet(10, depth=depth)


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="heads=3: allowed is a divisor of the width 8"):
        params_shapes(VisionTransformer(10, width=8, heads=3), (8, 8, 1))


def test_a_sequence_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="length=7: allowed is at most max_length=6"):
        init_params(TextTransformer(5, 11, 6), (7,), 0, input_dtype=jnp.int32)
