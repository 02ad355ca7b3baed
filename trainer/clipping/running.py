"""Runs a batch through an engine, whole or in microbatches."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax_privacy import clipping as jax_privacy_clipping

from trainer.clipping.engines import ClippedSums, clipped_sums
from trainer.clipping.loss import Batch, Problem, trace
from trainer.clipping.microbatches import accumulate
from trainer.clipping.modes import ClippingMode, clip_factors, groups_of
from trainer.clipping.uses import widened

EngineName = Literal["vmap", "two_pass", "book_keeping"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clipping:
    """What is done to gradients; see `clipped_grad` for the fields.

    Attributes:
        mode: The clipping mode.
        l2_clip_norm: The bound.
        rescale_to_unit_norm: Whether clipped gradients are divided by it.
        transform: Applied to an example's gradient before clipping, or None.
        nan_safe: Whether gradients that are not finite are left out.
        spmd_axis_name: As in `jax.vmap`.
    """

    mode: ClippingMode
    l2_clip_norm: Any
    rescale_to_unit_norm: bool
    transform: Any
    nan_safe: bool
    spmd_axis_name: str | None


def run(
    engine: EngineName,
    microbatch_size: int | None,
    problem: Problem,
    batch: Batch,
    is_padding: jax.Array,
    clipping: Clipping,
) -> ClippedSums:
    """Clipped gradients of a batch.

    Args:
        engine: How they are computed.
        microbatch_size: Examples at a time, or None for all.
        problem: The loss.
        batch: Its arguments.
        is_padding: bool ``[batch]``; these examples add nothing.
        clipping: The rule.
    """

    def part(examples: list[jax.Array], is_padding: jax.Array) -> tuple[Any, Any]:
        whole = dataclasses.replace(batch, examples=examples)
        form = _per_example if engine == "vmap" else _without_gradients
        result = form(engine, problem, whole, is_padding, clipping)
        return result.grads, (result.values, result.norms, result.aux)

    if batch.size == 0:
        one = [jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) for x in batch.examples]
        grads, outputs = jax.eval_shape(part, one, jax.ShapeDtypeStruct((1,), jnp.bool))
        grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), grads)
        outputs = jax.tree.map(lambda x: jnp.zeros((0, *x.shape[1:]), x.dtype), outputs)
    elif microbatch_size is None or microbatch_size >= batch.size:
        grads, outputs = part(batch.examples, is_padding)
    else:
        grads, outputs = accumulate(part, batch.examples, is_padding, microbatch_size)
    return ClippedSums(grads, *outputs)


def _without_gradients(
    engine: Any, problem: Problem, batch: Batch, is_padding: jax.Array, clipping: Clipping
) -> ClippedSums:
    """`trainer.clipping.engines`."""
    unflatten = lambda leaves: jax.tree.unflatten(problem.gradient_tree, leaves)
    traced = trace(problem.loss, batch)
    sums = clipped_sums(
        engine,
        problem.loss,
        traced,
        batch,
        is_padding,
        groups=groups_of(unflatten(batch.leaves), clipping.mode),
        factor_fn=lambda norms: clip_factors(
            norms, clipping.mode, clipping.l2_clip_norm, clipping.rescale_to_unit_norm
        ),
        nan_safe=clipping.nan_safe,
        spmd_axis_name=clipping.spmd_axis_name,
    )
    return dataclasses.replace(
        sums, grads=unflatten(sums.grads), aux=jax.tree.unflatten(traced.aux_tree, sums.aux)
    )


def _per_example(
    engine: str, problem: Problem, batch: Batch, is_padding: jax.Array, clipping: Clipping
) -> ClippedSums:
    """jax-privacy: per-example gradients by `jax.vmap`, clipped, then summed."""
    flat = clipping.mode == "flat"
    bound = clipping.l2_clip_norm
    if not flat and clipping.rescale_to_unit_norm:
        bound = 1.0

    def prepare(grads: Any) -> Any:
        if clipping.transform is not None:
            grads = clipping.transform(grads)
        grads = jax.tree.map(widened, grads)
        leaves, tree = jax.tree.flatten(grads)
        if clipping.nan_safe:
            # jax-privacy 2.0.0 would drop the elements that are not finite, and keep the rest.
            finite = jnp.array([jnp.isfinite(leaf).all() for leaf in leaves]).all()
            leaves = [jnp.where(finite, leaf, 0) for leaf in leaves]
        if not flat:
            groups = groups_of(grads, clipping.mode)
            squares = jnp.zeros(
                groups.count, jnp.finfo(jnp.result_type(jnp.float32, *leaves)).dtype
            )
            for group, leaf in zip(groups.of_leaves, leaves, strict=True):
                squares = squares.at[group].add(jnp.sum(jnp.square(jnp.abs(leaf))))
            factors = clip_factors(
                jnp.sqrt(squares),
                clipping.mode,
                clipping.l2_clip_norm,
                clipping.rescale_to_unit_norm,
            )
            leaves = [
                (factors[group] * leaf).astype(leaf.dtype)
                for group, leaf in zip(groups.of_leaves, leaves, strict=True)
            ]
        return jax.tree.unflatten(tree, leaves)

    def loss(params: Any, shared: list[Any], example: list[Any]) -> Any:
        return problem.loss(jax.tree.leaves(params), shared, example)

    grad_fn = jax_privacy_clipping.clipped_grad(
        loss,
        has_aux=True,
        l2_clip_norm=bound,
        rescale_to_unit_norm=clipping.rescale_to_unit_norm and flat,
        batch_argnums=2,
        keep_batch_dim=False,
        return_values=True,
        return_grad_norms=True,
        pre_clipping_transform=prepare,
        nan_safe=clipping.nan_safe,
        spmd_axis_name=clipping.spmd_axis_name,
    )
    params = jax.tree.unflatten(problem.gradient_tree, batch.leaves)
    grads, more = grad_fn(params, batch.shared, batch.examples, is_padding_example=is_padding)
    return ClippedSums(grads, more.values, more.grad_norms, more.aux)
