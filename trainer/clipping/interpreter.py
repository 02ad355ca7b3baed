"""Evaluates an analysed loss: once with taps, once for the parameter operands alone.

`record` computes what the loss computes, adds a zero *tap* at every site and keeps the data that
meets a parameter there. The gradient with respect to the taps is then every site's cotangent,
and JAX's own differentiation has found it, through any primitive.

`operands` maps the parameters to the operands at the sites. Its transpose pulls gradients with
respect to operands back to the parameters, through whatever lies between: reshapes, casts, weight
standardisation, sums of several weights.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from trainer.clipping.program import Block, Info, Kind, Site, Step

Taps = dict[int, jax.Array]
Saved = dict[int, tuple[jax.Array, ...]]

_UNKNOWN = object()

_REARRANGING = (
    primitives.transpose_p,
    primitives.squeeze_p,
    primitives.reshape_p,
    primitives.broadcast_in_dim_p,
    primitives.rev_p,
    primitives.slice_p,
    primitives.copy_p,
)


def record(block: Block, values: Sequence[Any], taps: Taps) -> tuple[list[Any], Saved]:
    """Evaluates a block with taps.

    Args:
        block: From `trainer.clipping.program.analyse`.
        values: Its inputs, for one example.
        taps: For each site's index what is added there, shaped ``site.tap_shape`` less the axes
            of loops that have been entered.

    Returns:
        The outputs, and for each site's index the data that its gradient is computed from.
    """
    env = _environment(block, values)
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
    saved: Saved = {}
    for step in block.steps:
        inputs = [read(atom) for atom in step.eqn.invars]
        for position, site in step.copies.items():
            inputs[position] = inputs[position] + taps[site.index]
        if step.loop is not None:
            outputs, kept = _record_loop(step, inputs, taps)
            saved |= kept
        elif step.block is not None:
            outputs, kept = _record_call(step, inputs, taps)
            saved |= kept
        else:
            outputs = _bind(step.eqn, inputs)
        if step.use is not None:
            saved[step.use.index] = step.use.use.saved(inputs, outputs[0])
            outputs = [outputs[0] + taps[step.use.index]]
        saved |= {site.index: () for site in step.copies.values()}
        env.update(zip(step.eqn.outvars, outputs, strict=True))
    outputs = [read(atom) for atom in block.jaxpr.outvars]
    for i, site in block.copied_outputs.items():
        outputs[i] = outputs[i] + taps[site.index]
        saved[site.index] = ()
    return outputs, saved


def operands(
    block: Block,
    values: Sequence[Any],
    wanted: Collection[int],
) -> dict[int, jax.Array]:
    """The parameter operands at some sites.

    Args:
        block: From `trainer.clipping.program.analyse`.
        values: Its inputs; those that hold data are not read.
        wanted: Indices of the sites.

    Returns:
        For each wanted site's index its operand, with an axis for each loop with whose
        iteration it varies, outermost first. Where ``values`` are wider than the program has
        them, so are operands that only casts and rearrangements separate from them.
    """
    known = [
        value if info.kind != Kind.DATA else _UNKNOWN
        for value, info in zip(values, _in_infos(block), strict=True)
    ]
    return _operands(block, known, frozenset(wanted), frozenset())[1]


def _bind(eqn: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    params = eqn.primitive.get_bind_params(eqn.params)
    with eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs]


def _bind_wide(eqn: Any, inputs: Sequence[Any], exact: Sequence[Any]) -> Sequence[Any]:
    """Evaluates an equation, but does not round its result to half precision.

    Gradients flow back along these equations. Rounding the sum of a batch could change it by
    more than one example may; so casts to half precision are skipped, and undone (``exact``)
    only where an equation computes with the value.
    """
    if eqn.primitive is primitives.convert_element_type_p:
        before, after = jnp.result_type(inputs[0]), eqn.params["new_dtype"]
        if jnp.issubdtype(before, jnp.floating) and jnp.promote_types(before, after) == before:
            return inputs
    if eqn.primitive in _REARRANGING:
        return _bind(eqn, inputs)
    return _bind(eqn, exact)


def _narrowed(value: Any, dtype: Any) -> Any:
    if value is _UNKNOWN or jnp.result_type(value) == dtype:
        return value
    return jnp.asarray(value, dtype)


def _environment(block: Block, values: Sequence[Any]) -> dict[Any, Any]:
    env = dict(zip(block.jaxpr.invars, values, strict=True))
    return env | dict(zip(block.jaxpr.constvars, block.consts, strict=True))


def _in_infos(block: Block) -> list[Info]:
    return [block.infos[var] for var in block.jaxpr.invars]


def _inside(block: Block, taps: Mapping[int, Any]) -> dict[int, Any]:
    return {site.index: taps[site.index] for site in block.sites}


def _record_call(step: Step, inputs: Sequence[Any], taps: Taps) -> tuple[list[Any], Saved]:
    block = step.block
    assert block is not None
    evaluate = lambda inputs, taps: record(block, inputs, taps)
    if step.eqn.primitive is primitives.remat_p:
        evaluate = jax.checkpoint(
            evaluate,
            policy=step.eqn.params["policy"],
            prevent_cse=step.eqn.params["prevent_cse"],
        )
    return evaluate(list(inputs), _inside(block, taps))


def _record_loop(step: Step, inputs: Sequence[Any], taps: Taps) -> tuple[list[Any], Saved]:
    block = step.block
    assert block is not None
    consts, init, slices = _scan_parts(step.eqn, inputs)

    def body(carry: list[Any], at: tuple[list[Any], Taps]) -> tuple[list[Any], Any]:
        slices, inner_taps = at
        outputs, saved = record(block, [*consts, *carry, *slices], inner_taps)
        return outputs[: len(carry)], (outputs[len(carry) :], saved)

    carry, (stacked, saved) = jax.lax.scan(
        body, init, (slices, _inside(block, taps)), **_scan_options(step.eqn)
    )
    return [*carry, *stacked], saved


def _scan_parts(eqn: Any, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    first, last = eqn.params["num_consts"], eqn.params["num_consts"] + eqn.params["num_carry"]
    return list(values[:first]), list(values[first:last]), list(values[last:])


def _scan_options(eqn: Any) -> dict[str, Any]:
    return {name: eqn.params[name] for name in ("length", "reverse", "unroll")}


def _operands(
    block: Block, values: Sequence[Any], wanted: frozenset[int], outside: frozenset[int]
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Evaluates what needs no data and varies with none of the loops ``outside``.

    Such a loop is one whose body is looked at without running it.
    """
    env = _environment(block, values)
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else env[atom]
    exact = lambda atom: _narrowed(read(atom), atom.aval.dtype)
    found: dict[int, jax.Array] = {}

    def find(site: Site | None, atom: Any) -> None:
        if site is not None and site.index in wanted and not site.operand.loops & outside:
            found[site.index] = read(atom)

    for step in block.steps:
        eqn = step.eqn
        if step.use is not None:
            find(step.use, eqn.invars[step.operand_position])
        for position, site in step.copies.items():
            find(site, eqn.invars[position])
        inputs = [read(atom) for atom in eqn.invars]
        outputs: Sequence[Any] = [_UNKNOWN] * len(eqn.outvars)
        if step.known and not any(value is _UNKNOWN for value in inputs):
            outputs = _bind_wide(eqn, inputs, [exact(atom) for atom in eqn.invars])
        elif step.block is not None:
            evaluate = _operands_of_call if step.loop is None else _operands_of_loop
            outputs, inner = evaluate(step, inputs, wanted, outside)
            found |= inner
        env.update(zip(eqn.outvars, outputs, strict=True))
    for i, site in block.copied_outputs.items():
        find(site, block.jaxpr.outvars[i])
    return [read(atom) for atom in block.jaxpr.outvars], found


