import json
import math
import pathlib
import subprocess
import sys
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    AccountingError,
    DpSgdMechanism,
    InvalidPrivacyParameter,
    accountants,
    bounds,
    epsilon,
)
from accounting.accountants import ACCOUNTANTS, Accountant
from accounting.mechanism import (
    BandedMatrixFactorizationMechanism,
    Mechanism,
    SampledGaussian,
    TruncatedDpSgdMechanism,
)
from accounting.renyi import epsilon_of_rdp, step_rdp

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "epsilon.json"
CASES: list[dict[str, Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
BAD_DELTAS = [
    0, 1, 1.0, 1e-11, -1e-5, 2.0, math.nan, math.inf, True, "eight", None, np.float32("nan"),
]  # fmt: skip


def run(noise: Any, sampling_prob: Any, iterations: Any) -> DpSgdMechanism:
    return DpSgdMechanism(
        noise_multiplier=noise, sampling_prob=sampling_prob, iterations=iterations
    )


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c['noise_multiplier']}-{c['sampling_prob']}-{c['iterations']}"
)
def test_golden_values(case: dict[str, Any]) -> None:
    assert case["source"]
    mechanism = run(case["noise_multiplier"], case["sampling_prob"], case["iterations"])
    pld = epsilon(mechanism, delta=case["delta"])
    rdp = epsilon(mechanism, delta=case["delta"], accountant="rdp")
    # Three decimals or four digits is what the sources give. "pld" is an upper bound on a grid of
    # 1e-4, which is coarse where single losses are smaller: there the independent value is below.
    values = [case["pld"], case["prv"][0]] if "prv" in case else [case["pld"]]
    assert pld <= max(values) * (1 + 5e-4) + 6e-4
    assert pld >= min(values) * (1 - 5e-4) - 6e-4
    assert pld <= case["pld"] * (1 + 5e-4) + 6e-4
    if "rdp" in case:  # the sources look at fewer orders
        assert rdp <= case["rdp"] * (1 + 5e-4) + 6e-4
    if "prv" in case:
        value, error = case["prv"]
        assert value - error <= pld <= value + error
    assert pld <= rdp


def test_agrees_with_the_library_accountants() -> None:
    mechanism = run(1.2, 0.02, 500)
    pld = dp_accounting.pld.PLDAccountant()
    pld.compose(mechanism.dp_event())
    assert epsilon(mechanism, delta=1e-6) == pytest.approx(pld.get_epsilon(1e-6), rel=5e-4)


@pytest.mark.parametrize(
    ("noise", "prob", "iterations", "delta"),
    [
        (1.2, 0.02, 500, 1e-6),
        (1.0, 1e-4, 100_000, 1e-5),
        (20.0, 0.5, 10_000, 1e-8),
        (0.6, 0.01, 300, 1e-5),
        (60.0, 0.001, 2_000, 1e-6),
        (3.0, 0.999, 50, 1e-3),
    ],
)
@pytest.mark.slow
def test_rdp_is_the_least_over_all_orders(
    noise: float, prob: float, iterations: int, delta: float
) -> None:
    step = SampledGaussian(noise_multiplier=noise, sampling_prob=prob)
    ours = bounds.rdp_bound(((step, iterations),), delta)
    library = dp_accounting.rdp.RdpAccountant()
    library.compose(step.dp_event(), iterations)
    # Never above what the library finds at its own orders, but for margins for rounding.
    assert ours <= library.get_epsilon(delta) * (1 + 1e-6)
    least = min(
        epsilon_of_rdp(iterations * step_rdp(step, order), delta, order)
        for order in [*np.geomspace(1.02, 64, 8000).tolist(), *map(float, range(65, 1025))]
    )
    assert ours == pytest.approx(least, rel=1e-5)


