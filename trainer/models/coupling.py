"""Whether a model keeps examples apart: what per-example clipping takes for granted.

Clipping bounds what one example adds to a step's sum only if that is *its* gradient. The engines
of `trainer.clipping` therefore show a model one example at a time, so no coupling can leak there;
but a model that mixes examples is then trained as another function than the one that evaluation
measures in batches: batch normalisation over one example gives zeros. State that is not a
parameter, a running mean or a counter, would be changed by the data without noise, or not at all.
So such a model is refused before it is trained, with the mend.
"""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import InvalidRngError

from trainer.errors import ModelError
from trainer.models.user_models import said

_BATCH = 4
# Changes of the other examples: by a little, and to something else altogether.
_PERTURBATIONS = (1e-2, 10.0)
# Relative to the largest number compared. In the same place of the same program a row should not
# move at all; in another place sums may be taken in another order.
_SAME_PLACE, _OTHER_PLACE = 1e-5, 1e-2
_SAME_PLACE_NARROW, _OTHER_PLACE_NARROW = 1e-2, 0.3
# Leaves far smaller than the largest are compared with this fraction of it.
_LEAST_SCALE = 1e-3

_MENDS = {
    "batch_stats": "use nn.GroupNorm or nn.LayerNorm instead, which normalise within one example",
}
_MEND = (
    "normalise within one example (nn.GroupNorm, nn.LayerNorm), and let no mean, softmax, "
    "attention or sort run over axis 0, the batch"
)


def check_examples_are_apart(
    model: nn.Module, image_shape: tuple[int, ...], num_classes: int
) -> None:
    """Refuses a model in which one example's logits or gradient depend on another example.

    Parameters are drawn at random, for among first values are zeros that would hide a path. Then
    each example of a random batch in turn is changed a little, changed altogether and
    made NaN, which spreads along any path of arithmetic however small its weight; the batch is
    permuted; and an example is shown alone. Answers are kept per model and shape.

    Numbers cannot tell everything: coupling that begins only beyond a threshold that no random
    image reaches, or that passes through comparisons alone, stays unseen, and so does what Python
    code remembers from one trace to the next.

    Args:
        model: Maps float32 images ``[batch, height, width, channels]`` to logits.
        image_shape: ``(height, width, channels)`` of one example.
        num_classes: Classes, >= 1.

    Raises:
        ModelError: If examples are not kept apart; there are variables that are no parameters;
            random numbers are asked for; or logits or parameters have another form.
    """
    _check(model, image_shape, num_classes)


@functools.lru_cache(maxsize=64)
def _check(model: nn.Module, image_shape: tuple[int, ...], num_classes: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(_BATCH, *image_shape)).astype(np.float32)
    shapes = _param_shapes(model, images)
    narrow = _check_form(model, shapes, images, num_classes)
    params = jax.tree.map(lambda leaf: _random(leaf, rng), shapes)
    weights = rng.normal(size=num_classes).astype(np.float32)

    @jax.jit
    def measure(params: Any, images: jax.Array, row: int) -> tuple[jax.Array, Any]:
        # Any loss of one row's logits has a gradient of this form, and this one never saturates.
        def readout(params: Any) -> tuple[jax.Array, jax.Array]:
            logits: Any = model.apply({"params": params}, images)
            return logits[row] @ weights, logits

        gradient, logits = jax.grad(readout, has_aux=True)(params)
        return logits, gradient

    def logits_and_gradient(images: np.ndarray, row: int) -> tuple[np.ndarray, list[np.ndarray]]:
        logits, gradient = jax.device_get(measure(params, images, row))
        return logits, jax.tree.leaves(gradient)

    last = _BATCH - 1
    before = {row: logits_and_gradient(images, row) for row in (0, last)}
    base = before[0][0]
    if not all(np.all(np.isfinite(x)) for x in (base, *before[0][1], *before[last][1])):
        raise _refusal(model, "logits or gradients of random images are not finite")
    same, other = (
        (_SAME_PLACE_NARROW, _OTHER_PLACE_NARROW) if narrow else (_SAME_PLACE, _OTHER_PLACE)
    )

    for changed in range(_BATCH):
        kept = np.delete(np.arange(_BATCH), changed)
        row = last if changed == 0 else 0  # whose gradient is looked at
        why = f"when example {changed} changes"
        for size in _PERTURBATIONS:
            mixed = images.copy()
            mixed[changed] += size * rng.normal(size=image_shape).astype(np.float32)
            logits, gradient = logits_and_gradient(mixed, row)
            for i in kept:
                _compare(model, f"the logits of example {i}", why, [base[i]], [logits[i]], same)
            what = f"the gradient of example {row}"
            _compare(model, what, why, before[row][1], gradient, same)
        mixed = images.copy()
        mixed[changed] = np.nan
        if not np.all(np.isfinite(logits_and_gradient(mixed, row)[0][kept])):
            raise _refusal(
                model, f"logits of other examples become NaN where example {changed} does; {_MEND}"
            )

    alone: Any = jax.jit(model.apply)({"params": params}, images[:1])
    why = "when it is the only one"
    _compare(model, "the logits of example 0", why, [base[0]], [np.asarray(alone)[0]], other)
    logits, gradient = logits_and_gradient(np.roll(images, 1, axis=0), 1)
    why = "when the batch is permuted"
    _compare(model, "the logits of example 0", why, [base[0]], [logits[1]], other)
    _compare(model, "the gradient of example 0", why, before[0][1], gradient, other)


