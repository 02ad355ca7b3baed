"""Engines against jax-privacy's own clipped gradient, all in one compiled program."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy import clipping as jax_privacy_clipping

from trainer.clipping import clipped_grad

ENGINES: tuple[Any, ...] = ("vmap", "two_pass", "book_keeping")
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}

# Compiling takes longer than running, so LLVM need not try hard.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# Examples whose parts of two do not come out even, with padding in the middle and at the end.
BATCH = 5
PADDING = np.array([False, True, False, False, True])
MICROBATCH = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss and what it is called with.

    Attributes:
        loss: Of a batch.
        args: Pytrees of NumPy arrays; floating-point ones take the type under test.
        options: Arguments of both functions ``clipped_grad``.
    """

    loss: Callable[..., Any]
    args: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        return {"batch_argnums": tuple(range(1, len(self.args))), **self.options}


def normal(*shape: int, scale: float = 0.5, seed: int = 0) -> np.ndarray:
    """Data or weights: other numbers for every shape and seed."""
    return np.random.default_rng([seed, *shape]).normal(0, scale, shape)


def labels(*shape: int, classes: int = 3) -> np.ndarray:
    return np.random.default_rng([7, *shape]).integers(0, classes, shape).astype(np.int32)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.mean(chosen)


def cast(tree: Any, dtype: str) -> Any:
    """Floating-point arrays in another type; the others as they are."""
    convert = lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x
    return jax.tree.map(lambda x: jnp.asarray(convert(np.asarray(x))), tree)


def precision(dtype: str) -> contextlib.AbstractContextManager:
    return jax.enable_x64(dtype == "float64")


def quick(fn: Callable[..., Any], *args: Any) -> Any:
    """Compiles quickly, runs, and hands out NumPy arrays."""
    return jax.device_get(jax.jit(fn, compiler_options=QUICK)(*args))


def length(tree: Any) -> float:
    """The norm of a whole tree, in float64 or wider and safe from overflow."""
    leaves = [np.asarray(leaf, np.longdouble).ravel() for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.sum(leaf**2) for leaf in leaves)))


def distance(one: Any, two: Any) -> float:
    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.longdouble), tree)
    return length(jax.tree.map(np.subtract, wide(one), wide(two)))


def check(
    case: Case, dtype: str, runs: Sequence[tuple[str, int | None]], tolerance: float | None = None
) -> None:
    """Sums, norms and values of some engines are those of jax-privacy.

    The clip norm lies a little below the median norm, so that some examples are clipped and
    others are not, unless the case has one.
    """
    options = case.all_options
    tolerance = tolerance or TOLERANCES[dtype]

    def program(padding: jax.Array, *args: Any) -> tuple[Any, list[Any]]:
        outputs = {"return_values": True, "return_grad_norms": True}

        def theirs(bound: Any) -> Any:
            given = {"l2_clip_norm": bound, **options, **outputs}
            return jax_privacy_clipping.clipped_grad(case.loss, **given)(
                *args, is_padding_example=padding
            )

        norms = theirs(1.0)[1].grad_norms
        bound = 0.9 * jnp.nanmedian(jnp.where(padding, jnp.nan, norms))

        def ours(engine: Any, size: int | None) -> Any:
            given = {"l2_clip_norm": bound, **options, **outputs}
            return clipped_grad(case.loss, engine=engine, microbatch_size=size, **given)(
                *args, is_padding_example=padding
            )

        return theirs(bound), [ours(*run) for run in runs]

    with precision(dtype):
        want, gots = quick(program, PADDING, *cast(case.args, dtype))
    assert_same(want, gots, runs, ~PADDING, tolerance)


def assert_same(
    want: Any, gots: list[Any], runs: Sequence[Any], real: np.ndarray, tolerance: float
) -> None:
    """Compares ``(sums, AuxiliaryOutput)`` pairs where examples are real."""
    sums, outputs = want
    for run, (got_sums, got_outputs) in zip(runs, gots, strict=True):
        assert jax.tree.structure(got_sums) == jax.tree.structure(sums), run
        types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
        assert types(got_sums) == types(sums), run
        assert distance(got_sums, sums) <= tolerance * length(sums), run
        for name in ("grad_norms", "values"):
            np.testing.assert_allclose(
                getattr(got_outputs, name)[real],
                getattr(outputs, name)[real],
                # Norms come back in float32 at most.
                rtol=max(tolerance, 1e-6),
                atol=1e-7,
                err_msg=f"{name} of {run}",
            )
        if outputs.aux is not None:
            for ours, theirs in zip(
                jax.tree.leaves(got_outputs.aux), jax.tree.leaves(outputs.aux), strict=True
            ):
                assert ours.shape == theirs.shape, run
                np.testing.assert_allclose(ours[real], theirs[real], rtol=1e-5, atol=1e-6)


# Compiling is what takes time: together, float32 and float64 meet every engine, whole and in
# parts, and `vmap`, which is jax-privacy's own, meets float32 alone.
RUNS: dict[str, list[tuple[str, int | None]]] = {
    "float64": [("two_pass", None), ("book_keeping", None)],
    "float32": [("vmap", None), ("two_pass", MICROBATCH), ("book_keeping", MICROBATCH)],
}


def check_in(case: Case, dtype: str) -> None:
    """`check` of every engine, whole or in parts."""
    check(case, dtype, RUNS[dtype])
