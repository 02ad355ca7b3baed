import dataclasses
import math
import pickle

import dp_accounting
import numpy as np
import pytest

from accounting import DpSgdMechanism, InvalidPrivacyParameter

NOT_NUMBERS = [
    math.nan,
    math.inf,
    -math.inf,
    -1,
    0,
    -0.0,
    True,
    False,
    np.True_,
    "8",
    "eight",
    None,
    np.float32("nan"),
    1 + 0j,
    np.array(1.0),
    [1.0],
    10**400,
]


def mechanism(**changes: object) -> DpSgdMechanism:
    fields: dict[str, object] = {"noise_multiplier": 1.0, "sampling_prob": 0.1, "iterations": 4}
    return DpSgdMechanism(**(fields | changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("field", ["noise_multiplier", "sampling_prob", "iterations"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_refuses_what_is_not_a_positive_number(field: str, value: object) -> None:
    with pytest.raises(InvalidPrivacyParameter, match=field) as caught:
        mechanism(**{field: value})
    assert caught.value.field == field
    assert caught.value.value is value


@pytest.mark.parametrize("value", [1.5, 1.0000001, 2, np.float64(1.5)])
def test_refuses_sampling_prob_above_one(value: object) -> None:
    with pytest.raises(
        InvalidPrivacyParameter, match=r"sampling_prob must be a number in \(0, 1\]"
    ):
        mechanism(sampling_prob=value)


@pytest.mark.parametrize("value", [2.0, np.float64(3), 1.5, 10**12 + 1])
def test_refuses_iterations_that_are_no_integer_in_range(value: object) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="iterations must be an integer"):
        mechanism(iterations=value)


@pytest.mark.parametrize("value", ["replace_one", "ADD_OR_REMOVE_ONE", None, 1, ["zero_out"]])
def test_refuses_unknown_relations(value: object) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="neighboring_relation"):
        mechanism(neighboring_relation=value)


def test_numbers_become_plain() -> None:
    plain = DpSgdMechanism(noise_multiplier=2.0, sampling_prob=0.5, iterations=8)
    mixed = mechanism(
        noise_multiplier=np.int64(2), sampling_prob=np.float32(0.5), iterations=np.int32(8)
    )
    assert mixed == plain
    assert hash(mixed) == hash(plain)
    assert [type(v) for v in dataclasses.astuple(mixed)[:3]] == [float, float, int]


def test_is_a_frozen_picklable_value() -> None:
    one = mechanism(neighboring_relation="zero_out")
    assert pickle.loads(pickle.dumps(one)) == one
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.noise_multiplier = 9.0  # pyright: ignore[reportAttributeAccessIssue]


def test_after_changes_iterations_alone() -> None:
    one = mechanism(neighboring_relation="zero_out")
    assert one.after(9) == dataclasses.replace(one, iterations=9)
    with pytest.raises(InvalidPrivacyParameter, match="iterations"):
        one.after(0)


def test_event_is_the_poisson_sampled_gaussian_composed() -> None:
    event = mechanism(noise_multiplier=3).dp_event()
    gaussian = dp_accounting.GaussianDpEvent(3.0)
    step = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    assert event == dp_accounting.SelfComposedDpEvent(step, 4)
    assert type(gaussian.noise_multiplier) is float


def test_event_without_sampling_is_the_gaussian_composed() -> None:
    event = mechanism(sampling_prob=1).dp_event()
    assert event == dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(1.0), 4)
