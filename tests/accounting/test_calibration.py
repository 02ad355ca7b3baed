import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    BandedMatrixFactorizationMechanism,
    CalibrationError,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Mechanism,
    TruncatedDpSgdMechanism,
    calibrate_noise_multiplier,
    calibrate_noise_of,
    epsilon,
)
from accounting._coarse_to_fine import TOLERANCE
from accounting._search import guided_fitting, smallest_fitting
from accounting.accountants import ACCOUNTANTS, Accountant
from accounting.calibration import calibrate_expected_batch_size, calibrate_iterations


def calibrate(**changes: Any) -> float:
    fields: dict[str, Any] = {
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "sampling_prob": 0.1,
        "iterations": 100,
        "accountant": "rdp",
    }
    return calibrate_noise_multiplier(**(fields | changes))


def check(target: float, delta: float, prob: float, iterations: int, how: Accountant) -> None:
    noise = calibrate_noise_multiplier(
        target_epsilon=target,
        target_delta=delta,
        sampling_prob=prob,
        iterations=iterations,
        accountant=how,
    )

    def cost(noise_multiplier: float) -> float:
        mechanism = DpSgdMechanism(
            noise_multiplier=noise_multiplier, sampling_prob=prob, iterations=iterations
        )
        return epsilon(mechanism, delta=delta, accountant=how)

    assert cost(noise) <= target
    assert cost(noise / (1 + 1.1 * TOLERANCE)) > target


@pytest.mark.parametrize("accountant", ACCOUNTANTS)
@pytest.mark.parametrize(
    ("prob", "iterations", "target", "rdp", "pld"),
    [(0.01, 10**4, 1, 4.126, 3.813), (0.1, 1000, 3, 4.826, 4.496), (0.1, 100, 8, 0.994, 0.936)],
)
@pytest.mark.slow
def test_golden_values(
    prob: float, iterations: int, target: float, rdp: float, pld: float, accountant: Accountant
) -> None:
    noise = calibrate(
        target_epsilon=target, sampling_prob=prob, iterations=iterations, accountant=accountant
    )
    # dp-accounting 0.6.0 at interval 1e-4, three decimals; the result may be 0.1 % above.
    assert noise == pytest.approx(rdp if accountant == "rdp" else pld, rel=2e-3)


@settings(derandomize=True, deadline=None, max_examples=5)
@given(
    target=st.floats(0.05, 20),
    delta=st.sampled_from([1e-3, 1e-5, 1e-9]),
    log_prob=st.floats(-3, 0),
    log_iterations=st.floats(0, 4),
)
@pytest.mark.slow
def test_rdp_never_overshoots_and_does_not_waste(
    target: float, delta: float, log_prob: float, log_iterations: float
) -> None:
    check(target, delta, 10**log_prob, int(10**log_iterations), "rdp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "delta", "prob", "iterations"),
    [
        (1.0, 1e-5, 0.01, 1000),
        (8.0, 1e-6, 0.1, 300),
        (0.1, 1e-5, 0.001, 10**5),
        (2.0, 1e-7, 1.0, 50),
        (0.5, 1e-10, 0.2, 1),
        (300.0, 1e-5, 0.5, 100),
    ],
)
def test_pld_never_overshoots_and_does_not_waste(
    target: float, delta: float, prob: float, iterations: int
) -> None:
    check(target, delta, prob, iterations, "pld")


@pytest.mark.slow
def test_number_types_and_relations_do_not_matter() -> None:
    assert calibrate(sampling_prob=1.0) == calibrate(
        target_epsilon=np.float32(3), iterations=np.int64(100), sampling_prob=1
    )
    assert calibrate() == calibrate(target_epsilon=3, neighboring_relation="zero_out")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("target_epsilon", "target_delta", "sampling_prob", "iterations")
        for value in (
            math.nan, math.inf, -1, 0, True, "8", "eight", None, np.float32("nan"), np.array(1.0),
        )
    ]
    + [
        ("target_delta", 1),
        ("target_delta", 1e-11),
        ("sampling_prob", 1.5),
        ("iterations", 2.0),
        ("accountant", "gdp"),
        ("neighboring_relation", "replace_one"),
    ],
)  # fmt: skip
def test_refuses_invalid_input(field: str, value: object) -> None:
    with pytest.raises(InvalidPrivacyParameter, match=field):
        calibrate(**{field: value})