def _operands_of_call(
    step: Step, inputs: Sequence[Any], wanted: frozenset[int], outside: frozenset[int]
) -> tuple[list[Any], dict[int, jax.Array]]:
    assert step.block is not None
    return _operands(step.block, inputs, wanted, outside)


def _operands_of_loop(
    step: Step, inputs: Sequence[Any], wanted: frozenset[int], outside: frozenset[int]
) -> tuple[list[Any], dict[int, jax.Array]]:
    """Operands that no iteration changes come from a look at the body, the others from a run."""
    block, loop = step.block, step.loop
    assert block is not None
    assert loop is not None
    varying = frozenset({loop.identifier})
    consts, init, slices = _scan_parts(step.eqn, inputs)
    hidden = [_UNKNOWN] * (len(init) + len(slices))
    _, found = _operands(block, [*consts, *hidden], wanted, outside | varying)

    infos = block.out_infos
    runs = lambda info: info.kind != Kind.DATA and not info.loops & outside
    carried = [_carry_runs(step, block, i, outside) for i in range(len(init))]
    stacked = [runs(info) for info in infos[len(init) :]]
    within = {
        site.index
        for site in block.sites
        if site.index in wanted
        and loop.identifier in site.operand.loops
        and not site.operand.loops & outside
    }
    outputs: list[Any] = [_UNKNOWN] * len(infos)
    if not within and not any(carried) and not any(stacked):
        return outputs, found

    def select(values: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
        return [value for value, wanted in zip(values, chosen, strict=True) if wanted]

    def restore(values: Sequence[Any], chosen: Sequence[bool]) -> list[Any]:
        remaining = iter(values)
        return [next(remaining) if wanted else _UNKNOWN for wanted in chosen]

    sliced = [value is not _UNKNOWN for value in slices]

    def body(carry: list[Any], at: list[Any]) -> tuple[list[Any], Any]:
        values = [*consts, *restore(carry, carried), *restore(at, sliced)]
        results, inner = _operands(block, values, frozenset(within), outside)
        results = [
            _narrowed(value, atom.aval.dtype)
            for value, atom in zip(results, block.jaxpr.outvars, strict=True)
        ]
        return (
            select(results[: len(init)], carried),
            (select(results[len(init) :], stacked), inner),
        )

    exact_init = [
        _narrowed(value, atom.aval.dtype)
        for value, atom in zip(init, step.eqn.invars[len(consts) :], strict=False)
    ]
    carry, (ys, inner) = jax.lax.scan(
        body, select(exact_init, carried), select(slices, sliced), **_scan_options(step.eqn)
    )
    outputs = [*restore(carry, carried), *restore(ys, stacked)]
    return outputs, found | inner


def _carry_runs(step: Step, block: Block, i: int, outside: frozenset[int]) -> bool:
    """Whether a part of the carry can be had without data."""
    info = block.infos[block.jaxpr.invars[step.eqn.params["num_consts"] + i]]
    return info.kind != Kind.DATA and not info.loops & outside
