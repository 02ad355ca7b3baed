"""Nonsense gets an answer or an `AccountingError`, never another exception, and changes no row."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from accounting import (
    AccountingError,
    BandedMatrixFactorizationMechanism,
    BudgetExceeded,
    BudgetTerms,
    DpSgdMechanism,
    Head,
    InvalidPrivacyParameter,
    Ledger,
    Mechanism,
    PrivacyBudget,
    Request,
    Selection,
    TruncatedDpSgdMechanism,
    best_rdp_order,
    calibrate_expected_batch_size,
    calibrate_iterations,
    calibrate_noise_multiplier,
    calibrate_noise_of,
    check_per_trial,
    default_rdp_order,
    epsilon,
    epsilon_of_list,
    selection_epsilon,
)
from accounting.database.connection import reading
from accounting.ledger.tables import metadata

NO_NUMBERS = [
    *(math.nan, math.inf, -math.inf, -1, -0.0, 10**400, -(10**400), True, False),
    *(None, "3", "", b"3", 1j, [1], (1,), {}, object(), Fraction(1, 3), Decimal(1)),
    *(np.float64("nan"), np.float32("inf"), np.bool_(True), np.array(1), np.array(0.5)),
    *(np.array([0.5, 0.5]), np.datetime64("NaT"), np.str_("3"), np.complex128(1)),
]
"""What no number here may be."""

ODD_NUMBERS = [
    *(0, 5e-324, 1e-300, 1e-12, 1e12, 1e300, 1.0, 3.0, 10**12, 10**12 + 1, 2**63),
    *(np.float16(0.1), np.float32(0.1), np.float64(1e-5), np.float16(6e-8), np.longdouble(0.5)),
    *(np.int8(3), np.uint64(2**64 - 1), np.int64(-1), np.uint8(0)),
]
"""What some of them may be."""

ODD_TEXTS = [
    *("nobody", "\ud800", "b\udfff", "b\0", "b\n", "\x1b[2J", "\u202eb", "ß" * 300, "b" * 161),
    *(" b", "b;--", "' OR 1=1 --", "%", np.str_("b")),
]
ODD = [*NO_NUMBERS, *ODD_NUMBERS, *ODD_TEXTS]

TRIAL = DpSgdMechanism(
    noise_multiplier=2.0, sampling_prob=0.05, iterations=10, neighboring_relation="zero_out"
)
SELECTION = Selection(candidates=(TRIAL,), distribution="geometric", mean=3)
REQUESTS = [
    [],
    [Request(request_id="n1", mechanism=TRIAL), Request(request_id="n2", mechanism=TRIAL)],
    [Request(request_id="n1", mechanism=TRIAL), Request(request_id="n1", mechanism=TRIAL)],
    [Request(request_id="n3", mechanism=SELECTION)],
    [TRIAL],
    [None],
    "n1",
]

BUDGETS = ["b", "list", "best", "divided"]
METHODS: dict[str, dict[str, list[Any]]] = {
    "create_budget": {
        "name": ["b", "new", "new2"],
        "dataset": ["d"],
        "dataset_fingerprint": ["f"],
        "epsilon": [4.0, 1],
        "delta": [1e-5],
        "policy": ["open", "declared", "per_trial", "private_selection"],
        "neighboring_relation": ["zero_out"],
        "privacy_unit": ["example"],
        "rdp_order": [None, 8.0],
        "one_off": [True, False],
        "by": ["me", ""],
    },
    "grant": {"name": BUDGETS, "team": ["a", "c"], "share": [0.5, 0, 1, 1e-9], "by": [""]},
    "freeze": {"name": BUDGETS, "by": [""], "reason": [""]},
    "thaw": {"name": BUDGETS, "by": [""], "reason": [""]},
    "retire": {"name": BUDGETS, "by": [""], "reason": [""]},
    "budget": {"name": BUDGETS},
    "budgets": {},
    "status": {"name": BUDGETS},
    "account": {"name": BUDGETS},
    "reserve": {
        "budget": BUDGETS,
        "mechanism": [TRIAL, SELECTION, TRIAL.after(10**12)],
        "request_id": ["r", "n1", "n2"],
        "prefix": [(), (TRIAL,), (TRIAL.after(2), TRIAL)],
        "team": ["", "a"],
        "dataset_fingerprint": [None, "f", "g"],
    },
    "reserve_together": {
        "budget": BUDGETS,
        "requests": REQUESTS,
        "team": ["", "a"],
        "dataset_fingerprint": [None],
    },
    "ask_again": {"request_id": ["r", "no", "n1", "n2"]},
    "charge": {"request_id": ["r", "n1"], "iterations": [0, 1, 5, 10, 11]},
    "extend": {"request_id": ["r", "n1"], "iterations": [1, 5, 10, 20, 10**12]},
    "settle": {"request_id": ["r", "n1"]},
    "reservation": {"request_id": ["r", "n1"]},
    "reservation_ids": {"budget": BUDGETS, "state": [None, "open", "refused"]},
    "entries": {"budget": [None, *BUDGETS], "newest": [None, 0, 1, 100]},
    "inspect": {"budget": [None, *BUDGETS], "newest": [None, 0, 1, 100]},
    "head": {},
    "verify": {"expected": [None, Head(1, "a" * 64), Head(0, "0" * 64), Head(10**400, "x")]},
}


def test_every_public_method_is_fuzzed() -> None:
    own = {n for n, value in vars(Ledger).items() if not n.startswith("_") and callable(value)}
    assert own - {"transaction", "close"} == set(METHODS)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    method = draw(st.sampled_from(sorted(METHODS)))
    odd = draw(st.integers(0, 3))
    arguments = {
        name: draw(st.sampled_from(ODD if draw(st.integers(0, 5)) < odd else good))
        for name, good in METHODS[method].items()
    }
    return method, arguments


def small_ledger() -> Ledger:
    ledger = Ledger("sqlite://")
    policies: dict[str, Any] = {
        "b": "open",
        "list": "declared",
        "best": "private_selection",
        "divided": "open",
    }
    for name, policy in policies.items():
        ledger.create_budget(
            name, dataset="d", dataset_fingerprint="f", epsilon=4.0, delta=1e-5, policy=policy
        )
    ledger.grant("divided", "a", 0.5)
    ledger.reserve("b", TRIAL, request_id="r")
    for name, budget in (("no", "b"), ("n2", "list")):
        with contextlib.suppress(BudgetExceeded):
            ledger.reserve(budget, TRIAL.after(10**12), request_id=name)
    return ledger


def everything(ledger: Ledger) -> dict[str, list[str]]:
    with reading(ledger.engine) as connection:
        return {
            table.name: sorted(map(repr, connection.execute(sa.select(table))))
            for table in metadata.sorted_tables
        }


def attempt(ledger: Ledger, method: str, arguments: dict[str, Any]) -> None:
    before, caught = everything(ledger), None
    try:
        answer = getattr(ledger, method)(**arguments)
        if method in ("entries", "inspect"):
            list(answer)
    except AccountingError as error:
        caught = error
    if isinstance(caught, BudgetExceeded):
        assert everything(ledger)["ledger_tallies"] == before["ledger_tallies"]
    elif caught is not None:
        assert everything(ledger) == before
        assert str(caught)


@pytest.mark.slow
@settings(max_examples=300)
@given(plan=st.lists(calls(), min_size=4, max_size=12))
def test_nonsense_raises_accounting_errors_and_changes_nothing(
    plan: list[tuple[str, dict[str, Any]]],
) -> None:
    with contextlib.closing(small_ledger()) as ledger:
        for method, arguments in plan:
            attempt(ledger, method, arguments)
        found = ledger.verify()
        assert found.ok, found.problems
        for budget in ledger.budgets():
            ledger.status(budget.name)


@pytest.mark.slow
def test_each_argument_alone_may_be_anything() -> None:
    with contextlib.closing(small_ledger()) as ledger:
        for method, arguments in METHODS.items():
            usual = {name: values[0] for name, values in arguments.items()}
            for name in arguments:
                for odd in ODD:
                    attempt(ledger, method, {**usual, name: odd})
        assert ledger.verify().ok


# -- values and functions --------------------------------------------------------------------

PARTS = {TRIAL.step: 10}
CALLABLES: dict[Callable[..., Any], dict[str, Any]] = {
    BudgetTerms: {"epsilon": 4.0, "delta": 1e-5, "policy": "open", "rdp_order": 8.0},
    PrivacyBudget: {"epsilon": 4.0, "delta": 1e-5},
    DpSgdMechanism: {"noise_multiplier": 1.0, "sampling_prob": 0.1, "iterations": 10},
    TruncatedDpSgdMechanism: {
        "noise_multiplier": 1.0,
        "sampling_prob": 0.1,
        "iterations": 10,
        "num_examples": 1000,
        "truncated_batch_size": 200,
    },
    BandedMatrixFactorizationMechanism: {
        "noise_multiplier": 1.0,
        "sampling_prob": 0.1,
        "iterations": 10,
        "bands": 3,
    },
    Selection: {
        "candidates": (TRIAL,),
        "distribution": "negative_binomial",
        "mean": 3.0,
        "shape": 1.0,
    },
    Request: {"request_id": "r", "mechanism": TRIAL, "prefix": (TRIAL,)},
    TRIAL.after: {"iterations": 10},
    epsilon: {"mechanism": TRIAL, "delta": 1e-5, "accountant": "rdp"},
    epsilon_of_list: {"parts": PARTS, "delta": 1e-5, "accountant": "rdp"},
    check_per_trial: {
        "mechanism": TRIAL,
        "budget": PrivacyBudget(epsilon=9.0, delta=1e-5),
        "prefix": (TRIAL,),
    },
    selection_epsilon: {"selections": [SELECTION], "delta": 1e-5},
    default_rdp_order: {"epsilon": 4.0, "delta": 1e-5},
    best_rdp_order: {"epsilon": 4.0, "delta": 1e-5, "parts": PARTS},
    calibrate_noise_multiplier: {
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "sampling_prob": 0.01,
        "iterations": 100,
        "accountant": "rdp",
    },
    calibrate_noise_of: {
        "mechanism": TRIAL,
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "accountant": "rdp",
    },
    calibrate_iterations: {
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "noise_multiplier": 1.0,
        "sampling_prob": 0.01,
        "accountant": "rdp",
    },
    calibrate_expected_batch_size: {
        "target_epsilon": 3.0,
        "target_delta": 1e-5,
        "noise_multiplier": 1.0,
        "num_examples": 1000,
        "iterations": 100,
        "accountant": "rdp",
    },
}
FIELDS = [(function, name) for function, usual in CALLABLES.items() for name in usual]
NUMBERS = [field for field in FIELDS if isinstance(CALLABLES[field[0]][field[1]], float | int)]


@pytest.mark.slow
@pytest.mark.parametrize(("function", "name"), FIELDS)
def test_each_field_alone_may_be_anything(function: Callable[..., Any], name: str) -> None:
    usual = CALLABLES[function]
    function(**usual)
    for odd in ODD:
        with contextlib.suppress(AccountingError):
            function(**{**usual, name: odd})


@pytest.mark.parametrize(("function", "name"), NUMBERS)
def test_what_is_no_number_is_refused_by_name(function: Callable[..., Any], name: str) -> None:
    for bad in NO_NUMBERS:
        if bad is None and name in ("rdp_order", "shape"):
            continue  # it stands for a good one, or for none
        with pytest.raises(InvalidPrivacyParameter, match="must be") as caught:
            function(**{**CALLABLES[function], name: bad})
        assert caught.value.field == name


@pytest.mark.slow
def test_scalars_of_jax_are_refused_or_taken_for_what_they_are() -> None:
    import jax.numpy as jnp

    scalars = [jnp.float32(0.1), jnp.int32(3), jnp.bool_(True), jnp.array(jnp.nan)]
    for function, name in FIELDS:
        for scalar in scalars:
            with contextlib.suppress(AccountingError):
                function(**{**CALLABLES[function], name: scalar})
    with contextlib.closing(small_ledger()) as ledger:
        for method, arguments in METHODS.items():
            usual = {name: values[0] for name, values in arguments.items()}
            for name in arguments:
                for scalar in scalars:
                    attempt(ledger, method, {**usual, name: scalar})
        assert ledger.verify().ok


@pytest.mark.slow
@settings(max_examples=300)
@given(
    noise=st.floats(-308, 308).map(lambda power: 10**power) | st.floats(0.3, 10),
    sampling_prob=st.floats(-320, 0).map(lambda power: 10**power) | st.floats(0, 1),
    iterations=st.integers(1, 10**12) | st.integers(1, 1000),
    epsilon=st.floats(-3, 300).map(lambda power: 10**power) | st.floats(0, 100),
    delta=st.floats(-10, -0.001).map(lambda power: 10**power) | st.floats(),
    copies=st.integers(1, 5),
)
def test_open_budgets_decide_on_whatever_numbers_are_given(
    noise: float, sampling_prob: float, iterations: int, epsilon: float, delta: float, copies: int
) -> None:
    try:
        mechanism: Mechanism = dataclasses.replace(
            TRIAL, noise_multiplier=noise, sampling_prob=sampling_prob, iterations=iterations
        )
        terms = BudgetTerms(epsilon=epsilon, delta=delta, policy="open")
    except InvalidPrivacyParameter:
        return
    with contextlib.closing(Ledger("sqlite://")) as ledger:
        ledger.create_budget(
            "b", dataset="d", dataset_fingerprint="f", policy="open", epsilon=epsilon, delta=delta
        )
        for number in range(copies):
            with contextlib.suppress(BudgetExceeded):
                ledger.reserve("b", mechanism, request_id=f"r{number}")
        level = ledger.status("b").level
        assert level.epsilon <= terms.epsilon
        assert level.spent + level.reserved <= level.limit
        assert ledger.verify().ok
