"""Per-example clipped gradients.

The one place where the trainer asks for them. The engine is jax-privacy's: per-example
gradients by ``vmap``, each clipped to the norm, then summed. Whatever engine stands here, its
result equals a plain loop over the examples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax_privacy import clipping as jax_privacy_clipping
from jax_privacy.clipping import BoundedSensitivityCallable


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
    pre_clipping_transform: Callable[[Any], Any] = lambda grads: grads,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: jax.typing.DTypeLike | None = None,
    prng_argnum: int | None = None,
    spmd_axis_name: str | None = None,
) -> BoundedSensitivityCallable:
    """The gradient of ``fun``, clipped example by example and summed.

    The signature and the result are those of ``jax_privacy.clipping.clipped_grad`` 2.0.0.

    Formal guarantees: adding, removing or zeroing one example changes the returned sum by at
    most ``.sensitivity()`` in L2 norm (the clip norm, or 1 where rescaled, divided by
    ``normalize_by``), non-finite gradients included while ``nan_safe`` holds.

    Args:
        fun: Loss of a batch; returns a scalar, or ``(scalar, aux)`` with ``has_aux``.
        argnums: Which arguments to differentiate.
        has_aux: Whether ``fun`` returns auxiliary values; those come back per example and
            are covered by no guarantee.
        l2_clip_norm: Bound on one example's gradient norm, >= 0; may be traced.
        rescale_to_unit_norm: Divide each clipped gradient by the clip norm.
        normalize_by: Divide the sum by this number; may be traced.
        batch_argnums: Which arguments carry the batch axis.
        keep_batch_dim: Whether ``fun`` sees a batch axis of size one.
        return_values: Also return per-example losses. Private.
        return_grad_norms: Also return per-example gradient norms. Private.
        pre_clipping_transform: Applied to each example's gradient before clipping.
        microbatch_size: Examples processed at a time; bounds memory, not the mechanism.
        nan_safe: Replace non-finite gradient entries by zero before clipping.
        dtype: Type of the sum.
        prng_argnum: Which argument is a PRNG key, split per example.
        spmd_axis_name: As in `jax.vmap`.

    Returns:
        A callable taking ``fun``'s arguments and ``is_padding_example`` (bool ``[batch]``),
        and knowing its ``.sensitivity(neighboring_relation)``.

    Raises:
        ValueError: If a static ``l2_clip_norm`` is negative.

    References:
        Abadi et al. 2016, Algorithm 1.
    """
    return jax_privacy_clipping.clipped_grad(
        fun,
        argnums,
        has_aux,
        l2_clip_norm=l2_clip_norm,  # type: ignore[arg-type]  # may be traced
        rescale_to_unit_norm=rescale_to_unit_norm,
        normalize_by=normalize_by,  # type: ignore[arg-type]  # may be traced
        batch_argnums=batch_argnums,
        keep_batch_dim=keep_batch_dim,
        return_values=return_values,
        return_grad_norms=return_grad_norms,
        pre_clipping_transform=pre_clipping_transform,
        microbatch_size=microbatch_size,
        nan_safe=nan_safe,
        dtype=dtype,
        prng_argnum=prng_argnum,
        spmd_axis_name=spmd_axis_name,
    )
