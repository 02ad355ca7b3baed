"""Clipping modes from configuration to compiled step, and how `quantile` splits its noise."""

import dataclasses
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.small_trial import (
    NUM_EXAMPLES,
    distance,
    inputs_of,
    made_up_data,
    recipe_of,
    state_of,
    take,
)
from trainer.clipping import ClippingMode, Engine
from trainer.config import (
    ClippingConfig,
    ClippingEngine,
    ClippingModeName,
    DataConfig,
    ModelConfig,
    TrialConfig,
)
from trainer.errors import CheckpointError, ConfigError
from trainer.loop import run_trial, trial_reports
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.noise import add_noise, count_noise
from trainer.mechanism.quantile_clipping import (
    LARGEST_CLIP_NORM,
    LEAST_CLIP_NORM,
    next_clip_norm,
    shifted_count,
)
from trainer.mechanism.sampling import to_rows
from trainer.models import cross_entropy
from trainer.training import devices
from trainer.training.plan import make_plan, mechanism_of, noise_of_gradients
from trainer.training.step import QuantileTraced, Traced
from trainer.trial import Trial
from trainer.weights import checkpoints

ROOT = bytes(range(32))
QUANTILE = ClippingConfig(mode="quantile")
CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="sgd",
    learning_rate=8.0,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=0.18,
    expected_batch_size=0.18 * 1437,
    iterations=4,
    report_every_steps=2,
    target_delta=1e-5,
    accountant="rdp",
    clipping=QUANTILE,
)


@pytest.fixture(scope="module")
def data():
    return made_up_data()


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def segment_of(mode, **settings):
    """A function that takes a step of this mode on rows of units."""
    recipe = recipe_of(mode=mode, **settings)

    def step(l2_clip_norm, data, rows, settings):
        start = state_of(recipe, l2_clip_norm)
        return take(recipe, start, data, rows, jax.tree.map(np.float32, settings))

    return step


def traced(*, noise=0.0, count_noise_stddev=0.0, learning_rate=0.0, batch=10.0, quantile=0.5):
    return Traced(
        learning_rate=learning_rate,
        noise_multiplier=noise,
        expected_batch_size=batch,
        quantile=QuantileTraced(
            target_quantile=quantile, learning_rate=0.2, count_noise_stddev=count_noise_stddev
        ),
    )


def start():
    """The parameters with which every step here begins."""
    return state_of(recipe_of()).params


def norms_of(params, data, indices):
    """Gradient norms, one example at a time, by nothing of ours but the loss."""
    network = recipe_of().objective.network

    @jax.jit
    def squares(image, label):
        loss = lambda p: jnp.mean(cross_entropy(network.logits(p, {}, image), label)[0])
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jax.grad(loss)(params)))

    found = [squares(data.images[i : i + 1], data.labels[i : i + 1]) for i in indices]
    return np.sqrt(np.array(found))


# --- The configuration ---------------------------------------------------------------------


def test_every_mode_and_engine_of_the_clipping_room_can_be_named():
    assert get_args(ClippingModeName) == (*get_args(ClippingMode), "quantile")
    assert get_args(ClippingEngine) == get_args(Engine)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mode", "median"), ("engine", "ghost")]
    + [
        (field, value)
        for field in ("target_quantile", "learning_rate", "count_noise_stddev")
        for value in (0, -1.0, math.nan, math.inf, "1", True)
    ]
    + [("target_quantile", 1.0), ("target_quantile", 1.5), ("learning_rate", None)]
    + [("microbatch_size", value) for value in (0, -1, 1.0, True, "3")],
)
def test_a_field_that_is_not_allowed_is_named_with_its_value(field, value):
    with pytest.raises(ConfigError) as caught:
        ClippingConfig(**{field: value})
    assert str(caught.value).startswith(f"clipping.{field}={value!r}: allowed is")


def test_json_round_trip():
    clipping = ClippingConfig(
        mode="quantile", target_quantile=0.7, count_noise_stddev=9.5, microbatch_size=4
    )
    config = dataclasses.replace(CONFIG, clipping=clipping)
    assert TrialConfig.from_json(config.to_json()) == config


def test_json_from_before_there_was_a_choice_is_flat():
    data = CONFIG.to_json()
    del data["clipping"]
    assert TrialConfig.from_json(data).clipping == ClippingConfig()
    with pytest.raises(ConfigError):
        TrialConfig.from_json({**data, "clipping": {"mod": "flat"}})


