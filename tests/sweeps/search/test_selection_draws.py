"""What a private selection draws: the law, one trial like the other, and nothing unpaid for.

The statistical tests run over fixed secrets. Each would fail a right implementation for one set of
secrets in 10^4.
"""

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from accounting import Selection
from sweeps.errors import SweepError
from sweeps.search import selection_draws
from sweeps.search.selection_draws import SelectionDraws
from tests.accounting.test_selection import law
from tests.sweeps.selections import UNITS, draws_of, paid_for, secret, spec_of
from trainer.training.plan import mechanism_of

ONCE_IN = 1e-4
LAWS = [
    ("geometric", 1.5, None),
    ("geometric", 20.0, None),
    ("poisson", 1.0, None),
    ("poisson", 600.0, None),
    ("logarithmic", 4.0, None),
    ("negative_binomial", 10.0, 0.5),
    ("negative_binomial", 30.0, 7.0),
]


@pytest.mark.parametrize(("distribution", "mean", "shape"), LAWS)
def test_the_number_of_trials_follows_the_law(distribution, mean, shape):
    base = paid_for(spec_of())
    one = dataclasses.replace(base, distribution=distribution, mean=mean, shape=shape)
    spec, n = spec_of(), 4000
    first = SelectionDraws(secret(0), spec, one, UNITS)
    counts = np.array([_count(first, number, one) for number in range(n)])
    pmf = law(one)
    # Bins of at least 25 draws each by the law.
    cumulative = np.cumsum(pmf)
    edges = sorted({int(np.searchsorted(cumulative, q)) for q in np.linspace(0.01, 0.99, 30)})
    bins = np.searchsorted(edges, np.arange(len(pmf)))
    expected = n * np.bincount(bins, weights=pmf, minlength=len(edges) + 1)
    found = np.bincount(np.searchsorted(edges, counts), minlength=len(edges) + 1)
    large = expected >= 25
    expected = np.append(expected[large], expected[~large].sum())
    found = np.append(found[large], found[~large].sum())
    kept = expected > 5
    statistic = float(((found[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    assert statistic < scipy.stats.chi2.isf(ONCE_IN, kept.sum() - 1)
    assert (counts.min() == 0) == (distribution == "poisson" and mean == 1.0)


def _count(like: SelectionDraws, number: int, one: Selection) -> int:
    return SelectionDraws(secret(number), like._spec, one, UNITS).count


def test_trials_are_uniform_over_the_candidates_and_independent():
    spec = spec_of()
    selection = paid_for(spec)
    batches, optimizers = (32.0, 64.0, 128.0), ("sgd", "adam")
    tables = np.zeros((2, 6), int), np.zeros((6, 6), int), np.zeros((6, 3), int)
    rates: list[float] = []
    for number in range(3000):
        draws = draws_of(spec, number, selection)
        kinds = []
        for index in range(2):
            setting = draws.trial(index).setting
            batch = batches.index(setting.expected_batch_size)
            kinds.append(3 * optimizers.index(setting.optimizer) + batch)
            tables[0][index, kinds[-1]] += 1
        rates.append(math.log(draws.trial(1).setting.learning_rate))
        tables[1][kinds[0], kinds[1]] += 1
        tables[2][kinds[0], min(draws.count, 6) // 3] += 1
    for found in tables[0]:
        assert scipy.stats.chisquare(found).pvalue > ONCE_IN
    # Neither of an earlier trial nor of how many there are.
    for found in tables[1:]:
        expected = found.sum(1, keepdims=True) * found.sum(0) / found.sum()
        statistic = float(((found - expected) ** 2 / expected).sum())
        freedom = (found.shape[0] - 1) * (found.shape[1] - 1)
        assert statistic < scipy.stats.chi2.isf(ONCE_IN, freedom)
    low, high = math.log(0.01), math.log(10)
    assert scipy.stats.kstest(rates, "uniform", (low, high - low)).pvalue > ONCE_IN


@given(number=st.integers(0, 10**6), trial=st.integers(0, 10**6))
def test_draws_follow_from_the_secret_in_any_order(number, trial):
    spec = spec_of()
    one, other = draws_of(spec, number), draws_of(spec, number)
    drawn = one.trial(trial)
    assert other.count == one.count
    assert other.trial(trial) == drawn
    assert draws_of(spec, number + 1).trial(trial) != drawn
    assert one.trial(trial + 1) != drawn


@given(number=st.integers(0, 10**6))
def test_what_is_drawn_costs_no_more_than_what_is_paid_for(number):
    ranges = {
        "noise_multiplier": "{uniform: [3, 6]}",
        "iterations": "{randint: [8, 20]}",
        "expected_batch_size": "{uniform: [16, 200]}",
    }
    spec = spec_of(**ranges)
    (paid,) = paid_for(spec).candidates
    drawn = draws_of(spec, number).trial(0)
    mechanism = mechanism_of(drawn.config)
    assert paid.noise_multiplier <= mechanism.noise_multiplier <= 6
    assert 8 <= mechanism.iterations <= paid.iterations == 19
    assert 16 / UNITS <= mechanism.sampling_prob <= paid.sampling_prob
    assert drawn.shown["sampling_prob"] == mechanism.sampling_prob


def test_what_the_budget_does_not_pay_for_is_never_drawn():
    spec = spec_of()
    whole = paid_for(spec)
    cheap = tuple(one for one in whole.candidates if one.sampling_prob < 100 / UNITS)
    selection = dataclasses.replace(whole, candidates=cheap)
    drawn = [draws_of(spec, number, selection).trial(0).setting for number in range(200)]
    assert {setting.expected_batch_size for setting in drawn} == {32.0, 64.0}


def test_a_budget_that_pays_for_none_is_refused(monkeypatch):
    monkeypatch.setattr(selection_draws, "_MOST_TRIES", 100)
    louder = paid_for(spec_of(noise_multiplier="9.0"))
    with pytest.raises(SweepError, match="pays for hardly anything that its specification can"):
        draws_of(spec_of(), 0, louder).trial(0)


def test_a_field_that_depends_on_another_is_drawn_by_its_branch():
    noise = "{by: optimizer, sgd: {uniform: [4, 5]}, adam: {choice: [6, 8]}}"
    spec = spec_of(noise_multiplier=noise)
    drawn = [draws_of(spec, number).trial(0).setting for number in range(300)]
    of_sgd = [float(one.noise_multiplier) for one in drawn if one.optimizer == "sgd"]
    of_adam = [float(one.noise_multiplier) for one in drawn if one.optimizer == "adam"]
    assert all(4 <= noise <= 5 for noise in of_sgd)
    counts = [len(of_sgd), of_adam.count(6), of_adam.count(8)]
    assert scipy.stats.chisquare(counts, [150, 75, 75]).pvalue > ONCE_IN


def test_calibrated_noise_is_what_was_paid_for():
    calibrated = spec_of(privacy="  trial_epsilon: 2", noise_multiplier="calibrated")
    selection = paid_for(calibrated, noise=5.25)
    drawn = draws_of(calibrated, 0, selection).trial(3)
    assert drawn.config.noise_multiplier == drawn.shown["noise_multiplier"] == 5.25
    assert drawn.setting.noise_multiplier == "calibrated"


def test_values_that_do_not_go_together_are_drawn_again():
    # The count's noise is batch / 20; below twice as much, nothing is left for the gradients.
    spec = spec_of(clipping="quantile", expected_batch_size="{uniform: [16, 200]}")
    sizes = [draws_of(spec, number).trial(0).config.expected_batch_size for number in range(100)]
    assert 40 < min(sizes) < 60
    assert len(set(sizes)) == 100
