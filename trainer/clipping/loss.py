"""A loss in the form that the engines work on.

Whatever the caller's function looks like, engines see flattened arguments of three sorts: the
parameters that are differentiated, what all examples share, and what one example has of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from trainer.clipping.program import CONST, DATA, Block, Info, Kind, View, analyse

LossFn = Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], tuple[Any, Any]]
"""``loss(leaves, shared, example) -> (scalar, aux)`` of flattened arguments."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of a loss.

    Attributes:
        leaves: The parameters that are differentiated.
        shared: The other arguments that all examples have in common.
        examples: The arguments that each example has its own of; batch axis first.
    """

    leaves: list[jax.Array]
    shared: list[Any]
    examples: list[jax.Array]

    @property
    def size(self) -> int:
        """Number of examples."""
        return self.examples[0].shape[0]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss and the structure of its gradient.

    Attributes:
        loss: Of one example.
        gradient_tree: Structure of the parameters, and so of their gradient.
    """

    loss: LossFn
    gradient_tree: Any


@dataclasses.dataclass(frozen=True)
class TracedLoss:
    """A loss of one example and where its parameters meet data.

    Attributes:
        block: The analysed program; its inputs are leaves, shared, example, and its outputs
            the loss and the leaves of the auxiliary output.
        aux_tree: The structure of the auxiliary output.
    """

    block: Block
    aux_tree: Any


def flattened(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    argnums: int | tuple[int, ...],
    batch_argnums: tuple[int, ...],
    has_aux: bool,
    keep_batch_dim: bool,
    prng_argnum: int | None,
) -> tuple[Problem, Batch]:
    """Brings a call of ``fun`` into the engines' form.

    Raises:
        ValueError: If there are too few arguments, or batch axes of different lengths.
        TypeError: If a parameter is not floating point.
    """
    listed = (argnums,) if isinstance(argnums, int) else argnums
    needed = max(*listed, *batch_argnums, prng_argnum or 0)
    if len(args) <= needed:
        raise ValueError(f"argument {needed} is missing: {len(args)} were given")
    own = {i: args[i] for i in batch_argnums}
    size = _batch_size([*own.values(), *kwargs.values()])
    if prng_argnum is not None:
        own[prng_argnum] = jax.tree.map(lambda key: jax.random.split(key, size), args[prng_argnum])
    rest = {i: arg for i, arg in enumerate(args) if i not in own and i not in listed}
    params = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)

    leaves, params_tree = jax.tree.flatten(params)
    shared, rest_tree = jax.tree.flatten(rest)
    examples, own_tree = jax.tree.flatten((own, dict(kwargs)))
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"a parameter has dtype {leaf.dtype}; allowed is floating point, as for jax.grad"
            )

    def loss(leaves: Sequence[Any], shared: Sequence[Any], example: Sequence[Any]) -> Any:
        params = jax.tree.unflatten(params_tree, leaves)
        arguments = jax.tree.unflatten(rest_tree, shared)
        given = (params,) if isinstance(argnums, int) else params
        arguments |= dict(zip(listed, given, strict=True))
        own, named = jax.tree.unflatten(own_tree, example)
        for i, arg in own.items():
            widen = keep_batch_dim and i in batch_argnums
            arguments[i] = jax.tree.map(lambda x: x[None], arg) if widen else arg
        out = fun(*(arguments[i] for i in range(len(args))), **named)
        value, aux = out if has_aux else (out, ())
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(
                f"the loss of one example is {jnp.result_type(value)}{jnp.shape(value)}; "
                "allowed is a floating-point scalar"
            )
        return value, aux

    return Problem(loss, params_tree), Batch(leaves, shared, [jnp.asarray(x) for x in examples])


def _batch_size(batched: Sequence[Any]) -> int:
    leaves = jax.tree.leaves(batched)
    if any(jnp.ndim(leaf) == 0 for leaf in leaves):
        raise ValueError("an argument in batch_argnums has no batch axis: it holds a scalar")
    sizes = {jnp.shape(leaf)[0] for leaf in leaves}
    if len(sizes) != 1:
        raise ValueError(
            f"batch axes have lengths {sorted(sizes)}; allowed is one length for all arguments "
            "in batch_argnums"
        )
    return sizes.pop()


def trace(loss: LossFn, batch: Batch) -> TracedLoss:
    """Traces a loss for one example of a batch."""
    example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in batch.examples]
    jaxpr, (_, aux) = jax.make_jaxpr(loss, return_shape=True)(batch.leaves, batch.shared, example)
    params = [
        Info(Kind.PARAM, frozenset({i}), View(("leaf", i), tuple(range(leaf.ndim))))
        for i, leaf in enumerate(batch.leaves)
    ]
    infos = [*params, *[CONST] * len(batch.shared), *[DATA] * len(batch.examples)]
    return TracedLoss(analyse(jaxpr, infos), jax.tree.structure(aux))
