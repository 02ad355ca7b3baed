"""Gradients that are not finite, overflow when squared, cancel, or all but vanish."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.clipping.comparison import (
    ENGINES,
    QUICK,
    cross_entropy,
    distance,
    labels,
    length,
    normal,
    quick,
)
from trainer.clipping import clipped_grad, norms

SIZE = 6
ROWS, Y = normal(SIZE, 7, 6).astype(np.float32), labels(SIZE)
PARAMS = {
    "w": normal(6, 5).astype(np.float32),
    "b": normal(5).astype(np.float32),
    "c": normal(5, 3).astype(np.float32),
}
WHOLE = tuple((engine, None) for engine in ENGINES)
RUNS = tuple((engine, size) for engine in ENGINES for size in (None, 4))


def loss(p, x, y):
    hidden = jax.nn.relu(x @ p["w"] + p["b"])
    return cross_entropy(hidden.mean(1) @ p["c"], y)


def linear(p, x):
    """The gradient is the sum of the rows' outer products with ones."""
    return jnp.sum(x @ p)


@functools.cache
def program(fun, num_args, runs, bound, nan_safe):
    """One compiled program for all data: what is not finite or padding is data, too."""
    options = {"l2_clip_norm": bound, "nan_safe": nan_safe}
    options |= {"return_grad_norms": True, "return_values": True}
    options["batch_argnums"] = tuple(range(1, num_args))
    grad_fns = [
        clipped_grad(fun, engine=engine, microbatch_size=size, **options) for engine, size in runs
    ]
    return jax.jit(
        lambda padding, *args: [fn(*args, is_padding_example=padding) for fn in grad_fns],
        compiler_options=QUICK,
    )


def run_all(fun, *args, padding=None, runs=WHOLE, bound=0.3, nan_safe=True):
    """(run, (sums, outputs)) of every engine."""
    if padding is None:
        padding = np.zeros(len(args[1]), bool)
    results = program(fun, len(args), runs, bound, nan_safe)(padding, *args)
    return zip(runs, jax.device_get(results), strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("places", [[(2, 0, 0)], [(0, 6, 5), (5, 3, 2)], None], ids=str)
def test_an_example_that_is_not_finite_adds_exactly_nothing(bad, places):
    rows = ROWS.copy()
    places = places or [(i, 0, 0) for i in range(SIZE)]
    for place in places:
        rows[place] = bad
    hit = np.zeros(SIZE, bool)
    hit[[place[0] for place in places]] = True
    # The same program, with zeros and padding where the bad ones are: bit for bit.
    blank = np.where(hit[:, None, None], 0, rows)
    got = dict(run_all(loss, PARAMS, rows, Y, runs=RUNS))
    want = dict(run_all(loss, PARAMS, blank, Y, padding=hit, runs=RUNS))
    for run in RUNS:
        if run[1] is None:
            jax.tree.map(np.testing.assert_array_equal, got[run][0], want[run][0])
        # Parts hold other examples when padding moves to the end.
        assert distance(got[run][0], want[run][0]) <= 1e-6 * length(want[run][0])
        assert not np.isfinite(got[run][1].values[hit]).any() or not np.isnan(bad)


def two_parts(p, x):
    return jnp.sum(x[:, 0] * p["a"]) + jnp.sum(x[:, 1] * p["b"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
def test_one_bad_element_drops_the_whole_example(mode):
    # jax-privacy 2.0.0 would keep what the example adds to the other parameter.
    params = {"a": np.float32(2), "b": np.float32(1)}
    data = np.array([[0.1, 0.2], [0.2, np.inf], [0.05, 0.1], [np.nan, 0.1]], np.float32)
    program = lambda p, x: [
        clipped_grad(two_parts, l2_clip_norm=1.0, engine=engine, mode=mode)(p, x)
        for engine in ENGINES
    ]
    gots, wants = quick(program, params, data), quick(program, params, data[[0, 2]])
    for engine, got, want in zip(ENGINES, gots, wants, strict=True):
        for name in "ab":
            np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=engine)
            assert got[name] > 0


@pytest.mark.slow
def test_without_nan_safe_a_nan_is_seen():
    rows = ROWS.copy()
    rows[1, 0, 0] = np.nan
    for run, (sums, _) in run_all(loss, PARAMS, rows, Y, nan_safe=False):
        assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(sums)), run


def scaled_sum(p, x, s):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]).mean(1) @ p["c"]) * s[0]


