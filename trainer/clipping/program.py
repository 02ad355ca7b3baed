"""Where parameters meet data in the loss of one example.

The loss is traced to a jaxpr and every value in it is one of three kinds: known without the
example and free of gradient (``CONST``), a function of parameters alone (``PARAM``), or
dependent on the example (``DATA``). A *site* is a place where a ``PARAM`` value meets ``DATA``.
There are two sorts. A *known use* is a linear equation whose gradient with respect to the
parameter operand follows from its data operand and its output's cotangent
(`trainer.clipping.uses`). At any other place the operand is *copied* per example, so that its
cotangent is its per-example gradient; this is exact for every primitive, only dearer.

Calls (``jit``, ``checkpoint``) and ``scan`` are entered. Functions with a gradient of their own
(``custom_jvp``, ``custom_vjp``) are not: their rule is what `jax.grad` would use, so it is kept,
and a parameter that goes in is copied. So are those that meet ``cond`` or ``while``.
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

from trainer.clipping.uses import CopiedOperand, Use, known_use
from trainer.models.standardization import is_standardize

_CALLS = (primitives.jit_p, primitives.closed_call_p, primitives.remat_p)


class Kind(enum.IntEnum):
    """What a value depends on; the kind of a result is at least that of its operands."""

    CONST = 0
    PARAM = 1
    DATA = 2


@dataclasses.dataclass(frozen=True)
class View:
    """An operand as a rearrangement of a leaf's elements, one to one.

    Attributes:
        base: The array whose axes are named: a leaf, a reshaped view, or one iteration's slice.
        axes: For each axis of the operand its axis in ``base``, None for an axis of size one.
    """

    base: tuple[Any, ...]
    axes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Info:
    """What is known statically of one value.

    Attributes:
        kind: See `Kind`.
        leaves: The parameter leaves through which gradient flows into it; empty unless PARAM.
        view: Set where it is a one-to-one rearrangement of a single leaf.
        standardized: Set where it is the weight standardisation of such a rearrangement.
        loops: Identifiers of the enclosing loops with whose iteration it varies.
    """

    kind: Kind
    leaves: frozenset[int] = frozenset()
    view: View | None = None
    loops: frozenset[int] = frozenset()
    standardized: bool = False


CONST = Info(Kind.CONST)
DATA = Info(Kind.DATA)


@dataclasses.dataclass(frozen=True)
class Loop:
    """An enclosing ``scan``."""

    identifier: int
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A place where a parameter operand meets data.

    Attributes:
        index: Its number in the program.
        use: How the operand's gradient is computed.
        operand: The operand's `Info`.
        operand_aval: Its shape and dtype inside its loops.
        tap_aval: Shape and dtype of the value whose cotangent is taken, inside its loops.
        loops: The enclosing loops, outermost first.
    """

    index: int
    use: Use
    operand: Info
    operand_aval: jax.ShapeDtypeStruct
    tap_aval: jax.ShapeDtypeStruct
    loops: tuple[Loop, ...]

    @property
    def tap_shape(self) -> tuple[int, ...]:
        """Shape of one example's cotangents: one axis for each loop, then the tap's."""
        return (*(loop.length for loop in self.loops), *self.tap_aval.shape)

    @property
    def tap_size(self) -> int:
        """How many numbers one example's cotangents are."""
        return math.prod(self.tap_shape)

    @property
    def varies(self) -> tuple[bool, ...]:
        """For each loop whether the operand is another one in every iteration."""
        return tuple(loop.identifier in self.operand.loops for loop in self.loops)


@dataclasses.dataclass
class Step:
    """One equation and what is done about it.

    Attributes:
        eqn: The equation.
        known: Its outputs are CONST or PARAM.
        use: The site of a known use, which taps the output.
        operand_position: Which operand of a known use is the parameter.
        copies: Sites of operands that are copied per example, by operand position.
        block: The inside of a call or loop that is entered.
        loop: Set where the equation is a ``scan`` that is entered.
    """

    eqn: Any
    known: bool
    use: Site | None = None
    operand_position: int = -1
    copies: dict[int, Site] = dataclasses.field(default_factory=dict)
    block: "Block | None" = None
    loop: Loop | None = None


@dataclasses.dataclass
class Block:
    """A jaxpr with its steps.

    Attributes:
        jaxpr: Its equations.
        consts: The constants that belong to them.
        steps: One for each equation.
        infos: What is known of each variable.
        copied_outputs: Sites of outputs that are copied because data is wanted there.
        sites: All sites within, those of inner blocks included.
    """

    jaxpr: Any
    consts: Sequence[Any]
    steps: list[Step]
    infos: dict[Any, Info]
    copied_outputs: dict[int, Site]
    sites: list[Site]

    def info(self, atom: Any) -> Info:
        """What is known of a variable or literal."""
        return CONST if isinstance(atom, core.Literal) else self.infos[atom]

    @property
    def out_infos(self) -> list[Info]:
        """What is known of the outputs."""
        return [
            DATA if i in self.copied_outputs else self.info(atom)
            for i, atom in enumerate(self.jaxpr.outvars)
        ]


