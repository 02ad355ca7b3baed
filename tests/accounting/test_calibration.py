import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    CalibrationError,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    calibrate_noise_multiplier,
    epsilon,
)
from accounting._search import smallest_fitting
from accounting.accountants import ACCOUNTANTS, Accountant
from accounting.calibration import TOLERANCE


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