def _param_shapes(model: nn.Module, images: np.ndarray) -> Any:
    """Shapes and types of the parameters, if the model has nothing else."""
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    except Exception as error:
        raise _refusal(
            model, f"it cannot be initialised for images {_shape(images[:1])}: {said(error)}"
        ) from error
    _check_collections(model, variables)
    if not jax.tree.leaves(variables):
        raise _refusal(model, "it has no parameters, so there is nothing to train")
    return variables["params"]


def _check_collections(model: nn.Module, variables: Any) -> None:
    for collection in variables:
        if collection == "params":
            continue
        modules = sorted(
            {"/".join(path[:-1]) or "the model" for path in _paths(variables[collection])}
        )
        mend = _MENDS.get(collection, "compute it anew from each example, or make it a parameter")
        raise _refusal(
            model,
            f"{', '.join(modules)} keeps state that is no parameter, in the collection "
            f"{collection!r}; {mend}",
        )


def _check_form(model: nn.Module, shapes: Any, images: np.ndarray, num_classes: int) -> bool:
    """Checks what goes in and comes out; says whether it computes narrower than float32."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if leaf.dtype != jnp.float32:
            raise _refusal(
                model,
                f"the parameter {jax.tree_util.keystr(path)} is {leaf.dtype.name}; allowed is "
                "float32 (param_dtype), whatever type it is computed with (dtype)",
            )

    def apply(params: Any) -> Any:
        kept = nn.DenyList(("params", "intermediates"))
        return model.apply({"params": params}, images, mutable=kept)

    try:
        program, (logits, variables) = jax.make_jaxpr(apply, return_shape=True)(shapes)
    except InvalidRngError as error:
        raise _refusal(
            model,
            f"it asks for random numbers when it is applied ({said(error)}), and training gives "
            "none but noise; use nn.Dropout(..., deterministic=True), or leave it out",
        ) from error
    except Exception as error:
        raise _refusal(
            model, f"it cannot be applied to images {_shape(images)}: {said(error)}"
        ) from error
    _check_collections(model, variables)
    wanted = (_BATCH, num_classes)
    found = (getattr(logits, "shape", None), getattr(logits, "dtype", None))
    if found != (wanted, jnp.float32):
        given = f"{found[1]}{list(found[0])}" if found[0] is not None else type(logits).__name__
        raise _refusal(
            model,
            f"it maps images {_shape(images)} to {given}; allowed are logits "
            f"float32{list(wanted)}, one row per example",
        )
    if program.effects:
        raise _refusal(model, "it has side effects (callbacks or printing); leave them out")
    return "f16[" in str(program)  # bfloat16 is bf16 there


def _random(leaf: jax.ShapeDtypeStruct, rng: np.random.Generator) -> np.ndarray:
    """A parameter that is nowhere zero, and leaves a signal its order of magnitude."""
    if leaf.ndim > 1:
        drawn = rng.normal(0.0, (leaf.shape[-1] / leaf.size) ** 0.5, leaf.shape)
    else:  # a scale or a bias
        drawn = rng.normal(0.5, 0.3, leaf.shape)
    return np.asarray(drawn, np.float32)


def _compare(
    model: nn.Module,
    what: str,
    why: str,
    before: list[np.ndarray],
    after: list[np.ndarray],
    tolerance: float,
) -> None:
    """Refuses a model if an array differs from what it was by more than rounding."""
    largest = max(float(np.max(np.abs(array), initial=0)) for array in before)
    for ours, theirs in zip(before, after, strict=True):
        scale = max(float(np.max(np.abs(ours), initial=0)), _LEAST_SCALE * largest)
        moved = float(np.max(np.abs(theirs - ours), initial=0))
        if not moved <= tolerance * scale:  # so is NaN
            share = moved / scale if scale else np.inf
            raise _refusal(model, f"{what} moves by {share:.2g} of its size {why}; {_MEND}")


def _paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys to every leaf of nested mappings."""
    if not hasattr(tree, "items"):
        yield path
        return
    for name, branch in tree.items():
        yield from _paths(branch, (*path, name))


def _shape(images: np.ndarray) -> str:
    return f"float32{list(images.shape)}"


def _refusal(model: nn.Module, message: str) -> ModelError:
    return ModelError(f"model {type(model).__qualname__}: {message}")
