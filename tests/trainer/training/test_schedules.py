import math

import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ScheduleName
from trainer.training.schedules import learning_rate_factors

SCHEDULES = ["constant", "linear", "cosine"]
lengths = st.integers(1, 300)
warmups = st.integers(0, 400)


def test_a_constant_rate_stays_what_it_is():
    np.testing.assert_array_equal(learning_rate_factors("constant", 0, 5), np.ones(5))


def test_a_linear_rate_falls_in_equal_parts():
    want = [1, 0.75, 0.5, 0.25]
    np.testing.assert_allclose(learning_rate_factors("linear", 0, 4), want, rtol=1e-6)


def test_a_cosine_rate_follows_its_formula():
    # Loshchilov & Hutter 2017, equation 5, with eta_min = 0 and eta_max = 1.
    want = [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    np.testing.assert_allclose(learning_rate_factors("cosine", 0, 8), want, rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_schedules_are_those_of_optax(steps):
    theirs: list[tuple[ScheduleName, optax.Schedule]] = [
        ("linear", optax.linear_schedule(1.0, 0.0, steps)),
        ("cosine", optax.cosine_decay_schedule(1.0, steps)),
    ]
    for name, schedule in theirs:
        want = schedule(np.arange(steps))
        np.testing.assert_allclose(learning_rate_factors(name, 0, steps), want, atol=1e-6)


def test_warm_up_comes_before_the_fall():
    want = [0.25, 0.5, 0.75, 1, 1, 0.5]
    np.testing.assert_allclose(learning_rate_factors("linear", 4, 6), want, rtol=1e-6)


def test_a_warm_up_that_never_ends():
    np.testing.assert_allclose(learning_rate_factors("cosine", 8, 3), [1 / 8, 2 / 8, 3 / 8])


@given(schedule=st.sampled_from(SCHEDULES), warmup=warmups, iterations=lengths)
def test_factors_are_positive_and_never_above_one(schedule, warmup, iterations):
    factors = learning_rate_factors(schedule, warmup, iterations)
    assert factors.shape == (iterations,)
    assert factors.dtype == np.float32
    assert (factors > 0).all()
    assert (factors <= 1).all()


@given(schedule=st.sampled_from(SCHEDULES), warmup=warmups, iterations=lengths)
def test_the_rate_rises_and_then_falls(schedule, warmup, iterations):
    factors = learning_rate_factors(schedule, warmup, iterations)
    assert (np.diff(factors[:warmup]) > 0).all()
    assert (np.diff(factors[max(0, warmup - 1) :]) <= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_step_without_warm_up_has_the_whole_rate(schedule):
    assert learning_rate_factors(schedule, 0, 7)[0] == 1
