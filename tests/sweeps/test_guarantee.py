"""The sentence on everything that a sweep shows names how gradients were clipped."""

import pytest

import accounting
from sweeps.guarantee import guarantee
from sweeps.spec.clipping_spec import ClippingSpec

PRIVACY = {
    "policy": "per_trial",
    "target_epsilon": 8.0,
    "target_delta": 1e-5,
    "neighboring_relation": "zero_out",
}
PROMISE = accounting.guarantee(
    "per_trial", epsilon=8.0, delta=1e-5, neighboring_relation="zero_out"
)
PUBLIC = "The evaluation examples are treated as public and get no protection."


def said(**clipping):
    return guarantee(PRIVACY, ClippingSpec(**clipping).model_dump())


def test_flat_clipping_goes_without_saying():
    assert said() == guarantee(PRIVACY) == guarantee(PRIVACY, None) == f"{PROMISE} {PUBLIC}"


@pytest.mark.parametrize("mode", ["per_layer", "automatic", "quantile"])
def test_any_other_mode_is_named(mode):
    text = said(mode=mode)
    assert text.startswith(PROMISE)
    assert text.endswith(PUBLIC)
    assert f"Clipping is {mode}: " in text


def test_quantile_says_that_its_count_is_paid_for():
    text = said(mode="quantile", target_quantile=0.7)
    assert "the 0.7 quantile" in text
    assert "standard deviation expected_batch_size / 20, and is part of what is accounted" in text
    assert "standard deviation 12.5, and is" in said(mode="quantile", count_noise_stddev=12.5)
