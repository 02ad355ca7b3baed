"""What the ledger hands out: budgets and reservations, as frozen values."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal

import sqlalchemy as sa

from accounting import _validate
from accounting.account import WHOLE, Verdict
from accounting.errors import BudgetExceeded, InvalidPrivacyParameter
from accounting.mechanism import Mechanism, mechanism_from_json
from accounting.policies import guarantee
from accounting.selection import Selection, selection_from_json
from accounting.terms import BudgetState, BudgetTerms, Spending

ReservationState = Literal["open", "closed", "released", "refused"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What may be spent on one protected data set.

    Attributes:
        name: Unique.
        dataset: What the data set is called.
        dataset_fingerprint: What tells it from others of that name.
        terms: What is promised; never changes.
        one_off: Whether the budget was made for one sweep alone.
        state: "active"; "frozen": nothing is reserved or charged until it is thawed; "retired":
            nothing ever again.
        shares: Part of the budget by team, in [0, 1]; empty where it is not divided.
        created_at: Seconds since the epoch.
    """

    name: str
    dataset: str
    dataset_fingerprint: str
    terms: BudgetTerms
    one_off: bool
    state: BudgetState
    shares: Mapping[str, float]
    created_at: float

    @property
    def guarantee(self) -> str:
        """The promise in one sentence."""
        terms = self.terms
        return guarantee(
            terms.policy,
            epsilon=terms.epsilon,
            delta=terms.delta,
            neighboring_relation=terms.neighboring_relation,
            privacy_unit=terms.privacy_unit,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data."""
        return {
            "name": self.name,
            "dataset": self.dataset,
            "dataset_fingerprint": self.dataset_fingerprint,
            **dataclasses.asdict(self.terms),
            "one_off": self.one_off,
            "state": self.state,
            "shares": dict(self.shares),
            "created_at": self.created_at,
            "guarantee": self.guarantee,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Something to be paid for, under a name of the caller's.

    Attributes:
        request_id: Names the request; repeated, it gets the same answer and costs nothing.
        mechanism: What would run: a mechanism, or a `Selection` under `private_selection`.

    Raises:
        InvalidPrivacyParameter: A field is of the wrong type.
    """

    request_id: str
    mechanism: Spending

    def __post_init__(self) -> None:
        _validate.name("request_id", self.request_id)
        if not isinstance(self.mechanism, Mechanism | Selection):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidPrivacyParameter(
                "mechanism", self.mechanism, "a Mechanism or a Selection"
            )

    @property
    def size(self) -> int:
        """What is reserved: iterations, or 1 for a selection, which runs or does not."""
        return self.mechanism.iterations if isinstance(self.mechanism, Mechanism) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reservation:
    """A decision, and what became of it.

    Attributes:
        request_id: The caller's name for it.
        budget: Name of the budget.
        team: Who pays; "" where the budget is not divided.
        mechanism: What was asked for.
        state: "open"; "closed"; "released" (nothing of it ever ran, and all of it was given
            back); or "refused".
        reserved: Iterations; of a selection, 1.
        charged: High-water mark of iterations that may have been seen.
        verdict: Why, with the numbers.
    """

    request_id: str
    budget: str
    team: str
    mechanism: Spending
    state: ReservationState
    reserved: int
    charged: int
    verdict: Verdict

    @property
    def refusal(self) -> BudgetExceeded:
        """The error that tells of the refusal."""
        v = self.verdict
        return BudgetExceeded(v.reason, v.requested, v.spent, v.reserved, v.limit, v.unit)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data."""
        return {
            "request_id": self.request_id,
            "budget": self.budget,
            "team": self.team,
            "mechanism": spending_to_json(self.mechanism),
            "state": self.state,
            "reserved": self.reserved,
            "charged": self.charged,
            "verdict": self.verdict.to_json(),
        }


@functools.lru_cache(maxsize=4096)
def spending_to_json(spending: Spending) -> dict[str, Any]:
    """Returns plain JSON data, for `spending_from_json`; shared, so not to be changed."""
    return spending.to_json()


def spending_from_json(data: Mapping[str, Any]) -> Spending:
    """Returns the mechanism or selection that `spending_to_json` wrote."""
    if "candidates" in data:
        return selection_from_json(data)
    return mechanism_from_json(data)


def budget_of(row: sa.Row[Any], shares: Mapping[str, int]) -> Budget:
    """Returns a row of the table of budgets as a value."""
    return Budget(
        name=row.name,
        dataset=row.dataset,
        dataset_fingerprint=row.dataset_fingerprint,
        terms=terms_of(row),
        one_off=row.one_off,
        state=row.state,
        shares={team: millionths / WHOLE for team, millionths in sorted(shares.items())},
        created_at=row.created_at,
    )


def terms_of(row: sa.Row[Any]) -> BudgetTerms:
    """Returns the terms in a row of the table of budgets."""
    return _terms(*(getattr(row, field.name) for field in dataclasses.fields(BudgetTerms)))


@functools.lru_cache(maxsize=1024)
def _terms(*values: Any) -> BudgetTerms:
    names = (field.name for field in dataclasses.fields(BudgetTerms))
    return BudgetTerms(**dict(zip(names, values, strict=True)))


def reservation_of(row: sa.Row[Any]) -> Reservation:
    """Returns a row of the table of reservations as a value."""
    return Reservation(
        request_id=row.request_id,
        budget=row.budget,
        team=row.team,
        mechanism=spending_from_json(json.loads(row.request)),
        state=row.state,
        reserved=row.reserved,
        charged=row.charged,
        verdict=Verdict.from_json(json.loads(row.verdict)),
    )
