"""Arguments and outputs of `clipped_grad`: each as in jax-privacy, and what is refused."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import jax_privacy.clipping
import numpy as np
import pytest

from tests.trainer.clipping.comparison import (
    BATCH,
    ENGINES,
    Case,
    check,
    cross_entropy,
    distance,
    labels,
    length,
    normal,
    quick,
)
from trainer.clipping import clipped_grad

X, Y = normal(BATCH, 6).astype(np.float32), labels(BATCH)
PARAMS = {"a": normal(6, 5).astype(np.float32), "c": normal(5, 3).astype(np.float32)}
WHOLE = [(engine, None) for engine in ENGINES]
RUNS = [*WHOLE, ("book_keeping", 2), ("two_pass", 2)]


def loss(p, x, y):
    return cross_entropy(jnp.tanh(x @ p["a"]) @ p["c"], y)


def loss_of_sum(p, x, y, offset=0.0):
    return loss(p, x + offset, y)


def with_aux(p, x, y):
    logits = jnp.tanh(x @ p["a"]) @ p["c"]
    aux = {"logits": logits, "loss": logits.sum(), "pair": (logits[:, :1], p["a"].sum())}
    return cross_entropy(logits, y), aux


def check_options(options, *args, fun: Any = loss, runs=RUNS):
    """Ours and theirs, in one program."""
    options = {"l2_clip_norm": 0.3, "batch_argnums": (1, 2), **options}

    def program(args):
        theirs = jax_privacy.clipping.clipped_grad(fun, **options)
        ours = [
            clipped_grad(fun, engine=engine, microbatch_size=size, **options)
            for engine, size in runs
        ]
        return [fn(*args) for fn in (theirs, *ours)]

    want, *gots = quick(program, args)
    for got in gots:
        assert_close(got, want)


def assert_close(ours, theirs, tolerance=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(ours) == types(theirs)
    assert distance(ours, theirs) <= tolerance * length(theirs)


def test_signature_is_that_of_jax_privacy_and_two_arguments_more():
    ours = inspect.signature(clipped_grad).parameters
    theirs = inspect.signature(jax_privacy.clipping.clipped_grad).parameters
    assert list(ours) == [*theirs, "engine", "mode"]
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        if name != "pre_clipping_transform":  # both are the identity
            assert ours[name].default == parameter.default


@pytest.mark.slow
def test_auxiliary_outputs():
    options = {"has_aux": True, "return_values": True, "return_grad_norms": True}
    check_options(options, PARAMS, X, Y, fun=with_aux, runs=[*RUNS, ("vmap", 2)])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"return_values": True}, {"return_grad_norms": True}, {"return_values": False}],
    ids=["values", "norms", "neither"],
)
def test_what_was_not_asked_for_is_none(options):
    check_options(options, PARAMS, X, Y, runs=WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize("argnums", [(0,), (0, 1), (1, 0), 1], ids=str)
def test_argnums(argnums):
    split = lambda a, c, x, y: loss({"a": a["w"], "c": c}, x, y)
    args = ({"w": PARAMS["a"]}, PARAMS["c"], X, Y)
    check_options({"argnums": argnums, "batch_argnums": (2, 3)}, *args, fun=split, runs=WHOLE)


@pytest.mark.slow
def test_dropout_has_a_key_for_each_example():
    def dropped(p, key, x, y):
        kept = jax.random.bernoulli(key, 0.5, (5,))
        return cross_entropy(jnp.tanh(x @ p["a"]) * kept @ p["c"], y)

    args = (PARAMS, jax.random.key(3), X, Y)
    options = {"prng_argnum": 1, "batch_argnums": (2, 3), "return_values": True}
    check_options(options, *args, fun=dropped)


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bound", [0.0, 1e-30, np.inf])
def test_any_clip_norm(bound, rescale):
    options = {"rescale_to_unit_norm": rescale, "l2_clip_norm": bound, "normalize_by": 2.0}
    check(Case(loss, (PARAMS, X, Y), options), "float32", WHOLE)


@pytest.mark.slow
def test_clip_norm_and_divisor_may_be_traced():
    @jax.jit
    def program(bound, divisor):
        options: dict[str, Any] = {"normalize_by": divisor, "batch_argnums": (1, 2)}
        return [
            clipped_grad(loss, l2_clip_norm=bound, engine=engine, **options)(PARAMS, X, Y)
            for engine in ENGINES
        ]

    for bound, divisor in ((0.1, 1.0), (0.4, 3.0), (-1.0, 2.0)):
        reference = clipped_grad(loss, l2_clip_norm=max(bound, 0), batch_argnums=(1, 2))
        want = quick(lambda fn=reference: fn(PARAMS, X, Y))
        want = jax.tree.map(lambda x, d=divisor: x / d, want)
        for got in program(bound, divisor):
            assert distance(got, want) <= 1e-5 * length(want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_of_the_result(dtype):
    options: dict[str, Any] = {"l2_clip_norm": 0.3, "batch_argnums": (1, 2)}
    program = lambda: [
        clipped_grad(loss, engine=engine, dtype=given, **options)(PARAMS, X, Y)
        for given in (None, dtype)
        for engine in ENGINES
    ]
    results = quick(program)
    for full, ours in zip(results[:3], results[3:], strict=True):
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(ours))
        # Rounded once, at the end: half an ulp of each number.
        assert distance(ours, full) <= float(jnp.finfo(dtype).eps) / 2 * length(full)


@pytest.mark.slow
def test_gradients_are_transformed_before_they_are_clipped():
    scale = lambda grads: {"only": grads["a"] * 3}
    check_options({"pre_clipping_transform": scale}, PARAMS, X, Y)


@pytest.mark.slow
def test_padding_may_stand_anywhere():
    options: dict[str, Any] = {"l2_clip_norm": 0.3, "batch_argnums": (1, 2)}

    @jax.jit
    def program(x, padding):
        return [
            clipped_grad(loss, **options, engine=engine, microbatch_size=size)(
                PARAMS, x, Y, is_padding_example=padding
            )
            for engine, size in RUNS
        ]

    alone = clipped_grad(loss, **options, engine="vmap")
    each = quick(jax.vmap(lambda x, y: alone(PARAMS, x[None], y[None])), X, Y)
    for padding in (*(np.arange(5) == i for i in range(5)), np.ones(5, bool), np.zeros(5, bool)):
        want = jax.tree.map(lambda g, keep=~padding: g[keep].sum(0), each)
        # NaN, so that one multiplied by zero would show.
        x = np.where(padding[:, None], np.float32(np.nan), X)
        for run, got in zip(RUNS, program(x, padding), strict=True):
            assert distance(got, want) <= 1e-5 * length(want), run


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1])
def test_smallest_batches(size):
    options: dict[str, Any] = {"l2_clip_norm": 0.3, "batch_argnums": (1, 2)}
    options |= {"has_aux": True, "return_values": True, "return_grad_norms": True}
    runs = [(engine, part) for engine in ENGINES for part in (None, 1)]
    program = lambda x, y: [
        clipped_grad(with_aux, **options, engine=engine, microbatch_size=part)(PARAMS, x, y)
        for engine, part in runs
    ]
    for sums, outputs in quick(program, X[:size], Y[:size]):
        assert outputs.values.shape == outputs.grad_norms.shape == (size,)
        assert outputs.aux["logits"].shape == (size, 3)
        assert jax.tree.map(np.shape, sums) == jax.tree.map(np.shape, PARAMS)
        want = min(0.3, outputs.grad_norms[0]) if size else 0
        assert length(sums) == pytest.approx(want, rel=1e-6)


@pytest.mark.slow
def test_keyword_arguments_carry_the_batch_axis():
    offset = normal(BATCH, 1, 6).astype(np.float32)
    options: dict[str, Any] = {"l2_clip_norm": 0.3, "batch_argnums": (1, 2)}
    program = lambda: [
        (
            clipped_grad(loss_of_sum, engine=engine, **options)(PARAMS, X, Y, offset=offset),
            clipped_grad(loss, engine=engine, **options)(PARAMS, X + offset[:, 0], Y),
        )
        for engine in ENGINES
    ]
    for got, want in quick(program):
        assert distance(got, want) <= 1e-6 * length(want)


@pytest.mark.slow
def test_shared_arguments_of_any_sort():
    fun = lambda p, scale, x, y: loss(p, x * scale["by"][0], y)
    args = (PARAMS, {"by": [np.float32(2.0)], "unused": np.arange(3)}, X, Y)
    check_options({"batch_argnums": (2, 3)}, *args, fun=fun, runs=WHOLE)


def test_sensitivity_is_the_clip_norm_over_the_divisor():
    options = {"l2_clip_norm": 3.0, "normalize_by": 2.0}
    for engine in ENGINES:
        for mode in ("flat", "per_layer", "automatic"):
            given = {**options, "engine": engine, "mode": mode}
            assert clipped_grad(loss, **given).sensitivity() == 1.5
            assert clipped_grad(loss, rescale_to_unit_norm=True, **given).sensitivity() == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l2_clip_norm": -1.0}, "l2_clip_norm=-1.0"),
        ({"l2_clip_norm": np.nan}, "l2_clip_norm=nan"),
        ({"normalize_by": 0}, "normalize_by=0"),
        ({"microbatch_size": 0}, "microbatch_size=0"),
        ({"argnums": 1}, "share"),
        ({"argnums": -1}, "must be >= 0"),
        ({"batch_argnums": ()}, "at least one"),
        ({"engine": "ghost"}, "engine='ghost'"),
        ({"mode": "median"}, "mode='median'"),
    ],
    ids=lambda value: str(value),
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_grad(loss, **{"l2_clip_norm": 1.0, "batch_argnums": (1, 2), **options})


@pytest.mark.parametrize(
    ("fun", "args", "error", "message"),
    [
        (loss, (PARAMS, X), ValueError, "argument 2 is missing"),
        (loss, (PARAMS, X, Y[:3]), ValueError, "lengths"),
        (loss, (PARAMS, X, np.float32(1)), ValueError, "no batch axis"),
        (loss, ({"a": np.ones((6, 5), int), "c": PARAMS["c"]}, X, Y), TypeError, "int"),
        (lambda p, x, y: x @ p["a"], (PARAMS, X, Y), TypeError, "scalar"),
        (lambda p, x, y: y.sum(), (PARAMS, X, Y), TypeError, "scalar"),
    ],
)
@pytest.mark.parametrize("engine", ENGINES)
def test_calls_that_make_no_sense_are_refused(engine, fun, args, error, message):
    with pytest.raises(error, match=message):
        clipped_grad(fun, l2_clip_norm=1.0, batch_argnums=(1, 2), engine=engine)(*args)
