"""What of a model is trained: the split, the network's logits, and their clipped gradients."""

import math
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.trainer.clipping.comparison import Case, check, cross_entropy, labels, normal, quick
from tests.trainer.clipping.jaxprs import intermediates
from trainer.clipping import clipped_grad
from trainer.config import WITHOUT_INNER_DENSE, ModelConfig, ModelName
from trainer.errors import ConfigError
from trainer.models import ResNet, VisionTransformer, init_params, make_model
from trainer.models.network import Network, dense_layers

SHAPE = (8, 8, 2)
BATCH = 5
CHOICES = ["all", "head", "biases", "lora"]


class Small(nn.Module):
    """Every kind of layer once, and a dense layer that is called twice."""

    @nn.compact
    def __call__(self, images):
        hidden = nn.relu(nn.Conv(4, (3, 3), strides=(4, 4), name="conv")(images))
        hidden = nn.GroupNorm(num_groups=2, name="norm")(hidden)
        twice = nn.Dense(4, name="twice")
        hidden = twice(nn.tanh(twice(inputs=hidden)))
        hidden = nn.Dense(6, use_bias=False, name="last")(hidden.reshape(len(images), -1))
        return nn.Dense(3, name="head")(nn.tanh(hidden))


class Deep(nn.Module):
    """Two layers at several positions; see `TransformerBlock` for ``dtype``."""

    width: int
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="first")(inputs))
        hidden = nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="second")(hidden))
        return nn.Dense(3, name="head")(hidden.mean(1).astype("float32"))


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.Conv(3, (3, 3), name="conv")(images)
        return nn.Dense(3, name="head")(hidden.mean((1, 2)))


class NoHead(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3, name="top")(images.reshape(len(images), -1))


VIT = VisionTransformer(3, width=8, heads=2, depth=1)
IMAGES: Any = normal(BATCH, *SHAPE, scale=1.0).astype(np.float32)


def away_from_zero(parameters):
    """The same parameters with other numbers, so that no path is silent."""
    return jax.tree.map(lambda leaf: 0.1 + normal(*leaf.shape, scale=0.3), parameters)


def shapes(init):
    """What ``init(SHAPE, seed)`` would give; nothing is compiled for it."""
    return jax.eval_shape(lambda: init(SHAPE, 0))


def leaves(tree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")


def names(tree):
    return set(leaves(tree))


def all_close(one, two, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), one, two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "choice"),
    [(Small(), choice) for choice in CHOICES] + [(VIT, "lora")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_engine_clips_what_is_trained(model, choice):
    network = Network(model, choice, lora_rank=2)
    trainable, frozen = away_from_zero(shapes(network.init))
    loss = lambda ours, rest, x, y: cross_entropy(network.logits(ours, rest, x), y)
    case = Case(loss, (trainable, frozen, IMAGES, labels(BATCH)), {"batch_argnums": (2, 3)})
    check(case, "float32", [(engine, None) for engine in ("vmap", "two_pass", "book_keeping")])


@pytest.mark.parametrize("choice", CHOICES)
def test_at_first_the_network_is_the_model(choice):
    network = Network(Small(), choice)
    parameters = network.init(SHAPE, 3)
    want = Small().apply({"params": init_params(Small(), SHAPE, 3)}, IMAGES)
    np.testing.assert_array_equal(network.logits(*parameters, IMAGES), want)
    all_close(network.merged(*parameters), init_params(Small(), SHAPE, 3), 0)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("model", [Small(), VIT], ids=lambda model: type(model).__name__)
def test_merged_parameters_are_the_models_own(choice, model):
    network = Network(model, choice, lora_rank=2)
    parameters = away_from_zero(shapes(network.init))
    merged = network.merged(*parameters)
    own = shapes(lambda *args: init_params(model, *args))
    assert jax.tree.structure(merged) == jax.tree.structure(own)
    logits = quick(network.logits, *parameters, IMAGES)
    want = quick(lambda params: model.apply({"params": params}, IMAGES), merged)
    np.testing.assert_allclose(logits, want, atol=2e-5)
    all_close(network.split(network.joined(*parameters)), parameters, 0)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_frozen_does_not_move(choice):
    network = Network(Small(), choice, lora_rank=2)
    before = away_from_zero(shapes(network.init))
    loss = lambda ours, rest, x, y: cross_entropy(network.logits(ours, rest, x), y)
    grad_fn = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(2, 3), engine="vmap")
    grads = quick(grad_fn, *before, IMAGES, labels(BATCH))
    assert jax.tree.structure(grads) == jax.tree.structure(before.trainable)
    moved = jax.tree.map(lambda leaf, grad: leaf - grad, before.trainable, grads)
    was, now = (leaves(network.joined(ours, before.frozen)) for ours in (before[0], moved))
    changed = {name for name in now if not np.array_equal(now[name], was[name])}
    assert changed == names(before.trainable)
    assert not names(before.trainable) & names(before.frozen)


