"""A model computes in the type of its inputs and parameters, or in the one it was given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models import (
    BottleneckBlock,
    Cnn,
    Mlp,
    NfResNet,
    ResNet,
    TextTransformer,
    VisionTransformer,
    WideResNet,
    cross_entropy,
    init_params,
)

IMAGES = (8, 8, 2)
MODELS = {
    "mlp": (Mlp((4,), 3), IMAGES),
    "cnn": (Cnn((4,), 3), IMAGES),
    "resnet": (ResNet(3, stage_sizes=(1, 1), width=4), IMAGES),
    "resnet with pooling": (ResNet(3, stage_sizes=(1,), width=4, small_images=False), IMAGES),
    "resnet of bottlenecks": (ResNet(3, (1,), BottleneckBlock, width=4), IMAGES),
    "nf resnet": (NfResNet(3, stage_sizes=(1,), width=4), IMAGES),
    "wide resnet": (WideResNet(3, depth=10, widening=1), IMAGES),
    "vision transformer": (VisionTransformer(3, width=8, heads=2, depth=1), IMAGES),
    "text transformer": (TextTransformer(3, 11, 6, width=8, depth=1), (6,)),
}
each_model = pytest.mark.parametrize(
    ("model", "shape"), [pytest.param(*case, id=name) for name, case in MODELS.items()]
)


def problem(model, shape):
    """Float32 parameters, none of them at a special starting value, and two examples."""
    rng = np.random.default_rng(0)
    inputs: Any = rng.normal(size=(2, *shape)).astype(np.float32)
    if len(shape) == 1:
        inputs = rng.integers(0, model.vocab_size, size=(2, *shape), dtype=np.int32)
    shapes = jax.eval_shape(lambda: init_params(model, shape, 0, input_dtype=inputs.dtype))
    assert dtypes(shapes) == {"float32"}
    random = lambda leaf: rng.normal(0.1, 0.3, leaf.shape).astype(np.float32)
    return jax.tree.map(random, shapes), inputs


def make_loss(model, inputs):
    """``loss(params) -> (sum over examples, logits)``."""
    labels: Any = np.array([0, 2], np.int32)

    def loss(params):
        logits = model.apply({"params": params}, inputs)
        return jnp.sum(cross_entropy(logits, labels)[0]), logits

    return loss


def as_type(dtype, tree):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@each_model
def test_float64_parameters_give_float64_logits_and_gradients(model, shape):
    params, inputs = problem(model, shape)
    narrow = jax.jit(model.apply)({"params": params}, inputs)
    assert narrow.dtype == jnp.float32
    with jax.enable_x64(True):
        assert jax.eval_shape(model.apply, {"params": params}, inputs).dtype == jnp.float32
        params = as_type(np.float64, params)
        loss_and_grad = jax.jit(jax.value_and_grad(make_loss(model, inputs), has_aux=True))
        (_, logits), gradient = loss_and_grad(params)
        assert logits.dtype == jnp.float64
        assert dtypes(gradient) == {"float64"}
        np.testing.assert_allclose(narrow, logits, rtol=1e-4, atol=1e-4)

        # A narrow step anywhere in between would put a float32's rounding, divided by the tiny
        # step, into the difference.
        rng = np.random.default_rng(1)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
        step = 1e-6
        values = [
            loss_and_grad(jax.tree.map(lambda p, d, by=by: p + by * d, params, direction))[0][0]
            for by in (step, -step)
        ]
        slopes = jax.tree.map(lambda g, d: np.vdot(g, d), gradient, direction)
        np.testing.assert_allclose(
            sum(jax.tree.leaves(slopes)), (values[0] - values[1]) / (2 * step), rtol=1e-6
        )


@each_model
def test_bfloat16_computes_on_float32_parameters(model, shape):
    model = model.clone(dtype=jnp.bfloat16)
    params, inputs = problem(model, shape)
    loss = make_loss(model, inputs)
    program, (gradient, logits) = jax.make_jaxpr(jax.grad(loss, has_aux=True), return_shape=True)(
        params
    )
    assert "bf16" in str(program)
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)
    assert dtypes(gradient) == {"float32"}


@each_model
def test_bfloat16_parameters_give_float32_logits(model, shape):
    params, inputs = problem(model, shape)
    if len(shape) > 1:
        inputs = jnp.asarray(inputs, jnp.bfloat16)
    logits = jax.eval_shape(
        lambda params: model.apply({"params": params}, inputs), as_type(jnp.bfloat16, params)
    )
    assert logits.dtype == jnp.float32


def test_a_given_type_casts_float64_down():
    model = VisionTransformer(3, width=8, heads=2, depth=1, dtype=jnp.float32)
    params, inputs = problem(model, IMAGES)
    with jax.enable_x64(True):
        program = jax.make_jaxpr(lambda params: model.apply({"params": params}, inputs))(
            as_type(np.float64, params)
        )
    convolutions = [eqn for eqn in program.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert [eqn.outvars[0].aval.dtype for eqn in convolutions] == [jnp.float32]
