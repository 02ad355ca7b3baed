"""From the size of batches to the probability of joining one."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.training.plan import batches_of

UNITS = st.integers(1, 10**7)
BANDS = st.integers(1, 64)


@given(st.integers(1, 10**7), UNITS, BANDS)
def test_a_whole_size_is_rounded_once_and_none_exceeds_a_group(size, num_units, bands):
    prob = Fraction(size * bands, num_units)
    if prob > 1:
        with pytest.raises(ConfigError, match=f"^expected_batch_size={size}: allowed is a numb"):
            batches_of(size, num_units, bands)
    else:
        assert batches_of(size, num_units, bands) == (float(prob), size)


@given(UNITS, BANDS)
def test_full_is_everybody_in_a_group(num_units, bands):
    assert batches_of("full", num_units, bands) == (1.0, num_units / bands)


def test_a_refusal_says_what_is_allowed():
    with pytest.raises(ConfigError) as refused:
        batches_of(300, 1000, 4)
    assert str(refused.value) == (
        "expected_batch_size=300: allowed is a number in (0, 250], for so many units there are in "
        "each of 4 groups; or full"
    )