def test_targets_that_cannot_be_bracketed() -> None:
    with pytest.raises(CalibrationError, match="missed even by noise_multiplier 1e"):
        calibrate(target_epsilon=1e-12, sampling_prob=1, iterations=10**12)
    with pytest.raises(CalibrationError, match=r"met even by noise_multiplier 0\.01"):
        calibrate(target_epsilon=1e9, iterations=1)


def test_search_ends_on_a_fitting_point_in_few_evaluations() -> None:
    seen: list[float] = []

    def cost(x: float) -> float:
        seen.append(x)
        return math.inf if x < 0.5 else 7 / x + 1 / (x * x)

    found = smallest_fitting(
        cost, 2.0, start=100, factor=2, tolerance=1e-3, lowest=1e-3, highest=1e6
    )
    assert found in seen
    assert cost(found or 0.0) <= 2 < cost((found or 0.0) / 1.001)
    assert len(seen) < 25


def test_search_survives_plateaus_zeros_and_steps() -> None:
    def cost(x: float) -> float:
        return 5.0 if x < 3 else 0.0

    found = smallest_fitting(
        cost, 1.0, start=0.1, factor=2, tolerance=1e-3, lowest=1e-3, highest=1e6
    )
    assert found is not None
    assert 3 <= found <= 3 * 1.001


@pytest.mark.parametrize("ratio", [1.0, 0.3, 2.5])
def test_search_with_a_guide_takes_few_evaluations(ratio: float) -> None:
    seen: list[float] = []

    def guide(x: float) -> float:
        return 7 / x + 1 / (x * x)

    def cost(x: float) -> float:
        seen.append(x)
        return ratio * guide(x) * (1 + 0.01 * math.log(x))

    found = guided_fitting(
        cost, guide, 2.0, start=50, near=False, tolerance=1e-3, lowest=1e-3, highest=1e6
    )
    assert found in seen
    assert len(seen) <= 5
    assert cost(found or 0.0) <= 2 < cost((found or 0.0) / 1.001)


def test_search_survives_a_guide_that_misleads() -> None:
    def cost(x: float) -> float:
        return 7 / x + 1 / (x * x)

    for guide in (lambda x: 1.0, lambda x: math.inf, lambda x: 1e-9 / x, lambda x: 0.0):
        found = guided_fitting(
            cost, guide, 2.0, start=50, near=True, tolerance=1e-3, lowest=1e-3, highest=1e6
        )
        assert found is not None
        assert cost(found) <= 2 < cost(found / 1.001)


ITERATIONS: dict[str, Any] = {
    "target_epsilon": 2.0,
    "target_delta": 1e-5,
    "noise_multiplier": 1.0,
    "sampling_prob": 0.01,
}
BATCH: dict[str, Any] = {
    "target_epsilon": 2.0,
    "target_delta": 1e-5,
    "noise_multiplier": 1.0,
    "iterations": 1000,
    "num_examples": 60000,
}


def iterations_for(changes: dict[str, Any]) -> int:
    fields: dict[str, Any] = ITERATIONS | changes
    return calibrate_iterations(**fields)


def batch_for(changes: dict[str, Any]) -> float:
    fields: dict[str, Any] = BATCH | changes
    return calibrate_expected_batch_size(**fields)


@settings(max_examples=6)
@given(
    target=st.floats(0.2, 15),
    log_noise=st.floats(-0.2, 1),
    log_prob=st.floats(-3, 0),
    how=st.sampled_from(["pld", "pld", "rdp"]),
)
@pytest.mark.slow
def test_iterations_are_the_last_that_fit(
    target: float, log_noise: float, log_prob: float, how: Accountant
) -> None:
    noise, prob = 10**log_noise, 10**log_prob
    one = DpSgdMechanism(noise_multiplier=noise, sampling_prob=prob, iterations=1)
    try:
        found = calibrate_iterations(
            target_epsilon=target,
            target_delta=1e-5,
            noise_multiplier=noise,
            sampling_prob=prob,
            accountant=how,
        )
    except CalibrationError:
        found = 0
    assert type(found) is int
    assert not found or epsilon(one.after(found), delta=1e-5, accountant=how) <= target
    assert epsilon(one.after(found + 1), delta=1e-5, accountant=how) > target


