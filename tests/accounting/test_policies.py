import math
import re
from typing import Any

import numpy as np
import pytest

from accounting import (
    GUARANTEES,
    POLICIES,
    Account,
    BudgetTerms,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    Policy,
    PrivacyBudget,
    PrivacyUnit,
    account,
    check_per_trial,
    epsilon,
    guarantee,
    policies,
)

MECHANISM = DpSgdMechanism(noise_multiplier=1.0, sampling_prob=0.01, iterations=1000)
COST = 1.828  # At delta 1e-5; dp-accounting 0.6.0.


def test_admits_what_fits_and_rejects_what_does_not() -> None:
    fits = check_per_trial(MECHANISM, PrivacyBudget(epsilon=1.83, delta=1e-5))
    dear = check_per_trial(MECHANISM, PrivacyBudget(epsilon=1.8, delta=1e-5))
    assert fits.admitted
    assert fits.reason == "epsilon 1.829 is within the budget of 1.83 at delta 1e-05"
    assert not dear.admitted
    assert dear.reason.startswith("epsilon 1.829 exceeds the budget of 1.8 at delta 1e-05; ")
    assert fits.epsilon == dear.epsilon == pytest.approx(COST, rel=1e-3)
    assert fits.delta == dear.delta == 1e-5


def test_the_edge_is_inclusive() -> None:
    exact = epsilon(MECHANISM, delta=1e-5)
    below = math.nextafter(exact, 0)
    assert check_per_trial(MECHANISM, PrivacyBudget(epsilon=exact, delta=1e-5)).admitted
    assert not check_per_trial(MECHANISM, PrivacyBudget(epsilon=below, delta=1e-5)).admitted


def test_what_a_trial_goes_on_from_counts():
    budget = PrivacyBudget(epsilon=1e6, delta=1e-5)
    half = MECHANISM.after(MECHANISM.iterations // 2)
    rest = MECHANISM.after(MECHANISM.iterations - half.iterations)
    decision = check_per_trial(rest, budget, prefix=(half,))
    assert decision.epsilon == epsilon(MECHANISM, delta=1e-5)
    assert "what was spent before" in decision.reason
    tight = PrivacyBudget(epsilon=math.nextafter(decision.epsilon, 0), delta=1e-5)
    refused = check_per_trial(rest, tight, prefix=(half,))
    assert not refused.admitted
    assert "would fit" not in refused.reason
    assert not check_per_trial(rest, budget, prefix=(None,)).admitted  # pyright: ignore


@pytest.mark.slow
def test_of_many_refused_only_the_first_are_told_what_would_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(account, "MOST_HINTS", 2)
    terms = BudgetTerms(
        epsilon=1.0, delta=1e-5, policy="per_trial", neighboring_relation="add_or_remove_one"
    )
    verdicts = Account(terms).decide(
        [
            DpSgdMechanism(noise_multiplier=noise, sampling_prob=0.01, iterations=1000)
            for noise in (1.0, 9.0, 1.1, 1.2)
        ]
    )
    assert [verdict.admitted for verdict in verdicts] == [False, True, False, False]
    hints = ["would fit" in verdict.reason for verdict in verdicts]
    assert hints == [True, False, True, False]
    assert verdicts[3].reason.startswith("epsilon")


@pytest.mark.slow
def test_hints_hold() -> None:
    budget = PrivacyBudget(epsilon=1.0, delta=1e-5)
    reason = check_per_trial(MECHANISM, budget).reason
    found = re.search(r"noise_multiplier >= ([\d.]+) or iterations <= (\d+) would fit", reason)
    assert found
    noise, iterations = float(found[1]), int(found[2])
    louder = DpSgdMechanism(noise_multiplier=noise, sampling_prob=0.01, iterations=1000)
    assert check_per_trial(louder, budget).admitted
    assert check_per_trial(MECHANISM.after(iterations), budget).admitted
    assert 1.4 < noise < 1.6
    assert iterations > 150


def test_a_rejection_without_hints_still_has_a_reason() -> None:
    one_step = DpSgdMechanism(noise_multiplier=0.1, sampling_prob=1, iterations=1)
    reason = check_per_trial(one_step, PrivacyBudget(epsilon=1, delta=1e-5)).reason
    assert "noise_multiplier >= " in reason
    assert "iterations" not in reason


@pytest.mark.parametrize("answer", [math.nan, RuntimeError("broken"), MemoryError("full")])
def test_fails_closed(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(policies, "epsilon", broken)
    decision = check_per_trial(MECHANISM, PrivacyBudget(epsilon=1e6, delta=1e-5))
    assert not decision.admitted
    assert decision.epsilon == math.inf
    assert "could not be computed" in decision.reason


@pytest.mark.parametrize("mechanism", [None, 0.5, "mechanism"])
def test_what_is_no_mechanism_is_not_admitted(mechanism: Any) -> None:
    decision = check_per_trial(mechanism, PrivacyBudget(epsilon=8, delta=1e-5))
    assert not decision.admitted
    assert "mechanism must be a DpSgdMechanism" in decision.reason


def test_what_is_no_budget_is_an_error() -> None:
    budget: Any = (8, 1e-5)
    with pytest.raises(InvalidPrivacyParameter, match="budget"):
        check_per_trial(MECHANISM, budget)


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1, 0, True, "8", "eight", None, np.float32("nan")], ids=repr
)
@pytest.mark.parametrize("field", ["epsilon", "delta"])
def test_budget_refuses(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-5, field: value}
    with pytest.raises(InvalidPrivacyParameter, match=field):
        PrivacyBudget(**fields)


