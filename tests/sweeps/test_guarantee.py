"""The sentence on everything that a sweep shows names how gradients were clipped."""

from typing import Any

import pytest

import accounting
from sweeps.guarantee import guarantee, privacy_unit, sampling
from sweeps.spec.clipping_spec import ClippingSpec
from sweeps.spec.mechanism_spec import MechanismSpec

PRIVACY = {
    "policy": "per_trial",
    "target_epsilon": 8.0,
    "target_delta": 1e-5,
    "neighboring_relation": "zero_out",
}
PROMISE = accounting.guarantee(
    "per_trial", epsilon=8.0, delta=1e-5, neighboring_relation="zero_out", sampling="poisson"
)
PUBLIC = "The evaluation examples are treated as public and get no protection."


def said(**clipping):
    return guarantee({"privacy": PRIVACY, "clipping": ClippingSpec(**clipping).model_dump()})


def test_flat_clipping_goes_without_saying():
    assert said() == guarantee({"privacy": PRIVACY}) == f"{PROMISE} {PUBLIC}"


def test_a_private_selection_says_what_the_clock_tells():
    text = guarantee({"privacy": {**PRIVACY, "policy": "private_selection"}})
    assert "who watches the machine or the clock learns about that number" in text
    assert "clock" not in said()


@pytest.mark.parametrize("mode", ["per_layer", "automatic", "quantile"])
def test_any_other_mode_is_named(mode):
    text = said(mode=mode)
    assert text.startswith(PROMISE)
    assert text.endswith(PUBLIC)
    assert f"Clipping is {mode}: " in text


def whole(batches: Any = 64, user_feature=None, **mechanism):
    return {
        "privacy": PRIVACY,
        "data": {"name": "digits", "user_feature": user_feature},
        "mechanism": MechanismSpec(**mechanism).model_dump(),
        "search_space": {"expected_batch_size": batches},
    }


@pytest.mark.parametrize(
    ("spec", "how", "words"),
    [
        (whole(), "poisson", "drawn by Poisson sampling; this does NOT"),
        (whole(truncated_batch_size=96), "truncated_poisson", "A batch holds 96 examples at most"),
        (whole(bands=4), "cyclic_poisson", "each example takes part in one step of 4 at most"),
        (whole("full"), "full_batch", "every batch is all of the data; this does NOT"),
        (whole({"choice": ["full"]}), "full_batch", "every batch is all of the data; this"),
        (
            whole({"by": "optimizer", "sgd": {"grid_search": [64]}, "else": "full"}),
            "poisson",
            "Where expected_batch_size is full, every batch is all of the data.",
        ),
        (
            whole({"grid_search": [64, "full"]}),
            "poisson",
            "Where expected_batch_size is full, every batch is all of the data.",
        ),
    ],
)
def test_what_is_promised_is_what_is_drawn(spec, how, words):
    assert sampling(spec) == how
    text = guarantee(spec)
    assert words in text
    assert ("Poisson" in text) == (how != "full_batch")
    assert "blanking one example (" in text


def test_a_trial_that_takes_everybody_is_full_batch():
    mixed = whole({"grid_search": [64, "full"]})
    assert [sampling(mixed, prob) for prob in (0.5, 1.0)] == ["poisson", "full_batch"]
    assert sampling(whole(bands=4), 1.0) == "cyclic_poisson"


def test_users_are_promised_where_users_are_protected():
    spec = whole(user_feature="patient", examples_per_user=3, bands=2)
    text = guarantee(spec)
    assert "blanking all examples of one user (the number of users is public)" in text
    assert "clipped whole, by 3 examples of each in a step." in text
    assert "each user takes part in one step of 2 at most" in text
    assert privacy_unit(spec) == "user"
    assert privacy_unit(whole()) == privacy_unit({"privacy": PRIVACY}) == "example"
    automatic = {**spec, "clipping": ClippingSpec(mode="automatic").model_dump()}
    assert "the gradient of a user is scaled" in guarantee(automatic)


def test_quantile_says_that_its_count_is_paid_for():
    text = said(mode="quantile", target_quantile=0.7)
    assert "the 0.7 quantile" in text
    assert "standard deviation expected_batch_size / 20, and is part of what is accounted" in text
    assert "standard deviation 12.5, and is" in said(mode="quantile", count_noise_stddev=12.5)