@settings(derandomize=True, deadline=None, max_examples=15)
@given(
    log_noise=st.floats(-0.2, 2),
    log_prob=st.floats(-4, -0.1),
    log_iterations=st.floats(0, 3.5),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
)
@pytest.mark.slow
def test_lies_between_a_lower_bound_and_rdp(
    log_noise: float, log_prob: float, log_iterations: float, delta: float
) -> None:
    mechanism = run(10**log_noise, 10**log_prob, int(10**log_iterations))
    interval = 1e-3
    lower = privacy_loss_distribution.from_gaussian_mechanism(
        mechanism.noise_multiplier,
        sampling_prob=mechanism.sampling_prob,
        pessimistic_estimate=False,
        use_connect_dots=False,
        value_discretization_interval=interval,
    ).self_compose(mechanism.iterations)
    pld = epsilon(mechanism, delta=delta)
    assert pld >= lower.get_epsilon_for_delta(delta) - 1e-9
    assert pld <= epsilon(mechanism, delta=delta, accountant="rdp")


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    log_noise=st.floats(-3, 4),
    log_iterations=st.floats(0, 6),
    delta=st.sampled_from([0.5, 1e-3, 1e-5, 1e-10]),
)
def test_without_sampling_is_the_exact_gaussian(
    log_noise: float, log_iterations: float, delta: float
) -> None:
    noise, iterations = 10**log_noise, int(10**log_iterations)
    got = epsilon(run(noise, 1, iterations), delta=delta)
    with np.errstate(divide="ignore"):
        exact = dp_accounting.get_epsilon_gaussian(noise / math.sqrt(iterations), delta)
    assert exact <= got <= exact * 1.01 + 1e-8


def single_step_epsilon(noise: float, sampling_prob: float, delta: float) -> float:
    """Amplification by subsampling, which is exact for one step with an example removed."""
    gaussian = dp_accounting.get_epsilon_gaussian(noise, delta / sampling_prob)
    return math.log1p(sampling_prob * math.expm1(gaussian))


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    log_noise=st.floats(-1, 1.5),
    log_prob=st.floats(-3, -0.05),
    delta=st.sampled_from([1e-4, 1e-5, 1e-7, 1e-10]),
)
@pytest.mark.slow
def test_single_step_is_at_least_the_exact_value(
    log_noise: float, log_prob: float, delta: float
) -> None:
    noise, prob = 10**log_noise, 10**log_prob
    exact = single_step_epsilon(noise, prob, delta)
    got = epsilon(run(noise, prob, 1), delta=delta)
    assert exact <= got <= exact * 1.001 + 3e-4


@pytest.mark.slow
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_more_noise_fewer_iterations_less_sampling_cost_less(accountant: Accountant) -> None:
    def cost(noise: float, prob: float, iterations: int) -> float:
        return epsilon(run(noise, prob, iterations), delta=1e-5, accountant=accountant)

    along_noise = [cost(noise, 0.02, 300) for noise in (0.9, 1.3, 2.5, 8)]
    along_prob = [cost(1.1, prob, 300) for prob in (0.001, 0.01, 0.1, 0.5, 0.999, 1)]
    along_iterations = [cost(1.1, 0.02, n) for n in (1, 10, 300, 301, 5000)]
    assert along_noise == sorted(along_noise, reverse=True)
    assert along_prob == sorted(along_prob)
    assert along_iterations == sorted(along_iterations)


def test_relations_cost_the_same() -> None:
    blanked = DpSgdMechanism(
        noise_multiplier=1.1, sampling_prob=0.1, iterations=50, neighboring_relation="zero_out"
    )
    for accountant in ACCOUNTANTS:
        assert epsilon(blanked, delta=1e-5, accountant=accountant) == epsilon(
            run(1.1, 0.1, 50), delta=1e-5, accountant=accountant
        )


@pytest.mark.parametrize("noise", [2, np.int64(2), np.float32(2), np.float64(2), np.float16(2)])
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_number_types_do_not_matter(noise: Any, accountant: Accountant) -> None:
    expected = epsilon(run(2.0, 0.5, 4), delta=1e-5, accountant=accountant)
    got = epsilon(
        run(noise, np.float32(0.5), np.int64(4)), delta=np.float64(1e-5), accountant=accountant
    )
    assert got == expected
    assert type(got) is float