def test_what_is_trained():
    def trained(choice, model):
        return names(shapes(Network(model, choice).init).trainable)

    head = {"head/kernel", "head/bias"}
    assert trained("all", Small()) == names(shapes(Network(Small()).fresh))
    assert trained("head", Small()) == head
    assert trained("biases", Small()) == head | {"conv/bias", "norm/bias", "twice/bias"}
    factors = {f"{layer}/lora_{x}" for layer in ("twice", "last") for x in "ab"}
    assert trained("lora", Small()) == head | factors
    # Without biases in its convolutions, those of the normalisations are left.
    resnet = ResNet(3, stage_sizes=(1,), width=4)
    norms = {"stem_norm/bias"} | {f"stage1_block1/norm{i}/bias" for i in (1, 2)}
    assert trained("biases", resnet) == head | norms
    attention = {f"block1/attention/{x}" for x in ("query", "key", "value", "out")}
    layers = attention | {"block1/mlp_in", "block1/mlp_out"}
    assert trained("lora", VIT) == head | {f"{layer}/lora_{x}" for layer in layers for x in "ab"}


def test_factors_have_the_rank_and_draws_of_their_own():
    network = Network(Deep(400), "lora", lora_rank=300)
    trainable = network.init((2, 400), 0).trainable
    first, second = trainable["first"], trainable["second"]
    assert (first["lora_a"].shape, first["lora_b"].shape) == ((400, 300), (300, 400))
    assert np.std(first["lora_a"]) == pytest.approx(1 / 20, rel=0.02)
    assert not np.any(first["lora_b"])
    other = network.init((2, 400), 1).trainable["first"]["lora_a"]
    for another in (second["lora_a"], other):
        assert abs(np.corrcoef(np.ravel(another), np.ravel(first["lora_a"]))[0, 1]) < 0.02


def test_a_layer_that_computes_in_half_precision_has_its_update_there():
    network = Network(Deep(4, jnp.bfloat16), "lora", lora_rank=2)
    parameters = jax.eval_shape(lambda: network.init((3, 5), 0))
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(network.logits)(*parameters, jnp.zeros((2, 3, 5))).jaxpr
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    types = [str(eqn.outvars[0].aval.dtype) for eqn in products]
    # Kernel, A and B of two layers; then the head.
    assert types == ["bfloat16"] * 6 + ["float32"]


@pytest.mark.parametrize("engine", ["book_keeping", "two_pass"])
def test_no_update_has_its_per_example_gradients_formed(engine):
    # Sizes that nothing else has, and a prime batch: only a gradient per example is that large.
    batch, width, rank = 7, 46, 29
    network = Network(Deep(width), "lora", lora_rank=rank)
    trainable, frozen = jax.eval_shape(lambda: network.init((3, 38), 0))
    loss = lambda ours, rest, x, y: cross_entropy(network.logits(ours, rest, x), y)

    def sizes(engine):
        clipped = clipped_grad(loss, l2_clip_norm=1.0, batch_argnums=(2, 3), engine=engine)
        inputs = jnp.zeros((batch, 3, 38))
        jaxpr = jax.make_jaxpr(clipped)(trainable, frozen, inputs, labels(batch)).jaxpr
        return {math.prod(shape) for _, shape in intermediates(jaxpr)}

    factors = {batch * 38 * rank, batch * width * rank}
    kernels = {batch * 38 * width, batch * width * width}
    assert not (factors | kernels) & sizes(engine)
    assert factors <= sizes("vmap")


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0])
def test_the_heads_fresh_kernel_is_scaled_and_nothing_else(scale):
    plain = init_params(Small(), SHAPE, 0)
    scaled = Network(Small(), head_init_scale=scale).fresh(SHAPE, 0)
    all_close(scaled.pop("head")["kernel"], scale * plain.pop("head")["kernel"], 1e-8)
    all_close(scaled, plain, 0)


def test_given_parameters_are_taken_as_they_are():
    given = away_from_zero(init_params(Small(), SHAPE, 0))
    network = Network(Small(), "lora", head_init_scale=0.0)
    parameters = network.init(SHAPE, 0, initial=given)
    all_close(network.merged(*parameters), given, 0)
    np.testing.assert_array_equal(
        network.logits(*parameters, IMAGES), Small().apply({"params": given}, IMAGES)
    )


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Network(NoHead(), "head"), "trainable='head': NoHead has no layer.*allowed is all"),
        (Network(NoHead(), "lora"), "trainable='lora': NoHead has no layer.*allowed is all"),
        (Network(NoHead(), head_init_scale=0.0), "head_init_scale=0.0: .*allowed is 1"),
        (
            Network(Convolutional(), "lora"),
            "Convolutional has no dense layer besides its head.*allowed is all, head or biases",
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused(network, message):
    with pytest.raises(ConfigError, match=message):
        network.init(SHAPE, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(ModelName))
def test_which_models_have_layers_to_update_is_known_without_them(name):
    model = make_model(ModelConfig(name=name), 3)
    layers = dense_layers(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    assert (len(layers) < 2) == (name in WITHOUT_INNER_DENSE)


def test_networks_are_compared_by_value():
    assert Network(VIT, "lora") == Network(VisionTransformer(3, 8, 2, 1), "lora")
    assert len({Network(VIT, "lora"), Network(VIT, "lora"), Network(VIT, "head")}) == 2
