"""What a file leaves out: taken from the data set, or refused where that would tell too much."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accounting
from tests.trainer.alone.trial_files import INFO, write
from trainer.alone import resolution
from trainer.alone.resolution import resolve
from trainer.alone.trial_file import read_trial_file
from trainer.errors import ConfigError, DatasetError
from trainer.training.plan import mechanism_of


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """Resolves TRIAL with changes, on a data set of 1000 examples."""

    def resolve_it(changes=None, info=INFO, error=None):
        def describe(data, data_home):
            if error is not None:
                raise error
            return info

        monkeypatch.setattr(resolution, "describe", describe)
        return resolve(read_trial_file(write(tmp_path, changes)), tmp_path)

    return resolve_it


def test_the_sampling_probability_is_the_batch_over_the_units(resolved):
    assert resolved().config.sampling_prob == 0.1
    assert resolved({"mechanism.bands": 4}).config.sampling_prob == pytest.approx(0.4)
    assert resolved({"sampling_prob": 0.3}).config.sampling_prob == 0.3
    users = {"data.user_feature": "who", "mechanism.examples_per_user": 2}
    info = dataclasses.replace(INFO, num_users=125)
    assert resolved(users, info).config.sampling_prob == 0.8


@given(size=st.floats(1e-3, 1000), bands=st.integers(1, 20))
def test_expected_batches_are_what_is_drawn(size, bands):
    fields = {"expected_batch_size": size, "mechanism": {"bands": bands}}
    try:
        resolution._add_from_units(fields, lambda: 1000)
    except ConfigError:
        assert size > 1000 / bands
        return
    assert 0 < fields["sampling_prob"] <= 1
    assert fields["sampling_prob"] * 1000 / bands == pytest.approx(size)


def test_full_takes_everybody(resolved):
    found = resolved({"expected_batch_size": "full"})
    assert (found.config.sampling_prob, found.config.expected_batch_size) == (1.0, 1000.0)
    full = accounting.DpSgdMechanism.full_batch(noise_multiplier=2.0, iterations=20)
    assert found.epsilon == accounting.epsilon(full, delta=1e-5)
    banded = resolved({"expected_batch_size": "full", "mechanism.bands": 4})
    assert (banded.config.sampling_prob, banded.config.expected_batch_size) == (1.0, 250.0)


def test_truncated_batches_get_the_number_of_units(resolved):
    found = resolved({"mechanism.truncated_batch_size": 150})
    assert found.config.mechanism.num_units == 1000
    assert mechanism_of(found.config).kind == "truncated_dp_sgd"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accountant": "rdp"},
        {"mechanism.bands": 4},
        {"mechanism.truncated_batch_size": 150},
        {"expected_batch_size": "full"},
        {"clipping.mode": "quantile"},
        {"neighboring_relation": "add_or_remove_one", "sampling_prob": 0.1},
        {"data.user_feature": "who", "mechanism.examples_per_user": 2},
    ],
    ids=str,
)
def test_calibrated_noise_is_the_least_within_the_target(resolved, changes):
    info = INFO
    if "data.user_feature" in changes:
        info = dataclasses.replace(INFO, num_users=400)
    wanted = {**changes, "noise_multiplier": "calibrated", "target_epsilon": 2.0}
    found = resolved(wanted, info)
    assert 1.98 < found.epsilon <= 2.0
    mechanism = mechanism_of(found.config)
    assert found.epsilon == accounting.epsilon(
        mechanism, delta=1e-5, accountant=found.config.accountant
    )


@settings(max_examples=10)
@given(target=st.floats(0.2, 20), q=st.floats(0.01, 1), bands=st.integers(1, 5))
def test_calibration_of_any_mechanism_keeps_within_the_target(target, q, bands):
    mechanism = accounting.BandedMatrixFactorizationMechanism(
        noise_multiplier=1.0, sampling_prob=q, iterations=20, bands=bands
    )
    noise = accounting.calibrate_noise_of(mechanism, target_epsilon=target, target_delta=1e-5)
    spent = accounting.epsilon(dataclasses.replace(mechanism, noise_multiplier=noise), delta=1e-5)
    assert 0.98 * target < spent <= target
    plain = accounting.calibrate_noise_multiplier(
        target_epsilon=target,
        target_delta=1e-5,
        sampling_prob=q,
        iterations=math.ceil(20 / bands),
    )
    assert noise == pytest.approx(plain, rel=2e-3)


def test_a_target_is_kept_without_calibration_too(resolved):
    assert resolved({"target_epsilon": 50}).epsilon < 50
    with pytest.raises(ConfigError, match=r"target_epsilon=0\.1: .*or noise_multiplier"):
        resolved({"target_epsilon": 0.1})


ADD_OR_REMOVE = {"neighboring_relation": "add_or_remove_one"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (ADD_OR_REMOVE, r"sampling_prob=None: allowed is .* protects the number of units"),
        ({**ADD_OR_REMOVE, "expected_batch_size": "full"}, "expected_batch_size='full'"),
        (
            {**ADD_OR_REMOVE, "sampling_prob": 0.1, "mechanism.truncated_batch_size": 150},
            "num_units=None",
        ),
        ({"expected_batch_size": 1001}, r"expected_batch_size=1001.*\(0, 1000\].*or full"),
        ({"expected_batch_size": 300, "mechanism.bands": 4}, r"\(0, 250\].*each of 4 groups"),
        ({"expected_batch_size": 0}, "expected_batch_size=0.0: allowed"),
        ({"expected_batch_size": "full", "sampling_prob": 0.5}, "with expected_batch_size full"),
        (
            {"expected_batch_size": "full", "mechanism.truncated_batch_size": 150},
            "a batch of everybody is never cut",
        ),
        ({"mechanism.truncated_batch_size": 101}, "truncated_batch_size must be at least"),
        ({"mechanism": {"truncated_batch_size": 150, "num_units": 9}}, "allowed is 1000"),
        ({"noise_multiplier": "calibrated"}, "target_epsilon, which is missing"),
        ({"noise_multiplier": "calibrated", "target_epsilon": 0}, "target_epsilon=0"),
        ({"target_epsilon": -1}, "target_epsilon=-1"),
        ({"mechanism.bands": 0}, "mechanism.bands=0: allowed"),
        (
            {"mechanism.bands": 21, "expected_batch_size": 9},
            "mechanism.bands=21: allowed is at most iterations=20",
        ),
        ({"model.name": "wrn"}, "model.name='wrn': allowed"),
        ({"iterations": 0}, "iterations=0: allowed"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: allowed"),
        ({"evaluation.protection": "dp"}, "evaluation.noise_multiplier=None: allowed"),
        ({"model.init_from": "nowhere.npz"}, "model.init_from='nowhere.npz': .*no such"),
    ],
    ids=str,
)
def test_refusals(resolved, changes, words):
    with pytest.raises(ConfigError, match=words):
        resolved(changes)


def test_a_refusal_has_the_line_of_its_field(resolved, tmp_path):
    with pytest.raises(ConfigError, match=r"trial\.yaml:\d+: iterations=0"):
        resolved({"iterations": 0})


ABSENT = DatasetError("not prepared")


def test_an_absent_data_set_matters_where_it_is_needed(resolved):
    found = resolved({"sampling_prob": 0.1}, error=ABSENT)
    assert (found.dataset, found.missing) == (None, ABSENT)
    for changes in ({}, {"sampling_prob": 0.1, "mechanism.truncated_batch_size": 150}):
        with pytest.raises(DatasetError):
            resolved(changes, error=ABSENT)
    overlap = DatasetError("overlaps", field="eval_split")
    with pytest.raises(DatasetError, match="overlaps"):
        resolved({"sampling_prob": 0.1}, error=overlap)


def test_evaluation_with_noise_is_reckoned(resolved):
    changes = {"evaluation": {"protection": "dp", "noise_multiplier": 10.0}}
    found = resolved({**changes, "averaging.polyak": True})
    counts = accounting.DpSgdMechanism.full_batch(noise_multiplier=10.0, iterations=4)
    assert found.eval_epsilon == accounting.epsilon(counts, delta=1e-5)
    assert resolved().eval_epsilon is None
