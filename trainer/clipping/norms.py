"""Per-example gradient norms from what was recorded.

A leaf's part of the norm is either *measured*, by Gram matrices of the rows that meet it, or
*formed*: the gradient of that leaf alone is computed per example and reduced. Measuring is chosen
where it is cheaper. What is formed and takes no more memory than the cotangents it came from is
kept for the clipped sum; the rest is gone once its norm is known.

Squares in floating point can overflow, vanish, or cancel. Examples of which that may be true are
counted, and a loop over just those measures each again from its whole gradient, scaled; it runs
zero times on nearly every batch.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from trainer.clipping.interpreter import Saved, operands
from trainer.clipping.loss import Batch, TracedLoss
from trainer.clipping.program import Site
from trainer.clipping.uses import Gram, StandardizedConvolution, gram_of_weight, widened

# Below 1/32 of the terms' own squared norms, a relative rounding error of 6e-8 in each has grown
# to 1e-6 in the norm.
_CANCELLED = 1 / 32

# A number written and read again takes about as long as this many multiply-adds.
_MEMORY_COST = 16


class Way(enum.Enum):
    """How a leaf's part of the norm is found."""

    MEASURED = "measured by inner products"
    FORMED = "per-example gradients, dropped once measured"
    KEPT = "per-example gradients, no larger than the cotangents they come from"


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one forward and one backward pass over a batch left behind.

    Attributes:
        traced: The loss.
        batch: Its arguments.
        values: Losses ``[batch]``.
        aux: Auxiliary outputs, ``[batch, ...]`` each.
        saved: For each site the data that met the parameter, ``[batch, *loops, ...]``.
        deltas: For each site the cotangent, ``[batch, *loops, ...]``.
    """

    traced: TracedLoss
    batch: Batch
    values: jax.Array
    aux: list[jax.Array]
    saved: Saved
    deltas: dict[int, jax.Array]

    @property
    def sites(self) -> list[Site]:
        """The places where parameters meet data."""
        return self.traced.block.sites


@dataclasses.dataclass(frozen=True)
class Norms:
    """Norms and what can be reused of their making.

    Attributes:
        norms: ``[batch, groups]``, at least float32; NaN or infinite where the gradient is.
        kept: For some leaves the per-example gradients ``[batch, *leaf's shape]``.
        ways: How each leaf that is used was measured.
    """

    norms: jax.Array
    kept: dict[int, jax.Array]
    ways: dict[int, Way]


class Pull:
    """Takes gradients with respect to operands back to the leaves."""

    def __init__(self, recording: Recording, sites: Sequence[Site]) -> None:
        traced, batch = recording.traced, recording.batch
        self.leaves = sorted(frozenset().union(*(site.operand.leaves for site in sites)))
        wanted = [site.index for site in sites]
        hidden = [None] * len(batch.examples)

        def operands_of(chosen: dict[int, jax.Array]) -> dict[int, jax.Array]:
            leaves = [chosen.get(i, leaf) for i, leaf in enumerate(batch.leaves)]
            return operands(traced.block, [*leaves, *batch.shared, *hidden], wanted)

        wide = {i: widened(batch.leaves[i]) for i in self.leaves}
        self.operands, self._transpose = jax.vjp(operands_of, wide)

    def __call__(self, grads: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Gradients with respect to leaves, from those with respect to operands of sites."""
        cotangents = {
            index: grads[index].astype(operand.dtype) for index, operand in self.operands.items()
        }
        return self._transpose(cotangents)[0]


def operand_grad(site: Site, saved: Saved, deltas: dict[int, jax.Array]) -> jax.Array:
    """One example's gradient with respect to a site's operand."""
    return site.use.operand_grad(saved[site.index], deltas[site.index], site.varies)


def measure(
    recording: Recording, groups: Sequence[int], num_groups: int, is_padding: jax.Array
) -> Norms:
    """Per-example gradient norms.

    Args:
        recording: Of the batch.
        groups: For each leaf the number of its group.
        num_groups: How many groups there are.
        is_padding: bool ``[batch]``; the norms of these examples need not be right.
    """
    dtypes = [site.tap_aval.dtype for site in recording.sites]
    dtype = jnp.finfo(jnp.result_type(jnp.float32, *dtypes)).dtype

    used = sites_of_leaves(recording)
    ways: dict[int, Way] = {}

    def measure_one(
        saved: Saved, deltas: dict[int, jax.Array]
    ) -> tuple[jax.Array, jax.Array, dict[int, jax.Array]]:
        squared = terms = jnp.zeros(num_groups, dtype)
        for leaf, sites in used.items():
            gram = _gram(recording, leaf, sites, saved, deltas)
            ways[leaf] = _way(recording, leaf, sites, gram, saved, deltas)
            if gram is not None and ways[leaf] is Way.MEASURED:
                measured = gram.measure()
                squared = squared.at[groups[leaf]].add(measured.squared_norm)
                terms = terms.at[groups[leaf]].add(measured.squared_terms)
        formed = {leaf: used[leaf] for leaf in used if ways[leaf] is not Way.MEASURED}
        grads = _form(recording, formed, saved, deltas)
        for leaf, grad in grads.items():
            square = jnp.sum(jnp.square(jnp.abs(grad)))
            squared = squared.at[groups[leaf]].add(square)
            terms = terms.at[groups[leaf]].add(square)
        kept = {leaf: grad for leaf, grad in grads.items() if ways[leaf] is Way.KEPT}
        return squared, terms, kept

    squared, terms, kept = jax.vmap(measure_one)(recording.saved, recording.deltas)
    tiny = jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps
    doubtful = ~jnp.isfinite(squared) | (squared < _CANCELLED * terms)
    doubtful |= (terms > 0) & (terms < tiny)
    doubtful &= ~jnp.isnan(terms)  # not finite whatever is done: a batch of a diverged model
    norms = jnp.sqrt(jnp.maximum(squared, 0))
    if recording.sites:
        doubtful = doubtful.any(axis=1) & ~is_padding
        norms = _measured_again(recording, groups, norms, kept, doubtful)
    return Norms(norms, kept, ways)


def sites_of_leaves(recording: Recording) -> dict[int, list[Site]]:
    """For each leaf the sites that its gradient comes from; unused leaves have no entry."""
    sites: dict[int, list[Site]] = {}
    for site in recording.sites:
        for leaf in site.operand.leaves:
            sites.setdefault(leaf, []).append(site)
    return dict(sorted(sites.items()))


def _gram(
    recording: Recording,
    leaf: int,
    sites: Sequence[Site],
    saved: Saved,
    deltas: dict[int, jax.Array],
) -> Gram | None:
    """How to measure a leaf, where all its sites see it as nothing but a rearrangement."""
    parameter = widened(recording.batch.leaves[leaf])
    first = sites[0].operand
    grams = []
    for site in sites:
        view = site.operand.view
        if isinstance(site.use, StandardizedConvolution) and len(sites) == 1:
            axes = ()
        elif view is not None and first.view is not None and view.base == first.view.base:
            axes = view.axes
        else:
            return None
        index = site.index
        grams.append(site.use.gram(saved[index], deltas[index], site.varies, axes, parameter))
    return gram_of_weight(grams)


def _way(
    recording: Recording,
    leaf: int,
    sites: Sequence[Site],
    gram: Gram | None,
    saved: Saved,
    deltas: dict[int, jax.Array],
) -> Way:
    """What is cheapest: multiply-adds, and numbers that go through memory."""
    size = recording.batch.leaves[leaf].size
    small = size <= sum(site.tap_size for site in sites)
    forming = sum(site.use.cost(saved[site.index], deltas[site.index]) for site in sites)
    # What is kept costs nothing more: the clipped sum, which otherwise takes as much as forming
    # does, comes from it.
    if small:
        return Way.KEPT
    if gram is not None and gram.cost < forming + _MEMORY_COST * size:
        return Way.MEASURED
    return Way.FORMED


def _form(
    recording: Recording,
    formed: dict[int, list[Site]],
    saved: Saved,
    deltas: dict[int, jax.Array],
) -> dict[int, jax.Array]:
    """One example's gradients of some leaves."""
    sites = list({site.index: site for sites in formed.values() for site in sites}.values())
    if not sites:
        return {}
    pull = Pull(recording, sites)
    grads = pull({site.index: operand_grad(site, saved, deltas) for site in sites})
    return {leaf: grads[leaf] for leaf in formed}


def _measured_again(
    recording: Recording,
    groups: Sequence[int],
    norms: jax.Array,
    kept: dict[int, jax.Array],
    doubtful: jax.Array,
) -> jax.Array:
    """Replaces the norms of doubtful examples, one after another, by those of formed gradients."""
    used = sites_of_leaves(recording)
    examples = jnp.argsort(~doubtful, stable=True)
    squares = jnp.zeros((*norms.shape, 3), norms.dtype)
    # One loop after another: in a single one all gradients of an example would exist at once.
    for leaves in [list(kept), *_packed([leaf for leaf in used if leaf not in kept], recording)]:
        squares = jax.lax.fori_loop(
            0,
            doubtful.sum(),
            functools.partial(_add_squares, recording, groups, kept, leaves, examples),
            squares,
        )
    return jnp.where(doubtful[:, None], _norm_of_squares(squares), norms)


def _add_squares(
    recording: Recording,
    groups: Sequence[int],
    kept: dict[int, jax.Array],
    leaves: Sequence[int],
    examples: jax.Array,
    i: jax.Array,
    squares: jax.Array,
) -> jax.Array:
    """Adds those of one example's gradients of some leaves."""
    # What is kept is not formed again: the data that it came from would be held for that.
    used = sites_of_leaves(recording)
    formed = {leaf: used[leaf] for leaf in leaves if leaf not in kept}
    needed = {site.index for sites in formed.values() for site in sites}
    data = [{i: of[i] for i in needed} for of in (recording.saved, recording.deltas)]
    take = lambda x: jax.lax.dynamic_index_in_dim(x, examples[i], keepdims=False)
    grads = jax.tree.map(take, {leaf: kept[leaf] for leaf in leaves if leaf in kept})
    grads |= _form(recording, formed, *jax.tree.map(take, data))
    for leaf, grad in grads.items():
        added = _scaled_squares(jnp.abs(grad).astype(squares.dtype))
        squares = squares.at[examples[i], groups[leaf]].add(added)
    return squares


def _packed(leaves: Sequence[int], recording: Recording) -> list[list[int]]:
    """Leaves in parts that are together no larger than the largest of them."""
    sizes = {leaf: recording.batch.leaves[leaf].size for leaf in leaves}
    parts: list[list[int]] = []
    room = 0
    for leaf, size in sizes.items():
        if not parts or room < size:
            parts.append([])
            room = max(sizes.values())
        parts[-1].append(leaf)
        room -= size
    return parts


def _scales(dtype: jax.typing.DTypeLike) -> jax.Array:
    """Small, one, large: at one of them the squares of any numbers are of ordinary size."""
    exponent = 5 * jnp.finfo(dtype).maxexp // 8
    return jnp.ldexp(jnp.ones(3, dtype), jnp.array([-exponent, 0, exponent]))


def _scaled_squares(numbers: jax.Array) -> jax.Array:
    """The sum of squares at each of three scales, in one pass.

    After Blue 1978, "A portable Fortran program to find the Euclidean norm of a vector", which
    has three sums as well.
    """
    scales = _scales(numbers.dtype).reshape(3, *[1] * numbers.ndim)
    return jnp.sum(jnp.square(scales * numbers), axis=range(1, 1 + numbers.ndim))


def _norm_of_squares(squares: jax.Array) -> jax.Array:
    """The norm from sums of squares ``[..., 3]``; not finite where a number was not."""
    finfo = jnp.finfo(squares.dtype)
    small, same, large = jnp.moveaxis(jnp.sqrt(squares) / _scales(squares.dtype), -1, 0)
    vanished = squares[..., 1] < finfo.tiny / finfo.eps
    norm = jnp.where(vanished, large, same)
    return jnp.where(jnp.isfinite(squares[..., 1]), norm, small)


def safe_norm(numbers: jax.Array) -> jax.Array:
    """The norm over the last axis, whatever the size of the numbers; NaN if any is not finite.

    Args:
        numbers: Floating point, >= 0.
    """
    largest = jnp.max(numbers, axis=-1, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    norm = scale[..., 0] * jnp.sqrt(jnp.sum(jnp.square(numbers / scale), axis=-1))
    return jnp.where(jnp.isfinite(scale[..., 0]), norm, jnp.nan)