@pytest.mark.parametrize(
    ("noise", "stddev", "message"),
    [
        (4.0, 2.0, "clipping.count_noise_stddev=2.0: allowed is a number > 2, half of noise_m"),
        (4.0, 1.0, "clipping.count_noise_stddev=1.0: allowed is a number > 2"),
        (4.0, 1e-300, "clipping.count_noise_stddev=1e-300: allowed is a number > 2"),
        (6.4, None, r"=3.2 \(expected_batch_size / 20\): allowed is a number > 3.2"),
    ],
)
def test_a_count_that_would_use_up_the_noise_is_refused(noise, stddev, message):
    clipping = ClippingConfig(mode="quantile", count_noise_stddev=stddev)
    changes = {"noise_multiplier": noise, "expected_batch_size": 64, "clipping": clipping}
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **changes)
    # Other modes count nothing.
    flat = dataclasses.replace(clipping, mode="flat")
    assert dataclasses.replace(CONFIG, **{**changes, "clipping": flat}).count_noise_stddev is None


# --- The split of the noise ----------------------------------------------------------------


@given(st.floats(1e-3, 1e3), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_the_two_releases_compose_to_the_accounted_noise(z, ratio):
    # Of two Gaussians the inverse squared multipliers add; the count's is sigma_b / (1/2).
    sigma_b = z / (2 * ratio)
    if not (math.isfinite(sigma_b) and sigma_b > z / 2):
        return
    z_g = noise_of_gradients(z, sigma_b)
    assert math.isfinite(z_g)
    assert z_g >= z
    # In extended precision, for near z = 2 sigma_b the one term all but vanishes.
    inverse = np.longdouble(z_g) ** -2 + np.longdouble(2 * sigma_b) ** -2
    assert float(inverse * np.longdouble(z) ** 2) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("relation", ["zero_out", "add_or_remove_one"])
def test_the_plan_splits_the_noise_and_leaves_the_mechanism_as_it_is(relation):
    config = dataclasses.replace(CONFIG, neighboring_relation=relation)
    flat = dataclasses.replace(config, clipping=ClippingConfig())
    plan, plain = make_plan(config, 1437), make_plan(flat, 1437)
    assert plan.mechanism == plain.mechanism == mechanism_of(config) == mechanism_of(flat)
    assert (plain.grad_noise_multiplier, plain.count_noise_stddev) == (2.0, None)
    assert plan.count_noise_stddev == pytest.approx(0.18 * 1437 / 20)
    assert plan.grad_noise_multiplier == noise_of_gradients(2.0, plan.count_noise_stddev) > 2.0


def noise_like(tree, key_data, stddev):
    """The noise of one step, without the sums that it hides."""
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return add_noise(zeros, (), key_data=key_data, stddev=stddev)[0]


def test_the_counts_noise_is_another_than_that_of_any_parameter():
    key_data = BranchKeys(ROOT).noise_keys([1])[0]
    draws = noise_like([jnp.zeros(())] * 3000, key_data, 1.0)
    assert float(count_noise(key_data, 1.0)) not in {float(draw) for draw in draws}


def test_the_counts_noise_has_the_given_std():
    # 20,000 draws: the sample std has a relative standard error of 0.5 %; 5 of them.
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (20_000, 2), np.uint32))
    draws = np.asarray(jax.vmap(lambda key: count_noise(key, 3.0))(keys))
    assert draws.std() == pytest.approx(3.0, rel=0.025)
    assert abs(draws.mean()) < 5 * 3.0 / math.sqrt(20_000)
    gradients = jax.vmap(lambda key: noise_like(jnp.zeros(1), key, 3.0)[0])(keys)
    assert abs(np.corrcoef(draws, np.asarray(gradients))[0, 1]) < 5 / math.sqrt(20_000)


# --- The count -----------------------------------------------------------------------------

NORMS = st.lists(
    st.one_of(st.floats(0, 2**20, width=32), st.just(math.inf), st.just(math.nan)),
    min_size=1,
    max_size=30,
)


