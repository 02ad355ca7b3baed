"""Requests that are admitted together or not at all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import DpSgdMechanism, InvalidPrivacyParameter
from accounting.account import Account
from accounting.terms import BudgetTerms


def run(noise: float, iterations: int = 100) -> DpSgdMechanism:
    return DpSgdMechanism(
        noise_multiplier=noise,
        sampling_prob=0.1,
        iterations=iterations,
        neighboring_relation="zero_out",
    )


def account(policy: str = "open", epsilon: float = 3.0) -> Account:
    return Account(BudgetTerms(epsilon=epsilon, delta=1e-5, policy=policy))  # pyright: ignore[reportArgumentType]


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0.8, 8.0), min_size=1, max_size=6), st.integers(1, 4))
def test_a_group_stands_or_falls_and_leaves_what_it_does_not_take(
    noises: list[float], together: int
) -> None:
    """As if groups were asked for one by one, each only where there is room for the last of it."""
    requests = [run(noise) for noise in noises for _ in range(together)]
    found = [v.admitted for v in account().decide(requests, together=together)]
    one_by_one, expected = account(), list[bool]()
    for noise in noises:
        fits = one_by_one.copies_that_fit(run(noise), most=together) >= together
        expected += [fits] * together
        for _ in range(together if fits else 0):
            one_by_one.commit(run(noise), "")
    assert found == expected


def test_who_is_refused_for_the_sake_of_others_is_told_why() -> None:
    alone = account().decide([run(2.0)] * 3)
    assert [verdict.admitted for verdict in alone] == [True, False, False], "change the budget"
    verdicts = account().decide([run(2.0)] * 3 + [run(8.0)] * 3, together=3)
    assert [verdict.admitted for verdict in verdicts] == [False] * 3 + [True] * 3
    for verdict in verdicts[:3]:
        assert verdict.reason == f"3 are admitted together or not at all: {alone[1].reason}"


@pytest.mark.parametrize("policy", ["per_trial", "declared"])
def test_elsewhere_it_changes_nothing(policy: str) -> None:
    for requests in ([run(2.0)] * 4, [run(0.5)] * 4):
        one = account(policy, 8.0)
        assert one.decide(requests, together=2) == one.decide(requests)


@pytest.mark.parametrize("together", [0, 2, 1.0])
def test_groups_are_whole(together: int) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="together"):
        account().decide([run(2.0)] * 3, together=together)