def scaled_linear(p, x, s):
    return jnp.sum(x @ p["w"]) * s[0]


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e25, 1e30, 1e36])
@pytest.mark.parametrize("several", [True, False], ids=["several_leaves", "one_leaf"])
def test_squares_that_overflow(scale, several):
    # One example in the middle, whose gradient is finite and its square is not.
    scales = np.array([1.0, scale, 1e-3, scale / 7, 0.0, 1.0], np.float32)
    fun, params = (scaled_sum, PARAMS) if several else (scaled_linear, {"w": PARAMS["w"]})
    args = (params, ROWS, scales)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)
        options = {"batch_argnums": (1, 2), "return_grad_norms": True, "engine": "vmap"}
        want = quick(lambda: clipped_grad(fun, l2_clip_norm=0.3, **options)(*wide)[0])
        norms_of = jax.vmap(jax.grad(fun), (None, 0, 0))
        grads = norms_of(wide[0], wide[1][:, None], wide[2][:, None])
        squares = [jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)]
        lengths = np.sqrt(np.asarray(sum(squares)))
    for run, (sums, outputs) in run_all(fun, *args):
        if run[0] == "vmap":
            # jax-privacy's own norm overflows: the example is dropped, which is safe.
            assert length(sums) <= SIZE * 0.3
            continue
        assert distance(sums, want) <= 1e-5 * length(want), run
        np.testing.assert_allclose(outputs.grad_norms, lengths, rtol=1e-5, err_msg=str(run))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-10, 1e-16, 1e-18, 1e-22, 1e-30])
def test_gradients_that_all_but_vanish(scale):
    args = (PARAMS, ROWS, np.full(SIZE, scale, np.float32))
    with jax.enable_x64(True):
        wide, rows, scales = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)
        grads = jax.vmap(jax.grad(scaled_sum), (None, 0, 0))(wide, rows[:, None], scales[:, None])
        want = jax.tree.map(lambda x: np.asarray(x).sum(0), grads)
        squares = [jnp.sum(g**2, tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads)]
        lengths = np.sqrt(np.asarray(sum(squares)))
    for run, (sums, outputs) in run_all(scaled_sum, *args):
        # Nothing is clipped: the sum is that of the gradients.
        assert distance(sums, want) <= 1e-5 * length(want), run
        # Whose squares are no numbers any more may have a norm of zero.
        lost = np.sqrt(np.finfo(np.float32).tiny)
        assert (abs(outputs.grad_norms - lengths) <= np.maximum(1e-5 * lengths, lost)).all(), run


@pytest.mark.slow
@pytest.mark.parametrize("left_over", [1e-1, 1e-2, 1e-4])
def test_terms_that_cancel(left_over):
    # Two rows that are opposite but for a small part, in a weight large enough to be measured.
    rng = np.random.default_rng(0)
    rows = np.zeros((3, 2, 300), np.float32)
    rows[:, 0] = rng.normal(size=(3, 300))
    rows[:, 1] = -rows[:, 0] + left_over * rng.normal(size=(3, 300))
    rows[2] = rng.normal(size=(2, 300))
    weight = rng.normal(size=(300, 200)).astype(np.float32)
    grads = rows.astype(np.float64).sum(1)
    want = np.sqrt(200) * np.linalg.norm(grads, axis=1)
    for run, (_, outputs) in run_all(linear, weight, rows):
        np.testing.assert_allclose(outputs.grad_norms, want, rtol=1e-4, err_msg=str(run))


@pytest.mark.slow
def test_only_doubtful_examples_are_measured_again(monkeypatch):
    counts = []
    original = norms._measured_again

    def counting(recording, groups, norms, kept, doubtful):
        jax.debug.callback(lambda x: counts.append(np.asarray(x)), doubtful)
        return original(recording, groups, norms, kept, doubtful)

    monkeypatch.setattr(norms, "_measured_again", counting)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 2, 300)).astype(np.float32)
    rows[1, 1] = -rows[1, 0] * (1 + 1e-4)  # cancels
    rows[2] *= 1e22  # overflows
    rows[3] *= 1e-19  # vanishes
    rows[4, 1] = -rows[4, 0]  # cancels, but is padding
    weight = rng.normal(size=(300, 200)).astype(np.float32)
    padding = np.arange(5) == 4
    clipped = clipped_grad(linear, l2_clip_norm=1.0, engine="book_keeping", return_grad_norms=True)
    _, outputs = clipped(weight, rows, is_padding_example=padding)
    jax.effects_barrier()
    np.testing.assert_array_equal(counts, [[False, True, True, True, False]])
    want = np.sqrt(200) * np.linalg.norm(rows.astype(np.float64).sum(1), axis=1)
    np.testing.assert_allclose(outputs.grad_norms[:4], want[:4], rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["flat", "per_layer", "automatic"])
def test_a_gradient_of_zero_stays_zero(engine, mode):
    options = {"engine": engine, "mode": mode, "rescale_to_unit_norm": True}
    clipped = clipped_grad(lambda p, x: jnp.sum(x @ p), l2_clip_norm=1.0, **options)
    assert not np.any(clipped(PARAMS["w"], 0 * ROWS))