@given(NORMS, st.data(), st.floats(2**-20, 2**20, width=32))
def test_one_example_moves_the_count_by_a_half(norms, chance, clip):
    size = len(norms)
    padding = np.array(chance.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    one = chance.draw(st.integers(0, size - 1))
    count = lambda values, padding: float(shifted_count(jnp.asarray(values), padding, clip))
    present, absent = padding.copy(), padding.copy()
    present[one], absent[one] = False, True
    values = np.array(norms, np.float32)
    # Present or not (one more or less) is the same as present or blanked (zeroed: padding).
    assert abs(count(values, present) - count(values, absent)) == 0.5
    # Whatever stands in a padding's place is not looked at.
    other = values.copy()
    other[one] = chance.draw(st.sampled_from([0.0, 1e30, math.nan]))
    assert count(values, absent) == count(other, absent)


def test_a_gradient_that_is_not_finite_counts_as_clipped():
    norms = jnp.array([0.5, 2.0, jnp.inf, jnp.nan, 0.0])
    padding = jnp.array([False, False, False, False, True])
    assert shifted_count(norms, padding, 1.0) == 0.5 - 0.5 - 0.5 - 0.5


@pytest.mark.parametrize("count", [-1e9, 1e9, -3.0, 0.0, 3.0])
@pytest.mark.parametrize("clip", [1e-30, LEAST_CLIP_NORM, 1.0, LARGEST_CLIP_NORM, 1e30])
def test_the_clip_norm_stays_finite_and_positive(count, clip):
    moved = next_clip_norm(
        jnp.float32(clip),
        jnp.float32(count),
        expected_batch_size=1.0,
        target_quantile=0.5,
        learning_rate=1e6,
    )
    low, high = np.float32(LEAST_CLIP_NORM), np.float32(LARGEST_CLIP_NORM)
    assert low <= moved <= high


# --- A step --------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [4, 8])
def test_a_step_moves_the_clip_norm_by_the_count_of_its_rows(data, capacity):
    norms = norms_of(start(), data, range(8))
    clip = float(np.sort(norms)[2:4].mean())  # three of eight are within it
    rows = to_rows(np.arange(8, dtype=np.int32), capacity)
    after = segment_of("quantile")(clip, data, rows, traced(quantile=0.3))
    fraction = (3 * 0.5 - 5 * 0.5) / 10.0 + 0.5
    assert float(after.l2_clip_norm) == pytest.approx(
        clip * math.exp(-0.2 * (fraction - 0.3)), rel=1e-5
    )


def test_neighbouring_batches_move_the_clip_norm_by_half_a_count(data):
    # The same key: the noise cancels. One example less is the same as its row's place padded.
    step = segment_of("quantile")
    settings = traced(noise=1.0, count_noise_stddev=1.0)
    logs = []
    for without in (None, *range(8)):
        row = [-1 if i == without else i for i in range(8)]
        logs.append(math.log(float(step(2.0, data, [row], settings).l2_clip_norm)))
    counts = -np.array(logs) / 0.2 * 10.0
    np.testing.assert_allclose(np.abs(counts[1:] - counts[0]), 0.5, atol=1e-4)


def test_modes_differ_in_the_sum_and_not_in_the_noise(data):
    settings = Traced(learning_rate=1.0, noise_multiplier=0.7, expected_batch_size=10.0)
    noise = noise_like(start(), inputs_of().noise_key, 0.7 * 0.5)
    alone, moved = {}, {}
    for mode in get_args(ClippingModeName):
        given = traced(noise=0.7, count_noise_stddev=2.0, learning_rate=1.0)
        given = given if mode == "quantile" else settings
        step = segment_of(mode)
        alone[mode] = step(0.5, data, [[-1] * 8], given).params
        moved[mode] = step(0.5, data, [range(8)], given).params
    for params in alone.values():
        jax.tree.map(
            lambda new, old, draw: np.testing.assert_allclose(
                new, old - draw / 10, rtol=1e-6, atol=1e-8
            ),
            params,
            start(),
            noise,
        )
        # Bit for bit: what is counted leaves the gradients' noise alone.
        jax.tree.map(np.testing.assert_array_equal, params, alone["flat"])
    assert distance(moved["quantile"], moved["flat"]) < 1e-6
    assert distance(moved["per_layer"], moved["flat"]) > 1e-4
    assert distance(moved["automatic"], moved["flat"]) > 1e-4


@pytest.mark.parametrize(
    ("mode", "draws"), [("flat", 4), ("per_layer", 4), ("automatic", 4), ("quantile", 5)]
)
def test_only_quantile_draws_noise_for_a_count(data, mode, draws):
    # Four leaves; one draw more for the count.
    settings = traced() if mode == "quantile" else traced()._replace(quantile=None)
    recipe = recipe_of(mode=mode)
    state = state_of(recipe)
    finish = lambda sums: recipe.finish(state, sums, inputs_of(), settings)
    program = str(jax.make_jaxpr(finish)(recipe.no_sums(state)))
    assert program.count("= random_bits[") == draws


@pytest.mark.parametrize("engine", ["vmap", "two_pass", "book_keeping"])
def test_engine_and_microbatch_size_do_not_change_the_step(data, engine):
    settings = traced(noise=0.5, count_noise_stddev=1.0, learning_rate=1.0)
    steps = (segment_of("quantile", engine=engine, microbatch_size=3), segment_of("quantile"))
    ours, plain = (step(2.0, data, [range(8)], settings) for step in steps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("begin", [1e-3, 1e3])
def test_the_clip_norm_finds_the_quantile(data, target, begin):
    # Parameters that do not move: the norms stay, and so does their quantile. From a factor of
    # 1000 away, steps of 0.2 x 0.2 in the logarithm need 170; then C swings by at most 0.16.
    settings = traced(batch=float(NUM_EXAMPLES), quantile=target, count_noise_stddev=0.01)
    settings = jax.tree.map(np.float32, settings)
    recipe = recipe_of(mode="quantile")
    after = state_of(recipe, begin)
    for step in range(1, 301):
        after = take(recipe, after, data, [range(NUM_EXAMPLES)], settings, inputs_of(step))
    norms = norms_of(start(), data, range(NUM_EXAMPLES))
    low, high = np.quantile(norms, [target - 0.05, target + 0.05])
    assert low * 0.97 <= float(after.l2_clip_norm) <= high * 1.03


# --- A trial -------------------------------------------------------------------------------


def test_a_resumed_trial_goes_on_with_its_clip_norm(data_home, tmp_path):
    first = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path / "a")
    assert first.checkpoint is not None
    reached = first.report.l2_clip_norm
    assert reached != CONFIG.l2_clip_norm
    assert checkpoints.read_manifest(first.checkpoint).l2_clip_norm == reached
    # Neither more steps nor another way to compute the same is another trial.
    clipping = dataclasses.replace(QUANTILE, engine="vmap", microbatch_size=50)
    longer = dataclasses.replace(CONFIG, iterations=5, clipping=clipping)
    at = Trial(longer, data_home, devices.topology(1)).start(first.checkpoint, None)
    assert (float(at.state.l2_clip_norm), at.step) == (reached, 4)
    (report,) = trial_reports(
        longer, data_home=data_home, resume_from=first.checkpoint, charge=lambda branch, step: step
    )
    # One step moves it by at most eta_C times a fraction, plus noise of 0.05 eta_C: 5 of it.
    assert 0 < abs(math.log(report.l2_clip_norm / reached)) <= 0.2 * (0.5 + 0.25 + 0.1)


def test_a_clip_norm_that_does_not_move_is_reported_as_it_is(data_home):
    config = dataclasses.replace(CONFIG, clipping=ClippingConfig(), l2_clip_norm=0.25)
    reports = list(trial_reports(config, data_home=data_home))
    assert [report.l2_clip_norm for report in reports] == [0.25, 0.25]


@pytest.mark.parametrize("mode", ["per_layer", "automatic"])
def test_a_trial_runs_in_every_mode(data_home, mode):
    config = dataclasses.replace(CONFIG, clipping=ClippingConfig(mode=mode))
    report = run_trial(config, data_home=data_home).report
    assert report.outcome == "completed"
    assert report.l2_clip_norm == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "flat"},
        {"mode": "per_layer"},
        {"target_quantile": 0.6},
        {"learning_rate": 0.3},
        {"count_noise_stddev": 13.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_checkpoint_of_another_clipping_is_not_resumed(data_home, tmp_path, change):
    first = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path)
    clipping = dataclasses.replace(QUANTILE, **change)
    other = dataclasses.replace(CONFIG, iterations=20, clipping=clipping)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        run_trial(other, data_home=data_home, resume_from=first.checkpoint, charge=lambda b, s: s)


def test_a_step_uses_the_plans_noise_and_not_the_mechanisms(data_home):
    trial = Trial(CONFIG, data_home, devices.topology(1))
    assert trial.traced.noise_multiplier == np.float32(trial.plan.grad_noise_multiplier) > 2.0
    assert trial.traced.quantile is not None
    assert trial.traced.quantile.count_noise_stddev == np.float32(trial.plan.count_noise_stddev)
    flat = dataclasses.replace(CONFIG, clipping=ClippingConfig())
    assert Trial(flat, data_home, devices.topology(1)).traced.quantile is None
