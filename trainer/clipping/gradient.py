"""`clipped_grad`: per-example clipped gradients, by any engine."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax_privacy.clipping import AuxiliaryOutput, BoundedSensitivityCallable

from trainer.clipping.choice import Choice, choose
from trainer.clipping.engines import ClippedSums
from trainer.clipping.loss import Batch, Problem, flattened
from trainer.clipping.modes import ClippingMode
from trainer.clipping.running import Clipping, EngineName, run

Engine = Literal["auto", "vmap", "two_pass", "book_keeping"]


def _identity(grads: Any) -> Any:
    return grads


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: float | jax.Array,
    rescale_to_unit_norm: bool = False,
    normalize_by: float | jax.Array = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    pre_clipping_transform: Callable[[Any], Any] = _identity,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: jax.typing.DTypeLike | None = None,
    prng_argnum: int | None = None,
    spmd_axis_name: str | None = None,
    engine: Engine = "auto",
    mode: ClippingMode = "flat",
) -> BoundedSensitivityCallable:
    """The gradient of ``fun``, clipped example by example and summed.

    Signature and results are those of ``jax_privacy.clipping.clipped_grad`` 2.0.0, with an
    engine and a clipping mode to choose. Every engine gives the same result for every loss up
    to rounding: where one has no formula for how a parameter is used, it forms that parameter's
    per-example gradients, and that alone.

    Formal guarantees: adding, removing or zeroing one example changes the returned sum by at
    most ``.sensitivity()`` in L2 norm (the clip norm, or 1 where rescaled, divided by
    ``normalize_by``), whatever the mode. An example whose gradient is not finite adds exactly
    zero while ``nan_safe`` holds. Norms and sums are computed in float32 or wider. The
    auxiliary outputs of an example depend on that example alone and are covered by nothing.

    Args:
        fun: Loss of a batch; returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        argnums: Which arguments to differentiate: any pytrees of floating-point arrays.
        has_aux: Whether ``fun`` returns auxiliary values; those come back per example.
        l2_clip_norm: Bound on one example's gradient norm, >= 0; may be traced.
        rescale_to_unit_norm: Divide each clipped gradient by the clip norm.
        normalize_by: Divide the sum by this number, > 0; may be traced.
        batch_argnums: Which arguments carry the batch axis. Keyword arguments do as well.
        keep_batch_dim: Whether ``fun`` sees a batch axis of size one. Without it an example
            may be a group of several, a user's say, which is clipped as one.
        return_values: Also return per-example losses. Private.
        return_grad_norms: Also return per-example gradient norms. Private.
        pre_clipping_transform: Applied to each example's gradient before clipping. Any but
            the default needs the gradients themselves, so ``vmap`` is used whatever ``engine``.
        microbatch_size: Examples processed at a time, >= 1; bounds memory and does not touch
            the mechanism. Padding costs nothing beyond the last part it shares with others.
        nan_safe: Leave out examples whose gradient is not finite. Without it the guarantee
            holds for finite gradients only.
        dtype: Type of the result; by default each leaf's own.
        prng_argnum: Which argument is a PRNG key, split per example.
        spmd_axis_name: As in `jax.vmap`.
        engine: ``vmap`` is jax-privacy's own; ``two_pass`` takes norms first and then one
            reweighted batch gradient; ``book_keeping`` does both in one pass; ``auto``
            measures once which is fastest for these shapes on this device
            (`trainer.clipping.choice`), and never takes one that is slower than ``vmap``.
        mode: ``flat``, ``per_layer`` or ``automatic`` (`trainer.clipping.modes`).

    Returns:
        A callable taking ``fun``'s arguments and ``is_padding_example`` (bool ``[batch]``),
        and knowing its ``.sensitivity(neighboring_relation)``. It returns the sum, or with
        any of the per-example outputs asked for ``(sum, AuxiliaryOutput)``. A batch of no
        examples gives zeros.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If what is differentiated is not floating point, or the loss no scalar.

    References:
        Abadi et al. 2016, Algorithm 1.
    """
    argnums = argnums if isinstance(argnums, int) else tuple(argnums)
    batch_argnums = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
    _check_numbers(l2_clip_norm, normalize_by, microbatch_size)
    _check_argnums(argnums, batch_argnums)
    _check_choice("engine", engine, get_args(Engine))
    _check_choice("mode", mode, get_args(ClippingMode))
    transformed = pre_clipping_transform is not _identity
    clipping = Clipping(
        mode=mode,
        l2_clip_norm=l2_clip_norm,
        rescale_to_unit_norm=rescale_to_unit_norm,
        transform=pre_clipping_transform if transformed else None,
        nan_safe=nan_safe,
        spmd_axis_name=spmd_axis_name,
    )

    def clipped(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        problem, batch = flattened(
            fun,
            args,
            kwargs,
            argnums=argnums,
            batch_argnums=batch_argnums,
            has_aux=has_aux,
            keep_batch_dim=keep_batch_dim,
            prng_argnum=prng_argnum,
        )
        if is_padding_example is None:
            is_padding_example = jnp.zeros(batch.size, bool)
        is_padding = jnp.asarray(is_padding_example, bool)
        chosen: EngineName = "vmap"
        size = microbatch_size
        if engine == "auto" and not transformed:
            choice = choose(problem, batch, clipping, microbatch_size)
            chosen, size = choice.engine, choice.microbatch_size
        elif engine != "auto" and not transformed:
            chosen = engine
        sums = run(chosen, size, problem, batch, is_padding, clipping)
        return finished(sums, batch, problem)

    def finished(sums: ClippedSums, batch: Batch, problem: Problem) -> Any:
        """Brings sums and outputs into the form that was asked for."""
        grads = jax.tree.map(lambda total: total / normalize_by, sums.grads)
        if dtype is not None:
            grads = jax.tree.map(lambda total: total.astype(dtype), grads)
        elif not transformed:
            params = jax.tree.unflatten(problem.gradient_tree, batch.leaves)
            grads = jax.tree.map(lambda total, leaf: total.astype(leaf.dtype), grads, params)
        if not returns_more:
            return grads
        aux = jax.tree.map(_without_axis_of_one, sums.aux) if keep_batch_dim else sums.aux
        return grads, AuxiliaryOutput(
            values=sums.values if return_values else None,
            grad_norms=sums.norms.astype(jnp.float32) if return_grad_norms else None,
            aux=aux if has_aux else None,
        )

    bound: Any = 1.0 if rescale_to_unit_norm else l2_clip_norm
    returns_more = has_aux or return_values or return_grad_norms
    return BoundedSensitivityCallable(clipped, bound / normalize_by, returns_more)


def settle(
    fun: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] = 0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    microbatch_size: int | None = None,
    mode: ClippingMode = "flat",
) -> Choice:
    """What ``engine="auto"`` takes for a loss and the shapes of its arguments.

    For callers who have to know it, or to keep it: passing its engine and microbatch size to
    `clipped_grad` gives the same program everywhere.

    Args:
        fun: As in `clipped_grad`, without auxiliary output.
        *args: Its arguments; shapes alone are used.
        argnums: As in `clipped_grad`, and so are the others.
        batch_argnums: See there.
        keep_batch_dim: See there.
        microbatch_size: See there.
        mode: See there.
    """
    problem, batch = flattened(
        fun,
        args,
        {},
        argnums=argnums if isinstance(argnums, int) else tuple(argnums),
        batch_argnums=(batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums),
        has_aux=False,
        keep_batch_dim=keep_batch_dim,
        prng_argnum=None,
    )
    clipping = Clipping(
        mode=mode,
        l2_clip_norm=1.0,
        rescale_to_unit_norm=False,
        transform=None,
        nan_safe=True,
        spmd_axis_name=None,
    )
    return choose(problem, batch, clipping, microbatch_size)


def _without_axis_of_one(x: jax.Array) -> jax.Array:
    """An output that kept the batch axis of one which ``fun`` saw loses it, as in jax-privacy."""
    return jnp.squeeze(x, 1) if x.ndim >= 2 and x.shape[1] == 1 else x


def _check_numbers(l2_clip_norm: Any, normalize_by: Any, microbatch_size: Any) -> None:
    # Traced numbers cannot be looked at: a negative clip norm counts as zero.
    if isinstance(l2_clip_norm, int | float) and not l2_clip_norm >= 0:
        raise ValueError(f"l2_clip_norm={l2_clip_norm!r}: allowed is a number >= 0")
    if isinstance(normalize_by, int | float) and not normalize_by > 0:
        raise ValueError(f"normalize_by={normalize_by!r}: allowed is a number > 0")
    if microbatch_size is not None and microbatch_size < 1:
        raise ValueError(
            f"microbatch_size={microbatch_size!r}: allowed is None or a whole number >= 1"
        )


def _check_argnums(argnums: int | tuple[int, ...], batch_argnums: tuple[int, ...]) -> None:
    listed = (argnums,) if isinstance(argnums, int) else argnums
    if not batch_argnums or not listed:
        raise ValueError("argnums and batch_argnums must name at least one argument each")
    if min(*listed, *batch_argnums) < 0:
        raise ValueError(f"argnums={argnums} and batch_argnums={batch_argnums} must be >= 0")
    both = sorted(set(listed) & set(batch_argnums))
    if both:
        raise ValueError(
            f"argnums={argnums} and batch_argnums={batch_argnums} share {both}: an argument "
            "with a batch axis has no per-example gradient"
        )


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed is one of {', '.join(allowed)}")
