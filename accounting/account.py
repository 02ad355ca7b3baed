"""One budget and what is taken from it, in memory: the decision, without any database.

An `Account` is what a ledger loads to decide, and what `dp-sweeps check` fills in order to say
beforehand what the ledger would decide. Deciding changes nothing; `Account.commit` does.

How each policy decides:

    per_trial          epsilon of the trial by itself, with what was spent before on the
                       parameters that it starts from, <= epsilon of the budget
    declared           epsilon of the list so far, composed with the request, <= epsilon; the list
                       is closed when the first of it is charged, and what never ran is not
                       given back then: otherwise later entries could depend on earlier results
    open               Rényi divergence at the budget's one order, summed over all that is taken;
                       a valid filter under any adaptivity, so unused steps are given back
    private_selection  as declared, for a list of selections

A trial that is to run longer asks for the whole of it, of which a part counts already: `per_trial`
decides on the whole, the others on what it adds. Under `declared` a trial that was stopped may so
go on up to what was declared, which was never given back, though its list is closed. What a trial
goes on from is in the sum (`open`) or on the list (`declared`) already, and does not count again;
where it is not, the trial is refused.

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
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from accounting import _validate
from accounting.accountants import epsilon_of_list, fits
from accounting.errors import AccountingError, InvalidPrivacyParameter
from accounting.mechanism import Mechanism, Step, composed
from accounting.policies import MOST_HINTS, check_per_trial, shown_epsilon
from accounting.renyi import epsilon_of_rdp, parts_rdp, step_rdp
from accounting.selection import Selection, selection_epsilon
from accounting.terms import LIST_POLICIES, BudgetState, BudgetTerms, Spending

WHOLE = 1_000_000
"""Shares are counted in millionths, so that they add up exactly."""

_NOT_COUNTED = (
    "what was spent before on the parameters that the trial starts from does not count in this "
    "budget, so what it promises would not hold for the trial"
)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """Something to be decided on, where it is not new or does not start from nothing.

    Attributes:
        spending: What is to be paid for; the whole of it.
        committed: Iterations of it that count already.
        prefix: What was spent before on the parameters that it starts from.
    """

    spending: Spending
    committed: int = 0
    prefix: tuple[Mechanism, ...] = ()

    @functools.cached_property
    def more(self) -> int:
        """What it adds to what counts already: repetitions of its step; of a selection, 1."""
        if isinstance(self.spending, Selection):
            return 1
        before = self.spending.repetitions_after(self.committed)
        return max(0, self.spending.repetitions - before)


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

    def decide(
        self, requests: Sequence[Spending | Claim], team: str = "", *, together: int = 1
    ) -> list[Verdict]:
        """Decides on requests that are made together; changes nothing.

        Under `declared` and `private_selection` they are one list, admitted or refused as a
        whole. Under the other policies each is decided in turn, those before it that were
        admitted included.

        Args:
            requests: What is to be paid for; each suits the terms. A `Claim` where a part of it
                counts already, or it goes on from another trial.
            team: Who pays; "" where the budget is not divided.
            together: So many requests at a time, from the first on, are admitted together or not
                at all.

        Returns:
            One verdict for each request. A cost that cannot be computed is a refusal.

        Raises:
            InvalidPrivacyParameter: `together` does not divide how many there are.
        """
        if len(requests) % _validate.count("together", together):
            raise InvalidPrivacyParameter("together", together, f"a divisor of {len(requests)}")
        claims = [r if isinstance(r, Claim) else Claim(spending=r) for r in requests]
        try:
            match self.terms.policy:
                case "per_trial":
                    verdicts = self._per_trial(claims)
                case "open":
                    verdicts = self._open(claims, team, together)
                case "declared" | "private_selection":
                    verdicts = [self._list(claims, team)] * len(claims)
        except (AccountingError, ArithmeticError, MemoryError) as error:
            reason = f"the privacy cost could not be computed: {error}"
            verdicts = [self.refusal(reason)] * len(claims)
        obstacle = self._obstacle(claims, team)
        if obstacle is None:
            return _all_or_none(verdicts, together)
        return [dataclasses.replace(v, admitted=False, reason=obstacle) for v in verdicts]

    def refusal(self, reason: str) -> Verdict:
        """Returns a refusal of something whose cost does not matter or is not known."""
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

    def _obstacle(self, claims: Sequence[Claim], team: str) -> str | None:
        """What refuses every request, whatever it costs."""
        if self.state != "active":
            return f"the budget is {self.state}"
        if self.shares and team not in self.shares:
            teams = ", ".join(sorted(self.shares))
            asked = f"team {team!r} has no share" if team else "no team is named"
            return f"the budget is divided among teams ({teams}) and {asked}"
        if self.terms.policy not in LIST_POLICIES:
            return None
        if self.tally(team).begun and any(claim.more for claim in claims):
            return (
                "the declared list was closed when the first of it was trained: a longer one "
                "would depend on results; declare a new budget, or use the policy open"
            )
        if self.terms.policy == "private_selection":
            going_on = any(claim.prefix for claim in claims)
            return "under private_selection no trial goes on from another" if going_on else None
        if not any(claim.prefix for claim in claims):
            return None
        # Nothing has run when a list is made, so here it need not be spent yet, only listed.
        listed = _together(tally.committed for tally in self.tallies.values())
        trials = [claim.spending for claim in claims if isinstance(claim.spending, Mechanism)]
        for trial, claim in zip(trials, claims, strict=True):
            listed[trial.step] += claim.more
        for trial, claim in zip(trials, claims, strict=True):
            if claim.prefix and not _holds(listed, (*claim.prefix, trial)):
                return _NOT_COUNTED
        return None

    def _share(self, team: str) -> float:
        return self.fractions.get(team, 0.0) if self.shares else 1.0

    def _per_trial(self, claims: Sequence[Claim]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        hints = MOST_HINTS
        for claim in claims:
            assert isinstance(claim.spending, Mechanism)
            decision = check_per_trial(
                claim.spending, self.terms, prefix=claim.prefix, hint=hints > 0
            )
            hints -= not decision.admitted
            verdicts.append(
                Verdict(
                    admitted=decision.admitted,
                    reason=decision.reason,
                    requested=decision.epsilon,
                    spent=0.0,
                    reserved=0.0,
                    limit=self.terms.epsilon,
                    unit="epsilon",
                    epsilon=decision.epsilon,
                )
            )
        return verdicts

    # -- open ---------------------------------------------------------------------------------

    def free_rdp(self, team: str = "") -> float:
        """Rényi divergence that may be taken now; under `open`. 0 while the budget is frozen.

        Args:
            team: Who would pay; "" where the budget is not divided.
        """
        if self.state != "active":
            return 0.0
        others = self.rdp_of_others(team) if self.shares else 0.0
        taken = parts_rdp(self.tally(team).committed, self.terms.order)
        return max(0.0, self._rdp_limit(team, others) - taken)

    def _rdp_limit(self, team: str, others: float) -> float:
        return min(self.terms.rdp_limit * self._share(team), self.terms.rdp_limit - others)

    def _open(self, claims: Sequence[Claim], team: str, together: int) -> list[Verdict]:
        terms, tally = self.terms, self.tally(team)
        spent = parts_rdp(tally.charged, terms.order)
        taken = parts_rdp(tally.committed, terms.order)
        others = self.rdp_of_others(team) if self.shares else 0.0
        limit = self._rdp_limit(team, others)
        verdicts: list[Verdict] = []
        more: collections.Counter[Step] = collections.Counter()
        for start in range(0, len(claims), together):
            group: list[Verdict] = []
            taken_before, added = taken, collections.Counter[Step]()
            for claim in claims[start : start + together]:
                assert isinstance(claim.spending, Mechanism)
                step = claim.spending.step
                count = self._count(step) + more[step] + added[step] + claim.more
                if count > _validate.MAX_ITERATIONS:
                    reason = f"more than {_validate.MAX_ITERATIONS:.0e} of one step"
                    group.append(self.refusal(reason))
                    continue
                if claim.prefix and not _holds(self._charged(), claim.prefix):
                    group.append(self.refusal(_NOT_COUNTED))
                    continue
                requested = claim.more * step_rdp(step, terms.order)
                after = (taken + requested) * (1 + 1e-15)  # rounded up, however many are added
                admitted = after <= limit or not claim.more
                total = epsilon_of_rdp(others + after, terms.delta, terms.order)
                if admitted:
                    reason = (
                        f"epsilon {shown_epsilon(total)} of {terms.epsilon:.10g} is then taken"
                    )
                else:
                    reason = self._why_not_open(claim, limit - taken, requested, total)
                group.append(
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
                    added[step] += claim.more
            if all(verdict.admitted for verdict in group):
                more.update(added)
            else:
                taken = taken_before
            verdicts += group
        return verdicts

    def _count(self, step: Step) -> int:
        """How often a step is taken, by all teams."""
        return sum(tally.committed[step] for tally in self.tallies.values())

    def _charged(self) -> collections.Counter[Step]:
        """How often each step has run, for all teams."""
        return _together(tally.charged for tally in self.tallies.values())

    def rdp_of_others(self, team: str) -> float:
        """Rényi divergence taken by all teams but one; under `open`."""
        return math.fsum(
            parts_rdp(tally.committed, self.terms.order)
            for name, tally in self.tallies.items()
            if name != team
        )

    def _why_not_open(self, claim: Claim, free: float, requested: float, total: float) -> str:
        terms, mechanism = self.terms, claim.spending
        assert isinstance(mechanism, Mechanism)
        more = " more" if claim.committed else ""
        whose = "the team's share" if self.shares else "the budget"
        reason = (
            f"the trial needs {requested:.4g}{more} of Rényi divergence (order {terms.order:.4g}) "
            f"and {max(0.0, free):.4g} of {whose} is free"
        )
        if not self.shares:
            reason = (
                f"epsilon {shown_epsilon(total)} would be taken of {terms.epsilon:.10g} at delta "
                f"{terms.delta:g}: {reason}"
            )
        one = step_rdp(mechanism.step, terms.order)
        repetitions = math.floor(max(0.0, free) / one * (1 - 1e-9))
        repetitions += mechanism.repetitions_after(claim.committed)
        iterations = repetitions * (mechanism.iterations // mechanism.repetitions)
        if iterations > claim.committed:
            reason += f"; iterations <= {iterations} would fit"
        return reason

    # -- declared and private_selection -------------------------------------------------------

    def _limits(self, team: str) -> tuple[float, float]:
        share = self._share(team)
        return self.terms.epsilon * share, self.terms.delta * share

    def cost(self, tally: Tally, claims: Sequence[Claim], delta: float) -> float:
        """Epsilon of a tally's list with claims added; for `declared`, `private_selection`."""
        if self.terms.policy == "declared":
            parts = collections.Counter(tally.committed)
            for claim in claims:
                if isinstance(claim.spending, Mechanism):
                    parts[claim.spending.step] += claim.more
            return epsilon_of_list(+parts, delta=delta)
        added = [c.spending for c in claims if isinstance(c.spending, Selection)]
        selections = [*tally.selections, *added]
        return selection_epsilon(selections, delta=delta) if selections else 0.0

    def _list(self, claims: Sequence[Claim], team: str) -> Verdict:
        tally = self.tally(team)
        limit, delta = self._limits(team)
        if limit == 0:
            return self.refusal("the team's share is 0")
        before = self.cost(tally, (), delta)
        after = self.cost(tally, claims, delta)
        admitted = after <= limit or not any(claim.more for claim in claims)
        of = f"{limit:.10g} at delta {delta:g}"
        listed = (
            f"the declared list costs epsilon {shown_epsilon(after)}"
            if self.terms.policy == "declared"
            else f"selection costs epsilon {shown_epsilon(after)}"
        )
        reason = f"{listed}, within {of}" if admitted else f"{listed}, which exceeds {of}"
        if not admitted and len(claims) > 1:
            first = self._how_many_fit(claims, tally, limit, delta)
            reason += f"; the first {first} of {len(claims)} would fit" if first else ""
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

    def _how_many_fit(
        self, claims: Sequence[Claim], tally: Tally, limit: float, delta: float
    ) -> int:
        fits, too_long = 0, len(claims)
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.cost(tally, claims[:middle], delta) <= limit:
                fits = middle
            else:
                too_long = middle
        return fits

    # -- changing -----------------------------------------------------------------------------

    def commit(self, request: Spending | Claim, team: str = "") -> None:
        """Takes what a request asks for; the caller has seen it admitted."""
        claim = request if isinstance(request, Claim) else Claim(spending=request)
        tally = self.tallies.setdefault(team, Tally())
        if isinstance(claim.spending, Mechanism):
            tally.committed[claim.spending.step] += claim.more
        else:
            tally.selections.append(claim.spending)

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


def _all_or_none(verdicts: Sequence[Verdict], together: int) -> list[Verdict]:
    """Verdicts of which so many at a time stand or fall together."""
    decided: list[Verdict] = []
    for start in range(0, len(verdicts), together):
        group = verdicts[start : start + together]
        refusal = next((verdict for verdict in group if not verdict.admitted), None)
        if refusal is not None and any(verdict.admitted for verdict in group):
            reason = f"{together} are admitted together or not at all: {refusal.reason}"
            group = [dataclasses.replace(v, admitted=False, reason=reason) for v in group]
        decided += group
    return decided


def _together(counters: Iterable[collections.Counter[Step]]) -> collections.Counter[Step]:
    whole: collections.Counter[Step] = collections.Counter()
    for counter in counters:
        whole.update(counter)
    return whole


def _holds(counts: Mapping[Step, int], mechanisms: Sequence[Mechanism]) -> bool:
    """Whether all steps of several mechanisms are among what counts."""
    return all(counts.get(step, 0) >= count for step, count in composed(mechanisms).items())