def analyse(jaxpr: core.ClosedJaxpr, in_infos: Sequence[Info]) -> Block:
    """Finds the sites of a loss.

    Args:
        jaxpr: Its first output is the loss.
        in_infos: What is known of each input.
    """
    return _Analysis(itertools.count(), itertools.count()).block(
        jaxpr, in_infos, loops=(), wanted_data=frozenset({0})
    )


@dataclasses.dataclass
class _Analysis:
    site_numbers: Iterator[int]
    loop_numbers: Iterator[int]

    def block(
        self,
        jaxpr: Any,
        in_infos: Sequence[Info],
        loops: tuple[Loop, ...],
        wanted_data: frozenset[int] = frozenset(),
    ) -> Block:
        consts: Sequence[Any] = ()
        if isinstance(jaxpr, core.ClosedJaxpr):
            jaxpr, consts = jaxpr.jaxpr, jaxpr.consts
        infos = dict(zip(jaxpr.invars, in_infos, strict=True))
        infos |= dict.fromkeys(jaxpr.constvars, CONST)
        block = Block(jaxpr, consts, [], infos, {}, [])
        for eqn in jaxpr.eqns:
            step, out_infos = self.step(block, eqn, loops)
            block.steps.append(step)
            infos.update(zip(eqn.outvars, out_infos, strict=True))
        for i in sorted(wanted_data):
            if block.info(jaxpr.outvars[i]).kind == Kind.PARAM:
                block.copied_outputs[i] = self.copy(block, jaxpr.outvars[i], loops)
        return block

    def step(self, block: Block, eqn: Any, loops: tuple[Loop, ...]) -> tuple[Step, Sequence[Info]]:
        infos = [block.info(atom) for atom in eqn.invars]
        params = [i for i, info in enumerate(infos) if info.kind == Kind.PARAM]
        if all(info.kind != Kind.DATA for info in infos):
            return Step(eqn, known=True), _known_outputs(eqn, infos)
        if not params:
            return Step(eqn, known=False), [DATA] * len(eqn.outvars)
        if eqn.primitive in _CALLS:
            inner = self.block(eqn.params["jaxpr"], infos, loops)
            block.sites += inner.sites
            return Step(eqn, known=False, block=inner), inner.out_infos
        if eqn.primitive is primitives.scan_p:
            return self.loop(block, eqn, infos, loops)
        use = None
        if len(params) == 1:
            use = known_use(eqn, params[0], infos[params[0]].standardized)
        if use is not None:
            step = Step(eqn, known=False, operand_position=params[0])
            step.use = self.site(block, use, eqn.invars[params[0]], eqn.outvars[0].aval, loops)
            return step, [DATA]
        step = Step(eqn, known=False)
        for position in params:
            step.copies[position] = self.copy(block, eqn.invars[position], loops)
        return step, [DATA] * len(eqn.outvars)

    def loop(
        self, block: Block, eqn: Any, infos: list[Info], loops: tuple[Loop, ...]
    ) -> tuple[Step, Sequence[Info]]:
        """Enters a scan once it is known which parts of its carry depend on data."""
        jaxpr = eqn.params["jaxpr"]
        num_consts, num_carry = eqn.params["num_consts"], eqn.params["num_carry"]
        loop = Loop(next(self.loop_numbers), eqn.params["length"])
        varies = frozenset({loop.identifier})
        consts = infos[:num_consts]
        carry = [_varying(info, varies) for info in infos[num_consts : num_consts + num_carry]]
        slices = [_slice(info, varies) for info in infos[num_consts + num_carry :]]
        while True:
            trial = _Analysis(itertools.count(), itertools.count(10**6))
            inner = trial.block(jaxpr, [*consts, *carry, *slices], (*loops, loop))
            joined = [
                _join(before, after, varies)
                for before, after in zip(carry, inner.out_infos[:num_carry], strict=True)
            ]
            if joined == carry:
                break
            carry = joined
        data_carry = frozenset(i for i, info in enumerate(carry) if info.kind == Kind.DATA)
        inner = self.block(jaxpr, [*consts, *carry, *slices], (*loops, loop), data_carry)
        step = Step(eqn, known=False, block=inner, loop=loop)
        for i in sorted(data_carry):
            if infos[num_consts + i].kind == Kind.PARAM:
                atom = eqn.invars[num_consts + i]
                step.copies[num_consts + i] = self.copy(block, atom, loops)
        block.sites += inner.sites
        outs = [
            DATA
            if info.kind == Kind.DATA
            else Info(info.kind, info.leaves, None, info.loops - varies)
            for info in [*carry, *inner.out_infos[num_carry:]]
        ]
        return step, outs

    def copy(self, block: Block, atom: Any, loops: tuple[Loop, ...]) -> Site:
        return self.site(block, CopiedOperand(), atom, atom.aval, loops)

    def site(
        self, block: Block, use: Use, operand: Any, tapped: Any, loops: tuple[Loop, ...]
    ) -> Site:
        site = Site(
            index=next(self.site_numbers),
            use=use,
            operand=block.info(operand),
            operand_aval=jax.ShapeDtypeStruct(operand.aval.shape, operand.aval.dtype),
            tap_aval=jax.ShapeDtypeStruct(tapped.shape, tapped.dtype),
            loops=loops,
        )
        block.sites.append(site)
        return site


