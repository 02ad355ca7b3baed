import dataclasses

import pytest

from accounting import DpSgdMechanism, epsilon, hints
from accounting.accountants import ACCOUNTANTS, Accountant
from accounting.hints import what_would_fit
from accounting.mechanism import (
    BandedMatrixFactorizationMechanism,
    Mechanism,
    TruncatedDpSgdMechanism,
)

DELTA = 1e-5


def run(noise: float, prob: float, iterations: int) -> DpSgdMechanism:
    return DpSgdMechanism(noise_multiplier=noise, sampling_prob=prob, iterations=iterations)


MECHANISMS: list[Mechanism] = [
    run(1.0, 0.01, 3000),
    run(0.6, 0.001, 10**5),
    run(5.0, 0.3, 500),
    run(0.7, 1.0, 30),
    BandedMatrixFactorizationMechanism(
        noise_multiplier=1.0, sampling_prob=0.02, iterations=3000, bands=3
    ),
    TruncatedDpSgdMechanism(
        noise_multiplier=1.0,
        sampling_prob=0.01,
        iterations=3000,
        num_examples=10000,
        truncated_batch_size=160,
    ),
]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: f"{m.kind}-{m.noise_multiplier}")
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_hints_fit_and_do_not_waste(mechanism: Mechanism, accountant: Accountant) -> None:
    if isinstance(mechanism, TruncatedDpSgdMechanism) and accountant == "rdp":
        return
    noise, iterations = what_would_fit(mechanism, 2.0, DELTA, accountant)
    assert noise is not None
    louder = dataclasses.replace(mechanism, noise_multiplier=noise)
    assert 1.9 <= epsilon(louder, delta=DELTA, accountant=accountant) <= 2
    assert float(f"{noise:.4g}") == noise
    if iterations is not None:
        shorter = mechanism.after(iterations)
        longer = mechanism.after(iterations + max(2 * iterations // 10, 3))
        assert epsilon(shorter, delta=DELTA, accountant=accountant) <= 2
        assert epsilon(longer, delta=DELTA, accountant=accountant) > 2


def test_a_single_iteration_that_is_too_dear_gets_no_hint_about_iterations() -> None:
    noise, iterations = what_would_fit(run(0.1, 1.0, 10), 1.0, DELTA, "pld")
    assert noise is not None
    assert iterations is None


@pytest.mark.parametrize("mechanism", MECHANISMS[:3], ids=str)
def test_hints_take_few_computations(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    compute = hints.compute_epsilon

    def counted(*args: object, **options: object) -> float:
        seen.append(compute(*args, **options))  # pyright: ignore
        return seen[-1]

    what_would_fit.cache_clear()
    monkeypatch.setattr(hints, "compute_epsilon", counted)
    what_would_fit(mechanism, 2.0, DELTA, "pld")
    assert len(seen) <= 12


@pytest.mark.parametrize(
    ("number", "rounded"),
    [(1.0, 1.0), (1.0001, 1.001), (0.00123451, 0.001235), (98765.4, 98770.0), (1.1, 1.1)],
)
def test_noise_is_rounded_up_to_four_digits(number: float, rounded: float) -> None:
    assert hints._rounded_up(number) == rounded
