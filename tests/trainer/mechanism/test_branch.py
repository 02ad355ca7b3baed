import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.mechanism.branch import Branch

SIZES = st.none() | st.integers(1, 1000)
BRANCHES = st.builds(
    Branch,
    st.integers(0, 2**64 - 1).map(lambda number: f"{number:016x}"),
    st.integers(0, 1000),
    origin=st.none() | st.text(),
    program=st.none() | st.text(),
    engine=st.none() | st.sampled_from(["vmap", "two_pass"]),
    microbatch_size=SIZES,
    asked_microbatch_size=SIZES,
)


@given(BRANCHES)
def test_it_goes_through_json(branch):
    assert Branch.from_json(json.loads(json.dumps(branch.to_json()))) == branch


@pytest.mark.parametrize(
    "change",
    [
        {"branch_id": "../secrets/else"},
        {"branch_id": "F" * 16},
        {"branch_id": None},
        {"start_step": -1},
        {"start_step": None},
        {"start_step": 1.0},
        {"start_step": True},
        {"origin": 1},
        {"program": b"x"},
        {"microbatch_size": 0},
        {"asked_microbatch_size": "8"},
        {"surprise": 1},
    ],
    ids=str,
)
def test_what_is_no_branch_is_refused(change):
    data = {**Branch("0" * 16, 3).to_json(), **change}
    with pytest.raises(ConfigError, match=next(iter(change))):
        Branch.from_json(data)


@pytest.mark.parametrize(
    ("engine", "size", "same"),
    [
        ("auto", None, True),
        ("vmap", None, True),
        ("auto", 64, True),  # as it was asked for
        ("auto", 16, True),  # as it became, since 64 did not fit
        ("two_pass", None, False),
        ("auto", 32, False),
        ("auto", 128, False),
    ],
)
def test_what_a_configuration_leaves_open_is_the_branchs(engine, size, same):
    branch = Branch("0" * 16, 0, engine="vmap", microbatch_size=16, asked_microbatch_size=64)
    assert branch.computes_as(engine, size) == same
    whole_rows = dataclasses.replace(branch, microbatch_size=None, asked_microbatch_size=None)
    assert not whole_rows.computes_as(engine, 16)
