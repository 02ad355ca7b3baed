"""What a budget promises, and what it can pay for."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal

from accounting import _validate
from accounting.errors import InvalidPrivacyParameter
from accounting.mechanism import (
    NEIGHBORING_RELATIONS,
    PRIVACY_UNITS,
    Mechanism,
    NeighboringRelation,
    PrivacyUnit,
)
from accounting.policies import POLICIES, Policy, PrivacyBudget
from accounting.renyi import default_rdp_order, rdp_limit, validated_order
from accounting.selection import Selection

BudgetState = Literal["active", "frozen", "retired"]
Spending = Mechanism | Selection
"""What may be paid for: a trial, or a private selection among many."""

LIST_POLICIES: tuple[Policy, ...] = ("declared", "private_selection")
"""The policies whose list is closed when the first of it is charged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetTerms(PrivacyBudget):
    """What a budget promises. Never changes.

    Attributes:
        policy: What the promise covers; see `accounting.policies`.
        neighboring_relation: See `Mechanism`.
        privacy_unit: See `Mechanism`.
        rdp_order: For `open`, the order of the Rényi filter; None takes a good one. For the other
            policies None.
    """

    policy: Policy
    neighboring_relation: NeighboringRelation = "zero_out"
    privacy_unit: PrivacyUnit = "example"
    rdp_order: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _validate.one_of("policy", self.policy, POLICIES)
        _validate.one_of("neighboring_relation", self.neighboring_relation, NEIGHBORING_RELATIONS)
        _validate.one_of("privacy_unit", self.privacy_unit, PRIVACY_UNITS)
        if self.policy != "open":
            if self.rdp_order is not None:
                raise InvalidPrivacyParameter(
                    "rdp_order", self.rdp_order, f"None under {self.policy!r}"
                )
            return
        order = self.rdp_order
        if order is None:
            order = default_rdp_order(self.epsilon, self.delta)
        object.__setattr__(self, "rdp_order", validated_order(order))
        if not self.rdp_limit > 0:
            raise InvalidPrivacyParameter(
                "rdp_order",
                self.rdp_order,
                f"an order at which something fits into epsilon {self.epsilon:g} at delta "
                f"{self.delta:g}; a larger one",
            )

    @property
    def order(self) -> float:
        """The order of an `open` budget."""
        assert self.rdp_order is not None  # `open` alone comes here, and it has one.
        return self.rdp_order

    @functools.cached_property
    def rdp_limit(self) -> float:
        """The Rényi divergence that an `open` budget holds."""
        return rdp_limit(self.epsilon, self.delta, self.order)

    def check_suits(self, spending: object, prefix: Sequence[Mechanism] = ()) -> Spending:
        """Returns what is to be paid for, if this budget can pay for such things at all.

        Args:
            spending: What is to be paid for.
            prefix: What was spent before on the parameters that it starts from.

        Raises:
            InvalidPrivacyParameter: It is neither a mechanism nor a selection, not the one that
                the policy takes, or it or the prefix is of another neighbouring relation or
                privacy unit.
        """
        wanted = Selection if self.policy == "private_selection" else Mechanism
        if not isinstance(spending, wanted):
            raise InvalidPrivacyParameter(
                "mechanism", spending, f"a {wanted.__name__} under {self.policy!r}"
            )
        one = spending.candidates[0] if isinstance(spending, Selection) else spending
        for field in ("neighboring_relation", "privacy_unit"):
            own = getattr(self, field)
            for mechanism in (one, *prefix):
                given = getattr(mechanism, field)
                if given != own:
                    raise InvalidPrivacyParameter(field, given, f"{own!r}, as of the budget")
        return spending
