"""One budget and what is taken from it, in memory: the decision, without any database.

An `Account` is what a ledger loads to decide, and what `dp-sweeps check` fills in order to say
beforehand what the ledger would decide. Deciding changes nothing; `Account.commit` does.

How each policy decides:

    per_trial          epsilon of the trial by itself <= epsilon of the budget
    declared           epsilon of the list so far, composed with the request, <= epsilon; the list
                       is closed when the first of it is charged, and what never ran is not
                       given back then: otherwise later entries could depend on earlier results
    open               Rényi divergence at the budget's one order, summed over all that is taken;
                       a valid filter under any adaptivity, so unused steps are given back
    private_selection  as declared, for a list of selections

A budget that is divided among teams holds each to its share: of the divergence (`open`), or of
both epsilon and delta (`declared`, `private_selection`). Both add up to the whole by basic
composition, and each team then has a list of its own.

References:
    Feldman and Zrnic, "Individual Privacy Accounting via a Rényi Filter", 2021, Theorem 4.3,
    https://arxiv.org/abs/2008.11193
    Lécuyer, "Practical Privacy Filters and Odometers with Rényi Differential Privacy", 2021,
    https://arxiv.org/abs/2103.01379
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from accounting import _validate
from accounting.accountants import epsilon_of_list, fits
from accounting.errors import AccountingError, InvalidPrivacyParameter
from accounting.mechanism import Mechanism, Step
from accounting.policies import check_per_trial, shown_epsilon
from accounting.renyi import epsilon_of_rdp, parts_rdp, step_rdp
from accounting.selection import Selection, selection_epsilon
from accounting.terms import LIST_POLICIES, BudgetState, BudgetTerms, Spending

WHOLE = 1_000_000
"""Shares are counted in millionths, so that they add up exactly."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """A decision and the numbers that it rests on.

    Attributes:
        admitted: Whether the request fits.
        reason: Why, for a person.
        requested: What it takes on top of `spent` and `reserved`; infinite if that is unknown.
        spent: What can no longer be given back.
        reserved: What is promised and may yet be given back.
        limit: What may be taken in all.
        unit: "epsilon", or "rdp" under `open`.
        epsilon: What the trial costs by itself under `per_trial`; otherwise of all that is taken
            under the limit, this request included. At the delta of the limit.
    """

    admitted: bool
    reason: str
    requested: float
    spent: float
    reserved: float
    limit: float
    unit: str
    epsilon: float

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON data; null stands for infinity."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Verdict":
        """Returns the verdict that `to_json` wrote."""
        values: dict[str, Any] = {n: math.inf if v is None else v for n, v in data.items()}
        return cls(**values)


class Tally:
    """What one team, or everybody where a budget is not divided, has taken."""

    def __init__(self) -> None:
        self.committed: collections.Counter[Step] = collections.Counter()
        self.charged: collections.Counter[Step] = collections.Counter()
        self.selections: list[Selection] = []
        self.begun = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is taken."""
        return not (+self.committed or self.selections)