PATHOLOGICAL = [
    (0.9, 0.01, 1),
    (0.5, 0.05, 10**5),
    (0.5, 0.5, 10**5),
    (0.01, 0.01, 10),
    (1e-6, 0.05, 10**6),
    (0.9999999999999999, 0.01, 5),
    (1e-300, 1.0, 10**6),
    (0.5, 1e-160, 3),
    (0.5, 1e300, 10**12),
    (5e-324, 1.0, 10**12),
    (1.0, 1e-9, 10**12),
    (1e-6, 1e4, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sampling_prob", "noise", "iterations"), PATHOLOGICAL)
def test_pathological_mechanisms_get_a_sound_bound(
    sampling_prob: float, noise: float, iterations: int
) -> None:
    mechanism = run(noise, sampling_prob, iterations)
    for delta in (1e-5, 1e-10):
        pld = epsilon(mechanism, delta=delta)
        assert 0 <= pld <= epsilon(mechanism, delta=delta, accountant="rdp")
        assert math.isfinite(pld) or noise < 1e-150
        if 1e-8 < noise < 1e8 and sampling_prob > delta:
            # Running more often cannot cost less than running once.
            step = SampledGaussian(noise_multiplier=noise, sampling_prob=1.0)
            gaussian = bounds.gaussian_bound(((step, 1),), delta / sampling_prob)
            assert pld >= (gaussian + math.log(sampling_prob)) * (1 - 1e-6) - 1e-9


def test_beyond_the_range_of_a_float_is_infinite() -> None:
    for accountant in ACCOUNTANTS:
        assert epsilon(run(5e-324, 1, 10**12), delta=1e-5, accountant=accountant) == math.inf


@pytest.mark.parametrize("delta", BAD_DELTAS, ids=repr)
@pytest.mark.parametrize("accountant", ACCOUNTANTS)
def test_refuses_bad_deltas(delta: Any, accountant: Accountant) -> None:
    with pytest.raises(InvalidPrivacyParameter, match=r"delta must be a number in \[1e-10, 1\)"):
        epsilon(run(1, 0.1, 1), delta=delta, accountant=accountant)


@pytest.mark.parametrize("accountant", ["PLD", "gdp", None, 1, ["pld"]])
def test_refuses_unknown_accountants(accountant: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="accountant must be 'pld' or 'rdp'"):
        epsilon(run(1, 0.1, 1), delta=1e-5, accountant=accountant)


@pytest.mark.parametrize("mechanism", [None, 1.0, {"noise_multiplier": 1.0}])
def test_refuses_what_is_no_mechanism(mechanism: Any) -> None:
    with pytest.raises(InvalidPrivacyParameter, match="mechanism must be a DpSgdMechanism"):
        epsilon(mechanism, delta=1e-5)


@pytest.mark.parametrize(
    ("noise", "answer"),
    [(1.01, math.nan), (1.02, -1.0), (1.03, MemoryError("full")), (1.04, ValueError("no"))],
)
def test_a_failure_raises_and_is_not_remembered(
    noise: float, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mechanism = run(noise, 0.1, 3)  # Not asked for by any other test.

    def broken(*_: object) -> float:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(bounds, "rdp_bound", broken)
        for _ in range(2):
            with pytest.raises(AccountingError, match="rdp accountant"):
                epsilon(mechanism, delta=1e-5, accountant="rdp")
    assert epsilon(mechanism, delta=1e-5, accountant="rdp") > 0


def test_a_coarse_grid_costs_more_and_stays_sound() -> None:
    mechanism = run(0.8, 0.01, 1000)
    coarse = accountants.compute_epsilon(
        accountants.mechanism_parts(mechanism), 1e-5, "pld", coarse=True
    )
    assert epsilon(mechanism, delta=1e-5) <= coarse <= 1.02 * epsilon(mechanism, delta=1e-5)


@pytest.mark.parametrize(
    "mechanism",
    [
        BandedMatrixFactorizationMechanism(
            noise_multiplier=1.0, sampling_prob=0.01, iterations=3996, bands=4
        ),
        DpSgdMechanism(
            noise_multiplier=1.0, sampling_prob=0.01, iterations=999, privacy_unit="user"
        ),
    ],
)
def test_mechanisms_of_one_step_cost_the_same(mechanism: Mechanism) -> None:
    for accountant in ACCOUNTANTS:
        assert epsilon(mechanism, delta=1e-5, accountant=accountant) == epsilon(
            run(1.0, 0.01, 999), delta=1e-5, accountant=accountant
        )


def test_truncated_batches_are_accounted_by_pld_alone() -> None:
    mechanism = TruncatedDpSgdMechanism(
        noise_multiplier=1.0,
        sampling_prob=0.01,
        iterations=1000,
        num_examples=10000,
        truncated_batch_size=149,
    )
    # dp-accounting 0.6.0 at interval 1e-3.
    assert epsilon(mechanism, delta=1e-5) == pytest.approx(1.832, rel=1e-3)
    with pytest.raises(InvalidPrivacyParameter, match="accountant must be 'pld'"):
        epsilon(mechanism, delta=1e-5, accountant="rdp")


def test_importing_the_package_does_not_load_the_library() -> None:
    code = "import sys, accounting; sys.exit('dp_accounting' in sys.modules)"
    root = pathlib.Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
