"""What the ledger hands out: budgets and reservations, as frozen values."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any, Literal, cast

import sqlalchemy as sa

from accounting import _validate
from accounting.account import WHOLE, Claim, Verdict
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
        prefix: What was spent before on the parameters that the trial starts from, where it goes
            on from another: that one's steps so far, and whatever that one went on from. Under
            `per_trial` it counts as a list fixed beforehand does: see `docs/privacy.md`.

    Raises:
        InvalidPrivacyParameter: A field is of the wrong type.
    """

    request_id: str
    mechanism: Spending
    prefix: tuple[Mechanism, ...] = ()

    def __post_init__(self) -> None:
        _validate.name("request_id", self.request_id)
        if not isinstance(self.mechanism, Mechanism | Selection):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidPrivacyParameter(
                "mechanism", self.mechanism, "a Mechanism or a Selection"
            )
        if not _is_prefix(self.prefix):
            raise InvalidPrivacyParameter("prefix", self.prefix, "a tuple of Mechanism")

    @property
    def claim(self) -> Claim:
        """What is to be decided on."""
        return Claim(spending=self.mechanism, prefix=self.prefix)

    @property
    def size(self) -> int:
        """What is reserved: iterations, or 1 for a selection, which runs or does not."""
        return self.mechanism.iterations if isinstance(self.mechanism, Mechanism) else 1


def _is_prefix(value: object) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(one, Mechanism) for one in cast("tuple[object, ...]", value)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reservation:
    """A decision, and what became of it.

    Attributes:
        request: What was asked for at first; it may have been extended since.
        budget: Name of the budget.
        team: Who pays; "" where the budget is not divided.
        state: "open"; "closed"; "released" (nothing of it ever ran, and all of it was given
            back); or "refused".
        reserved: Iterations that may run in all; of a selection, 1.
        charged: High-water mark of iterations that may have been seen.
        committed: Iterations that count against the budget: those reserved while it is open, and
            those charged after it. Of a list that was begun nothing is given back, so there it
            is the most that was ever reserved.
        verdict: Why, with the numbers: of the newest extension that was admitted, else of the
            request, when it was asked last.
    """

    request: Request
    budget: str
    team: str
    state: ReservationState
    reserved: int
    charged: int
    committed: int
    verdict: Verdict

    @property
    def request_id(self) -> str:
        """The caller's name for it."""
        return self.request.request_id

    @functools.cached_property
    def mechanism(self) -> Spending:
        """What may run; of a refused one, what was asked for."""
        asked = self.request.mechanism
        if self.state == "refused" or self.reserved == self.request.size:
            return asked
        assert isinstance(asked, Mechanism)  # A selection is never extended.
        return asked.after(self.reserved)

    def claim(self, iterations: int) -> Claim:
        """What has to be decided where so many iterations are to run in all.

        Raises:
            InvalidPrivacyParameter: It is not of a mechanism, or `iterations` is no such number.
        """
        if not isinstance(self.mechanism, Mechanism):
            raise InvalidPrivacyParameter("mechanism", self.mechanism, "a Mechanism")
        return Claim(
            spending=self.mechanism.after(iterations),
            committed=self.committed,
            prefix=self.request.prefix,
        )

    @property
    def may_be_asked_again(self) -> bool:
        """Whether it was refused and steps that others give back may admit it.

        Only a Rényi filter decides on one request after the other and gives steps back.
        """
        return self.state == "refused" and self.verdict.unit == "rdp"

    @property
    def refusal(self) -> BudgetExceeded:
        """The error that tells of the refusal."""
        return refusal_of(self.verdict)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data."""
        return {
            "request_id": self.request_id,
            "budget": self.budget,
            "team": self.team,
            "mechanism": self.mechanism.to_json(),
            "prefix": [one.to_json() for one in self.request.prefix],
            "state": self.state,
            "reserved": self.reserved,
            "charged": self.charged,
            "committed": self.committed,
            "verdict": self.verdict.to_json(),
        }


def refusal_of(verdict: Verdict) -> BudgetExceeded:
    """Returns the error that tells of a refusal."""
    v = verdict
    return BudgetExceeded(v.reason, v.requested, v.spent, v.reserved, v.limit, v.unit)


@functools.lru_cache(maxsize=4096)
def request_to_json(mechanism: Spending, prefix: tuple[Mechanism, ...]) -> dict[str, Any]:
    """Returns what was asked for as plain JSON data; shared, so not to be changed.

    It is the mechanism or the selection, with a key ``prefix`` where there is one.
    """
    data = mechanism.to_json()
    return {**data, "prefix": [one.to_json() for one in prefix]} if prefix else data


@functools.lru_cache(maxsize=4096)
def request_from_text(text: str) -> tuple[Spending, tuple[Mechanism, ...]]:
    """Returns the mechanism or selection, and the prefix, whose JSON this is.

    Raises:
        InvalidPrivacyParameter: A field is unknown, missing or not allowed.
        ValueError: It is no JSON.
    """
    fields: dict[str, Any] = dict(json.loads(text))
    prefix = tuple(mechanism_from_json(one) for one in fields.pop("prefix", ()))
    if "candidates" in fields:
        return selection_from_json(fields), prefix
    return mechanism_from_json(fields), prefix


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
    mechanism, prefix = request_from_text(row.request)
    return Reservation(
        request=Request(request_id=row.request_id, mechanism=mechanism, prefix=prefix),
        budget=row.budget,
        team=row.team,
        state=row.state,
        reserved=row.reserved,
        charged=row.charged,
        committed=row.committed,
        verdict=Verdict.from_json(json.loads(row.verdict)),
    )
