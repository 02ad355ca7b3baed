"""Privacy mathematics: what a DP-SGD run costs, and whether a budget allows it.

    mechanism = DpSgdMechanism(noise_multiplier=1.1, sampling_prob=0.01, iterations=1000)
    epsilon(mechanism, delta=1e-5)
    calibrate_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sampling_prob=0.01, iterations=1000
    )
    check_per_trial(mechanism, PrivacyBudget(epsilon=3.0, delta=1e-5)).reason

Every number returned is an upper bound on the true cost; every error means "do not run". Runs on
the host with numpy, scipy and dp-accounting, which is loaded when first needed.
"""

from accounting.accountants import Accountant, epsilon
from accounting.calibration import calibrate_noise_multiplier
from accounting.errors import AccountingError, CalibrationError, InvalidPrivacyParameter
from accounting.mechanism import DpSgdMechanism, NeighboringRelation
from accounting.policies import (
    GUARANTEES,
    Decision,
    PrivacyBudget,
    check_per_trial,
    guarantee,
)

__all__ = [
    "GUARANTEES",
    "Accountant",
    "AccountingError",
    "CalibrationError",
    "Decision",
    "DpSgdMechanism",
    "InvalidPrivacyParameter",
    "NeighboringRelation",
    "PrivacyBudget",
    "calibrate_noise_multiplier",
    "check_per_trial",
    "epsilon",
    "guarantee",
]