def _known_outputs(eqn: Any, infos: Sequence[Info]) -> list[Info]:
    """Outputs of an equation that touches no data."""
    loops = frozenset().union(*(info.loops for info in infos))
    leaves = frozenset().union(*(info.leaves for info in infos))
    outs = []
    for var in eqn.outvars:
        differentiable = jnp.issubdtype(var.aval.dtype, jnp.inexact)
        if leaves and differentiable and eqn.primitive is not primitives.stop_gradient_p:
            view, standardized = None, False
            if len(infos) == 1:
                view = _rearranged(eqn, infos[0], var)
                standardized = _is_standardized(eqn, infos[0])
            outs.append(Info(Kind.PARAM, leaves, view, loops, standardized))
        else:
            outs.append(Info(Kind.CONST, loops=loops))
    return outs


def _is_standardized(eqn: Any, info: Info) -> bool:
    """Whether the result is a whole leaf after weight standardisation, or such a one cast."""
    if eqn.primitive is primitives.convert_element_type_p:
        return info.standardized
    whole = info.view is not None and info.view.base[0] == "leaf"
    return whole and eqn.primitive is primitives.jit_p and is_standardize(eqn)


def _rearranged(eqn: Any, info: Info, out: Any) -> View | None:
    """The view after an equation that only moves elements about, or None."""
    view, aval = info.view, eqn.invars[0].aval
    if view is None:
        return None
    match eqn.primitive:
        case primitives.convert_element_type_p | primitives.copy_p | primitives.name_p:
            return view if jnp.issubdtype(out.aval.dtype, jnp.floating) else None
        case primitives.transpose_p:
            return View(view.base, tuple(view.axes[i] for i in eqn.params["permutation"]))
        case primitives.squeeze_p | primitives.reshape_p | primitives.broadcast_in_dim_p:
            if math.prod(out.aval.shape) != math.prod(aval.shape):
                return None
            axes = _same_but_for_unit_axes(view.axes, aval.shape, out.aval.shape)
            if axes is not None:
                return View(view.base, axes)
            base = ("reshape", view, out.aval.shape)
            return View(base, tuple(range(len(out.aval.shape))))
        case primitives.rev_p:
            base = ("reverse", view, eqn.params["dimensions"])
            return View(base, tuple(range(len(aval.shape))))
        case _:
            return None


def _same_but_for_unit_axes(
    axes: tuple[int | None, ...], shape: tuple[int, ...], new_shape: tuple[int, ...]
) -> tuple[int | None, ...] | None:
    kept = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size != 1]
    if [size for _, size in kept] != [size for size in new_shape if size != 1]:
        return None
    remaining = iter(kept)
    return tuple(None if size == 1 else next(remaining)[0] for size in new_shape)


def _varying(info: Info, loop: frozenset[int]) -> Info:
    """The carry of a loop: another value in each iteration."""
    if info.kind == Kind.DATA:
        return DATA
    return Info(info.kind, info.leaves, None, info.loops | loop)


def _slice(info: Info, loop: frozenset[int]) -> Info:
    """What a loop sees of an array of which it takes one slice in each iteration."""
    view = info.view
    if view is not None:
        stacked, *axes = view.axes
        view = View(("slice", view.base, stacked), tuple(axes)) if stacked is not None else None
    return Info(info.kind, info.leaves, view, info.loops | loop if info.kind < 2 else info.loops)


def _join(before: Info, after: Info, loop: frozenset[int]) -> Info:
    """The carry when what comes out of an iteration goes into the next."""
    kind = max(before.kind, after.kind)
    if kind == Kind.DATA:
        return DATA
    return Info(kind, before.leaves | after.leaves, None, before.loops | after.loops | loop)