@pytest.mark.parametrize("delta", [1, 1e-11, 2.0])
def test_budget_refuses_deltas_out_of_range(delta: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="delta"):
        PrivacyBudget(epsilon=8, delta=delta)


def test_the_guarantee_says_what_is_not_covered() -> None:
    text = guarantee("per_trial", epsilon=6.76881, delta=1e-5, neighboring_relation="zero_out")
    assert text.startswith("Each trial on its own is (6.769, 1e-05)-differentially private")
    assert "blanking one example" in text
    assert "drawn as the mechanism says" in text
    assert "NOT cover choosing the best of several trials, nor the sweep as a whole" in text
    assert "adding or removing one example" in guarantee("per_trial", epsilon=1, delta=1e-5)


@pytest.mark.parametrize(
    ("sampling", "said"),
    [
        ("poisson", "batches are drawn by Poisson sampling;"),
        ("truncated_poisson", "cut, at random, to a largest size;"),
        ("full_batch", "every batch is all of the data;"),
        ("cyclic_poisson", "from one group of the data after the other"),
    ],
)
def test_the_guarantee_says_how_batches_are_drawn(sampling: Any, said: str) -> None:
    assert said in guarantee("per_trial", epsilon=1, delta=1e-5, sampling=sampling)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_states_its_guarantee_in_one_sentence(policy: Policy) -> None:
    assert "(epsilon, delta)-differentially private" in GUARANTEES[policy]
    neighbours_of: dict[PrivacyUnit, str] = {
        "example": "one example",
        "user": "all examples of one user",
    }
    for unit, neighbours in neighbours_of.items():
        text = guarantee(policy, epsilon=1, delta=1e-5, privacy_unit=unit)
        assert f"adding or removing {neighbours}" in text
        assert text.count(". ") == 0
        assert text.endswith(".")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("policy", "none"),
        ("privacy_unit", "row"),
        ("sampling", "shuffled"),
        ("sampling", ""),
        ("epsilon", math.nan),
        ("epsilon", math.inf),
        ("delta", 0),
    ],
)
def test_no_guarantee_without_numbers(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"policy": "per_trial", "epsilon": 1.0, "delta": 1e-5, field: value}
    with pytest.raises(InvalidPrivacyParameter, match=field):
        guarantee(**fields)


@pytest.mark.parametrize(
    ("number", "text"),
    [(8.0, "8"), (8.0000001, "8.001"), (0.12341, "0.1235"), (0.0, "0"), (123456, "1.235e+05")],
)
def test_numbers_are_shown_rounded_up(number: float, text: str) -> None:
    assert f"({text}, " in guarantee("per_trial", epsilon=number, delta=1e-5)
