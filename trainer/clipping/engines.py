"""The two engines that form no per-example gradient of a known use.

Both record a forward and a backward pass (`trainer.clipping.interpreter`), get every example's
norm from it (`trainer.clipping.norms`) and then differ in how they come to the clipped sum:

* *book-keeping* forms it from what the passes left behind, one contraction for each site with
  cotangents scaled by the clip factors (Bu et al. 2023, "Differentially private optimization on
  large model at small cost"): one forward, one backward.
* *two passes*: the gradient of ``sum_i factor_i loss_i`` in a second forward and backward
  (Lee & Kifer 2021, "Scaling up differentially private deep learning"), while nothing of the
  first needs to be held. Where layers have factors of their own no loss can be weighed with
  them, and where parameters are used in half precision the second pass would round the sum of the
  batch to it; in both cases the sum comes from the contractions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from trainer.clipping.interpreter import Taps, record
from trainer.clipping.loss import Batch, LossFn, Problem, TracedLoss, trace
from trainer.clipping.modes import Groups
from trainer.clipping.norms import Norms, Pull, Recording, Way, measure, safe_norm, sites_of_leaves
from trainer.clipping.program import Site
from trainer.clipping.uses import Contraction, CopiedOperand, widened

FactorFn = Callable[[jax.Array], jax.Array]
"""Clip factors ``[batch, groups]`` of norms ``[batch, groups]``; zero where not finite."""


@dataclasses.dataclass(frozen=True)
class ClippedSums:
    """What a batch gives.

    Attributes:
        grads: The clipped sums, at least float32.
        values: Losses ``[batch]``.
        norms: Norms of whole gradients ``[batch]``, before clipping.
        aux: Auxiliary outputs, leaves ``[batch, ...]``.
    """

    grads: Any
    values: jax.Array
    norms: jax.Array
    aux: Any


def clipped_sums(
    engine: Literal["two_pass", "book_keeping"],
    loss: LossFn,
    traced: TracedLoss,
    batch: Batch,
    is_padding: jax.Array,
    *,
    groups: Groups,
    factor_fn: FactorFn,
    nan_safe: bool,
    spmd_axis_name: str | None,
) -> ClippedSums:
    """Clipped per-example gradients, summed.

    Args:
        engine: How.
        loss: Of one example.
        traced: The same, analysed.
        batch: Its arguments, of at least one example.
        is_padding: bool ``[batch]``; these examples add nothing.
        groups: Which leaves are clipped together.
        factor_fn: The clipping rule.
        nan_safe: An example whose gradient is not finite adds nothing.
        spmd_axis_name: As in `jax.vmap`.
    """
    recording = _record(traced, batch, spmd_axis_name)
    measured = measure(recording, groups.of_leaves, groups.count, is_padding)
    added = ~is_padding
    if nan_safe:
        added &= jnp.isfinite(measured.norms).all(axis=1)
    factors = jnp.where(added[:, None], factor_fn(measured.norms), 0)
    if engine == "two_pass" and groups.count == 1 and not _in_half_precision(recording):
        leaves = _reweighted(loss, batch, factors[:, 0], added, spmd_axis_name)
    else:
        leaves = _contracted(recording, measured, groups, factors, added)
    return ClippedSums(leaves, recording.values, safe_norm(measured.norms), recording.aux)


def rows_alone(problem: Problem, batch: Batch) -> bool:
    """Whether nothing of a weight's size exists per example, and no Gram matrix either.

    So it is with weights that meet one row of each example, in a multilayer perceptron say.
    """
    simple = True

    def look(examples: list[jax.Array]) -> jax.Array:
        nonlocal simple
        part = dataclasses.replace(batch, examples=examples)
        recording = _record(trace(problem.loss, part), part, None)
        groups = (0,) * len(batch.leaves)
        measured = measure(recording, groups, 1, jnp.zeros(batch.size, bool))
        for leaf, sites in sites_of_leaves(recording).items():
            if measured.ways[leaf] is Way.MEASURED:
                simple &= all(_meets_one_row(recording, site) for site in sites)
                simple &= len(sites) == 1
            else:
                simple &= all(isinstance(site.use, CopiedOperand) for site in sites)
        return measured.norms

    jax.eval_shape(look, batch.examples)
    return simple


def _meets_one_row(recording: Recording, site: Site) -> bool:
    use = site.use
    if not isinstance(use, Contraction) or site.loops:
        return False
    return use.rows_of(recording.saved[site.index]) == 1


def _record(traced: TracedLoss, batch: Batch, spmd_axis_name: str | None) -> Recording:
    block = traced.block

    def evaluate(taps: Taps) -> tuple[jax.Array, tuple[list[jax.Array], dict]]:
        def one(taps: Taps, example: Sequence[jax.Array]):
            (value, *aux), saved = record(block, [*batch.leaves, *batch.shared, *example], taps)
            return value, (aux, saved)

        return jax.vmap(one, spmd_axis_name=spmd_axis_name)(taps, batch.examples)

    taps = {
        site.index: jnp.zeros((batch.size, *site.tap_shape), site.tap_aval.dtype)
        for site in block.sites
    }
    values, transpose, (aux, saved) = jax.vjp(evaluate, taps, has_aux=True)
    (deltas,) = transpose(jnp.ones_like(values))
    return Recording(traced, batch, values, aux, saved, deltas)


def _contracted(
    recording: Recording, measured: Norms, groups: Groups, factors: jax.Array, added: jax.Array
) -> list[jax.Array]:
    """Book-keeping: one contraction over the batch for each site."""
    # Zero times infinity is not zero: what is not added is replaced, not scaled.
    clear = lambda x: jnp.where(added.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
    sums = [jnp.zeros_like(widened(leaf)) for leaf in recording.batch.leaves]
    for leaf, grads in measured.kept.items():
        factor = factors[:, groups.of_leaves[leaf]].astype(grads.dtype)
        sums[leaf] = jnp.tensordot(factor, clear(grads), axes=1)
    remaining = {
        leaf: sites
        for leaf, sites in sites_of_leaves(recording).items()
        if leaf not in measured.kept
    }
    for group in range(groups.count):
        members = [leaf for leaf in remaining if groups.of_leaves[leaf] == group]
        sites = {site.index: site for leaf in members for site in remaining[leaf]}
        if not sites:
            continue
        grads = {}
        for index, site in sites.items():
            delta = widened(recording.deltas[index])
            factor = factors[:, group].reshape(-1, *[1] * (delta.ndim - 1)).astype(delta.dtype)
            saved = tuple(
                clear(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
                for x in recording.saved[index]
            )
            grads[index] = site.use.operand_grad_sum(saved, clear(factor * delta), site.varies)
        pulled = Pull(recording, list(sites.values()))(grads)
        for leaf in members:
            sums[leaf] = pulled[leaf]
    return sums


def _reweighted(
    loss: LossFn,
    batch: Batch,
    factors: jax.Array,
    added: jax.Array,
    spmd_axis_name: str | None,
) -> list[jax.Array]:
    """The gradient of the losses weighed by their factors."""
    # A gradient that is not finite stays so when multiplied by zero. Those examples see the
    # data of another one instead; if there is no other, the result is zero anyway.
    some = jnp.argmax(added)
    examples = [
        jnp.where(added.reshape(-1, *[1] * (x.ndim - 1)), x, x[some]) for x in batch.examples
    ]

    def weighed(leaves: list[jax.Array]) -> jax.Array:
        one = lambda example: loss(leaves, batch.shared, example)[0]
        losses = jax.vmap(one, spmd_axis_name=spmd_axis_name)(examples)
        return jnp.sum(widened(losses) * factors)

    grads = jax.grad(weighed)(batch.leaves)
    return [jnp.where(added.any(), grad, 0) for grad in grads]


def _in_half_precision(recording: Recording) -> bool:
    used = [site.operand_aval.dtype for site in recording.sites]
    dtypes = [*used, *(jnp.result_type(leaf) for leaf in recording.batch.leaves)]
    return any(jnp.finfo(dtype).bits < 32 for dtype in dtypes)