def test_iterations_at_the_edges() -> None:
    with pytest.raises(CalibrationError, match="missed even by a single iteration"):
        iterations_for({"noise_multiplier": 0.1, "sampling_prob": 1.0})
    assert iterations_for({"noise_multiplier": 1e9}) == 10**12
    # Exactly one: the target is what it costs.
    one = DpSgdMechanism(noise_multiplier=1.0, sampling_prob=0.5, iterations=1)
    exact = epsilon(one, delta=1e-5)
    changes = {"sampling_prob": 0.5, "target_epsilon": exact}
    assert iterations_for(changes) == 1


@settings(max_examples=6)
@given(
    target=st.floats(0.2, 15),
    log_noise=st.floats(-0.2, 1),
    log_iterations=st.floats(0, 4),
    how=st.sampled_from(["pld", "pld", "rdp"]),
)
@pytest.mark.slow
def test_batches_are_the_largest_that_fit(
    target: float, log_noise: float, log_iterations: float, how: Accountant
) -> None:
    noise, iterations, examples = 10**log_noise, int(10**log_iterations), 60000

    def cost(batch_size: float) -> float:
        mechanism = DpSgdMechanism(
            noise_multiplier=noise, sampling_prob=batch_size / examples, iterations=iterations
        )
        return epsilon(mechanism, delta=1e-5, accountant=how)

    try:
        found = calibrate_expected_batch_size(
            target_epsilon=target,
            target_delta=1e-5,
            noise_multiplier=noise,
            iterations=iterations,
            num_examples=examples,
            accountant=how,
        )
    except CalibrationError:
        assert cost(1.0) > target
        return
    assert 1 <= found <= examples
    assert cost(found) <= target
    assert found * (1 + 1.1 * TOLERANCE) > examples or cost(found * (1 + 1.1 * TOLERANCE)) > target


def test_batches_at_the_edges() -> None:
    with pytest.raises(CalibrationError, match="missed even by an expected batch size of 1"):
        batch_for({"target_epsilon": 0.01, "num_examples": 2})
    assert batch_for({"noise_multiplier": 1e6}) == 60000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in ("target_epsilon", "target_delta", "noise_multiplier")
        for value in (math.nan, math.inf, -1, 0, True, "8", None)
    ]
    + [("accountant", "gdp"), ("neighboring_relation", "replace_one")],
)
def test_the_others_refuse_invalid_input(field: str, value: object) -> None:
    with pytest.raises(InvalidPrivacyParameter, match=field):
        iterations_for({field: value})
    with pytest.raises(InvalidPrivacyParameter, match=field):
        batch_for({field: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, math.nan, True, None, 10**12 + 1])
def test_batches_refuse_an_invalid_number_of_examples(value: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="num_examples"):
        batch_for({"num_examples": value})


TRUNCATED = TruncatedDpSgdMechanism(
    noise_multiplier=9.0,
    sampling_prob=0.04,
    iterations=100,
    num_examples=1437,
    truncated_batch_size=90,
)
BANDED = BandedMatrixFactorizationMechanism(
    noise_multiplier=9.0, sampling_prob=0.16, iterations=101, bands=4
)


@pytest.mark.parametrize("mechanism", [TRUNCATED, BANDED], ids=lambda one: one.kind)
def test_noise_is_calibrated_for_the_mechanism_that_is_run(mechanism: Mechanism) -> None:
    noise = calibrate_noise_of(mechanism, target_epsilon=3.0, target_delta=1e-5)

    def cost(noise_multiplier: float) -> float:
        changed = dataclasses.replace(mechanism, noise_multiplier=noise_multiplier)
        return epsilon(changed, delta=1e-5)

    assert cost(noise) <= 3.0 < cost(noise / (1 + 1.1 * TOLERANCE))
    louder = dataclasses.replace(mechanism, noise_multiplier=0.5)
    assert calibrate_noise_of(louder, target_epsilon=3.0, target_delta=1e-5) == noise


def test_a_banded_run_needs_the_noise_of_as_many_steps_as_a_unit_may_join() -> None:
    assert calibrate_noise_of(
        BANDED, target_epsilon=3.0, target_delta=1e-5, accountant="rdp"
    ) == calibrate(sampling_prob=0.16, iterations=26)


def test_truncated_batches_have_no_rdp_noise() -> None:
    with pytest.raises(InvalidPrivacyParameter, match="'pld' with truncated batches"):
        calibrate_noise_of(TRUNCATED, target_epsilon=3.0, target_delta=1e-5, accountant="rdp")
