"""Names that others rely on, with the arguments that they pass."""

import inspect

import pytest

import accounting
import trainer
from sweeps import client
from trainer.clipping import clipped_grad

MECHANISM = accounting.DpSgdMechanism(noise_multiplier=1.5, sampling_prob=0.04, iterations=2250)


def test_epsilon():
    assert accounting.epsilon(MECHANISM, delta=1e-5, accountant="rdp") == pytest.approx(
        7.329, abs=1e-3
    )
    assert accounting.epsilon(MECHANISM, delta=1e-5, accountant="pld") == pytest.approx(
        6.769, abs=1e-3
    )


def test_calibration():
    noise = accounting.calibrate_noise_multiplier(
        target_epsilon=7.3293,
        target_delta=1e-5,
        sampling_prob=0.04,
        iterations=2250,
        accountant="rdp",
    )
    assert noise == pytest.approx(1.5, rel=2e-3)


def test_ledger():
    ledger = accounting.Ledger("sqlite://")
    ledger.create_budget(
        "b", dataset="d", dataset_fingerprint="f", epsilon=10.0, delta=1e-5, policy="open"
    )
    mechanism = accounting.DpSgdMechanism(
        noise_multiplier=1.5, sampling_prob=0.04, iterations=2250, neighboring_relation="zero_out"
    )
    ledger.reserve("b", mechanism, request_id="first")
    assert ledger.charge("first", 1000).charged == 1000
    with pytest.raises(accounting.BudgetExceeded) as refused:
        ledger.reserve("b", mechanism, request_id="second")
    error = refused.value
    assert error.requested + error.spent + error.reserved > error.limit > 0
    assert ledger.settle("first").state == "closed"
    assert ledger.verify().ok
    assert issubclass(accounting.InvalidPrivacyParameter, ValueError)
    ledger.close()


def test_clipped_grad_is_where_it_is_expected():
    assert next(iter(inspect.signature(clipped_grad).parameters)) == "fun"


@pytest.mark.parametrize("room", [accounting, trainer, client], ids=lambda room: room.__name__)
def test_every_exported_name_exists(room):
    for name in room.__all__:
        assert getattr(room, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'surprise'"):
        _ = trainer.surprise