class Account:
    """A budget's terms, state, shares and tallies.

    Args:
        terms: What the budget promises.
        state: Whether it may be drawn on.
        shares: Millionths of the budget by team; empty where it is not divided.
    """

    def __init__(
        self,
        terms: BudgetTerms,
        *,
        state: BudgetState = "active",
        shares: Mapping[str, int] | None = None,
    ) -> None:
        self.terms = terms
        self.state: BudgetState = state
        self.shares = dict(shares or {})
        self.tallies: dict[str, Tally] = {}

    @property
    def fractions(self) -> dict[str, float]:
        """The shares as parts of one."""
        return {team: millionths / WHOLE for team, millionths in self.shares.items()}

    def tally(self, team: str) -> Tally:
        """What counts against a team's limit: its own, or everybody's where nothing is divided."""
        if self.shares:
            return self.tallies.get(team, Tally())
        if len(self.tallies) == 1:
            return next(iter(self.tallies.values()))
        whole = Tally()
        for tally in self.tallies.values():
            whole.committed.update(tally.committed)
            whole.charged.update(tally.charged)
            whole.selections.extend(tally.selections)
            whole.begun |= tally.begun
        return whole

    # -- deciding -----------------------------------------------------------------------------

    def decide(self, requests: Sequence[Spending], team: str = "") -> list[Verdict]:
        """Decides on requests that are made together; changes nothing.

        Under `declared` and `private_selection` they are one list, admitted or refused as a
        whole. Under the other policies each is decided in turn, those before it that were
        admitted included.

        Args:
            requests: What is to be paid for; each suits the terms.
            team: Who pays; "" where the budget is not divided.

        Returns:
            One verdict for each request. A cost that cannot be computed is a refusal.
        """
        try:
            match self.terms.policy:
                case "per_trial":
                    verdicts = [self._per_trial(request) for request in requests]
                case "open":
                    verdicts = self._open(requests, team)
                case "declared" | "private_selection":
                    verdicts = [self._list(requests, team)] * len(requests)
        except (AccountingError, ArithmeticError, MemoryError) as error:
            reason = f"the privacy cost could not be computed: {error}"
            verdicts = [self._refusal(reason)] * len(requests)
        obstacle = self._obstacle(team)
        if obstacle is None:
            return verdicts
        return [dataclasses.replace(v, admitted=False, reason=obstacle) for v in verdicts]

    def _refusal(self, reason: str) -> Verdict:
        is_open = self.terms.policy == "open"
        return Verdict(
            admitted=False,
            reason=reason,
            requested=math.inf,
            spent=0.0,
            reserved=0.0,
            limit=self.terms.rdp_limit if is_open else self.terms.epsilon,
            unit="rdp" if is_open else "epsilon",
            epsilon=math.inf,
        )

    def _obstacle(self, team: str) -> str | None:
        """What refuses every request, whatever it costs."""
        if self.state != "active":
            return f"the budget is {self.state}"
        if self.shares and team not in self.shares:
            teams = ", ".join(sorted(self.shares))
            asked = f"team {team!r} has no share" if team else "no team is named"
            return f"the budget is divided among teams ({teams}) and {asked}"
        sealed = self.tally(team).begun
        if sealed and self.terms.policy in LIST_POLICIES:
            return (
                "the declared list was closed when the first of it was trained: a longer one "
                "would depend on results; declare a new budget, or use the policy open"
            )
        return None

    def _share(self, team: str) -> float:
        return self.fractions.get(team, 0.0) if self.shares else 1.0

    def _per_trial(self, request: Spending) -> Verdict:
        assert isinstance(request, Mechanism)
        decision = check_per_trial(request, self.terms)
        return Verdict(
            admitted=decision.admitted,
            reason=decision.reason,
            requested=decision.epsilon,
            spent=0.0,
            reserved=0.0,
            limit=self.terms.epsilon,
            unit="epsilon",
            epsilon=decision.epsilon,
        )

    # -- open ---------------------------------------------------------------------------------

    def _open(self, requests: Sequence[Spending], team: str) -> list[Verdict]:
        terms, tally = self.terms, self.tally(team)
        limit = terms.rdp_limit * self._share(team)
        spent = parts_rdp(tally.charged, terms.order)
        taken = parts_rdp(tally.committed, terms.order)
        others = self.rdp_of_others(team) if self.shares else 0.0
        limit = min(limit, terms.rdp_limit - others)
        verdicts: list[Verdict] = []
        more: collections.Counter[Step] = collections.Counter()
        for request in requests:
            assert isinstance(request, Mechanism)
            count = self._count(request.step) + more[request.step] + request.repetitions
            if count > _validate.MAX_ITERATIONS:
                verdicts.append(
                    self._refusal(f"more than {_validate.MAX_ITERATIONS:.0e} of one step")
                )
                continue
            requested = request.repetitions * step_rdp(request.step, terms.order)
            after = (taken + requested) * (1 + 1e-15)  # rounded up, however many are added
            admitted = after <= limit
            total = epsilon_of_rdp(others + after, terms.delta, terms.order)
            if admitted:
                reason = f"epsilon {shown_epsilon(total)} of {terms.epsilon:.10g} is then taken"
            else:
                reason = self._why_not_open(request, limit - taken, requested, total)
            verdicts.append(
                Verdict(
                    admitted=admitted,
                    reason=reason,
                    requested=requested,
                    spent=spent,
                    reserved=max(0.0, taken - spent),
                    limit=limit,
                    unit="rdp",
                    epsilon=total,
                )
            )
            if admitted:
                taken = after
                more[request.step] += request.repetitions
        return verdicts

    def _count(self, step: Step) -> int:
        """How often a step is taken, by all teams."""
        return sum(tally.committed[step] for tally in self.tallies.values())

    def rdp_of_others(self, team: str) -> float:
        """Rényi divergence taken by all teams but one; under `open`."""
        return math.fsum(
            parts_rdp(tally.committed, self.terms.order)
            for name, tally in self.tallies.items()
            if name != team
        )

    def _why_not_open(
        self, request: Mechanism, free: float, requested: float, total: float
    ) -> str:
        terms = self.terms
        whose = "the team's share" if self.shares else "the budget"
        reason = (
            f"the trial needs {requested:.4g} of Rényi divergence (order {terms.order:.4g}) and "
            f"{max(0.0, free):.4g} of {whose} is free"
        )
        if not self.shares:
            reason = (
                f"epsilon {shown_epsilon(total)} would be taken of {terms.epsilon:.10g} at delta "
                f"{terms.delta:g}: {reason}"
            )
        repetitions = math.floor(max(0.0, free) / step_rdp(request.step, terms.order) * (1 - 1e-9))
        iterations = repetitions * (request.iterations // request.repetitions)
        if iterations:
            reason += f"; iterations <= {iterations} would fit"
        return reason

    # -- declared and private_selection -------------------------------------------------------

    def _limits(self, team: str) -> tuple[float, float]:
        share = self._share(team)
        return self.terms.epsilon * share, self.terms.delta * share

    def cost(self, tally: Tally, requests: Sequence[Spending], delta: float) -> float:
        """Epsilon of a tally's list with requests added; for `declared`, `private_selection`."""
        mechanisms = [r for r in requests if isinstance(r, Mechanism)]
        if self.terms.policy == "declared":
            parts = collections.Counter(tally.committed)
            for mechanism in mechanisms:
                parts[mechanism.step] += mechanism.repetitions
            return epsilon_of_list(+parts, delta=delta)
        selections = [*tally.selections, *(r for r in requests if isinstance(r, Selection))]
        return selection_epsilon(selections, delta=delta) if selections else 0.0

    def _list(self, requests: Sequence[Spending], team: str) -> Verdict:
        tally = self.tally(team)
        limit, delta = self._limits(team)
        if limit == 0:
            return self._refusal("the team's share is 0")
        before = self.cost(tally, (), delta)
        after = self.cost(tally, requests, delta)
        admitted = after <= limit
        of = f"{limit:.10g} at delta {delta:g}"
        listed = (
            f"the declared list costs epsilon {shown_epsilon(after)}"
            if self.terms.policy == "declared"
            else f"selection costs epsilon {shown_epsilon(after)}"
        )
        reason = f"{listed}, within {of}" if admitted else f"{listed}, which exceeds {of}"
        if not admitted and len(requests) > 1:
            first = self._longest_prefix(requests, tally, limit, delta)
            reason += f"; the first {first} of {len(requests)} would fit" if first else ""
        return Verdict(
            admitted=admitted,
            reason=reason,
            requested=max(0.0, after - before),
            spent=before if tally.begun else 0.0,
            reserved=0.0 if tally.begun else before,
            limit=limit,
            unit="epsilon",
            epsilon=after,
        )

    def _longest_prefix(
        self, requests: Sequence[Spending], tally: Tally, limit: float, delta: float
    ) -> int:
        fits, too_long = 0, len(requests)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.cost(tally, requests[:middle], delta) <= limit:
                fits = middle
            else:
                too_long = middle
        return fits

    # -- changing -----------------------------------------------------------------------------

    def commit(self, request: Spending, team: str = "") -> None:
        """Takes what a request asks for; the caller has seen it admitted."""
        tally = self.tallies.setdefault(team, Tally())
        if isinstance(request, Mechanism):
            tally.committed[request.step] += request.repetitions
        else:
            tally.selections.append(request)

    def check_share(self, team: str, millionths: int) -> None:
        """Checks that a team may be given a share, in the place of the one that it has.

        Raises:
            InvalidPrivacyParameter: It is more than the others leave, less than the team has
                taken, or the budget cannot be divided (any more), or the team's list is closed.
        """

        def refuse(allowed: str) -> InvalidPrivacyParameter:
            return InvalidPrivacyParameter("share", millionths / WHOLE, allowed)

        terms = self.terms
        if terms.policy == "per_trial":
            raise refuse("absent under 'per_trial', which holds for each trial: nothing to divide")
        left = WHOLE - sum(m for other, m in self.shares.items() if other != team)
        if terms.policy == "open":
            without_share = [name for name in self.tallies if name not in {*self.shares, team}]
            taken = math.fsum(
                parts_rdp(self.tallies[name].committed, terms.order) for name in without_share
            )
            left -= math.ceil(taken / terms.rdp_limit * WHOLE)
        elif not self.shares and not all(tally.is_empty for tally in self.tallies.values()):
            raise refuse(f"granted before the first reservation, under {terms.policy!r}")
        if millionths > left:
            raise refuse(f"at most {max(0, left) / WHOLE:g}, which is what the others leave")
        own = self.tallies.get(team, Tally())
        if own.begun and terms.policy in LIST_POLICIES and millionths != self.shares.get(team):
            raise refuse(
                "what it is, once the team's list is closed: another one would depend on results"
            )
        fraction = millionths / WHOLE
        if terms.policy == "open":
            fits = parts_rdp(own.committed, terms.order) <= terms.rdp_limit * fraction
        elif own.is_empty:
            if millionths and terms.delta * fraction < _validate.MIN_DELTA:
                raise refuse(f"at least {_validate.MIN_DELTA / terms.delta:g}, for its delta")
            fits = True
        else:
            delta = terms.delta * fraction
            fits = delta >= _validate.MIN_DELTA and (
                self.cost(own, (), delta) <= terms.epsilon * fraction
            )
        if not fits:
            raise refuse("at least what the team has taken already")

    def copies_that_fit(self, request: Spending, team: str = "", *, most: int = 1_000_000) -> int:
        """Returns how many more such requests would be admitted, made together.

        Args:
            request: A typical one.
            team: Who pays.
            most: Where to stop counting; under `per_trial` there is no end.

        Raises:
            InvalidPrivacyParameter: The request does not suit the budget.
        """
        self.terms.check_suits(request)
        if not self.decide([request], team)[0].admitted:
            return 0
        if self.terms.policy == "per_trial":
            return most
        fits, too_many = 1, most + 1
        while too_many - fits > 1:
            probe = min(2 * fits, most) if too_many > most else (fits + too_many) // 2
            if self._copies_fit(request, probe, team):
                fits = probe
            else:
                too_many = probe
        return fits

    def _copies_fit(self, request: Spending, copies: int, team: str) -> bool:
        if isinstance(request, Selection):
            return self.decide([request] * copies, team)[0].admitted
        parts = collections.Counter(self.tally(team).committed)
        parts[request.step] += copies * request.repetitions
        if parts[request.step] > _validate.MAX_ITERATIONS:
            return False
        if self.terms.policy == "open":
            limit = self.terms.rdp_limit * self._share(team)
            if self.shares:
                limit = min(limit, self.terms.rdp_limit - self.rdp_of_others(team))
            # Deciding on one after the other rounds up each time.
            return parts_rdp(parts, self.terms.order) * (1 + copies * 1e-15) <= limit
        limit, delta = self._limits(team)
        return fits(+parts, epsilon=limit, delta=delta)
