"""Privacy accounting: what a DP-SGD run costs, whether a budget allows it, and what is spent.

    mechanism = DpSgdMechanism(noise_multiplier=1.1, sampling_prob=0.01, iterations=1000)
    epsilon(mechanism, delta=1e-5)
    calibrate_noise_multiplier(
        target_epsilon=3.0, target_delta=1e-5, sampling_prob=0.01, iterations=1000
    )

    ledger = Ledger("sqlite:///ledger.db")
    ledger.create_budget("scans", dataset="scans", dataset_fingerprint="v1", epsilon=8.0,
                         delta=1e-5, policy="open", neighboring_relation="add_or_remove_one")
    ledger.reserve("scans", mechanism, request_id="trial-1")   # or raises BudgetExceeded
    ledger.charge("trial-1", 100)
    ledger.settle("trial-1")

Every cost returned is an upper bound on the true one; every error means "do not run". Runs on the
host with numpy, scipy, SQLAlchemy and dp-accounting, which is loaded when first needed.
"""

from accounting.account import Account, Verdict
from accounting.accountants import Accountant, epsilon, epsilon_of_list
from accounting.calibration import (
    calibrate_expected_batch_size,
    calibrate_iterations,
    calibrate_noise_multiplier,
    calibrate_noise_of,
)
from accounting.errors import (
    AccountingError,
    BudgetExceeded,
    CalibrationError,
    DatabaseError,
    InvalidPrivacyParameter,
    LedgerError,
    LedgerTampered,
)
from accounting.ledger.journal import Entry, Head
from accounting.ledger.ledger import Ledger
from accounting.ledger.records import Budget, Request, Reservation
from accounting.ledger.status import BudgetStatus
from accounting.ledger.verification import Verification
from accounting.mechanism import (
    BandedMatrixFactorizationMechanism,
    DpSgdMechanism,
    Mechanism,
    NeighboringRelation,
    PrivacyUnit,
    SampledGaussian,
    TruncatedDpSgdMechanism,
    TruncatedSampledGaussian,
)
from accounting.policies import (
    GUARANTEES,
    POLICIES,
    Decision,
    Policy,
    PrivacyBudget,
    Sampling,
    check_per_trial,
    guarantee,
)
from accounting.renyi import best_rdp_order, default_rdp_order
from accounting.selection import Distribution, Selection, selection_epsilon
from accounting.terms import BudgetTerms

__all__ = [
    "GUARANTEES",
    "POLICIES",
    "Account",
    "Accountant",
    "AccountingError",
    "BandedMatrixFactorizationMechanism",
    "Budget",
    "BudgetExceeded",
    "BudgetStatus",
    "BudgetTerms",
    "CalibrationError",
    "DatabaseError",
    "Decision",
    "Distribution",
    "DpSgdMechanism",
    "Entry",
    "Head",
    "InvalidPrivacyParameter",
    "Ledger",
    "LedgerError",
    "LedgerTampered",
    "Mechanism",
    "NeighboringRelation",
    "Policy",
    "PrivacyBudget",
    "PrivacyUnit",
    "Request",
    "Reservation",
    "SampledGaussian",
    "Sampling",
    "Selection",
    "TruncatedDpSgdMechanism",
    "TruncatedSampledGaussian",
    "Verdict",
    "Verification",
    "best_rdp_order",
    "calibrate_expected_batch_size",
    "calibrate_iterations",
    "calibrate_noise_multiplier",
    "calibrate_noise_of",
    "check_per_trial",
    "default_rdp_order",
    "epsilon",
    "epsilon_of_list",
    "guarantee",
    "selection_epsilon",
]
