"""Shared budgets beside the ledger: what data one protects, and what would still fit in it."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import accounting
from accounting.account import Spending
from accounting.mechanism import Step
from sweeps.admission import Plan
from sweeps.errors import CommandError
from sweeps.home import Home
from sweeps.report.room import Fit, Room
from sweeps.report.table import show_epsilon
from sweeps.service import OnDecision, SpecSource, by_itself, make_plan, paid_by
from sweeps.spec.sweep_spec import SweepSpec
from trainer.config import DataConfig
from trainer.data.datasets import describe
from trainer.errors import ConfigError, DatasetError

MOST_COPIES = 1_000_000
_MAX_KINDS = 20
# Looking up what a budget has paid for takes a query for each reservation.
_MAX_RESERVATIONS = 200
_MAX_PAID_KINDS = 5

OnSpec = Callable[[SweepSpec], OnDecision | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProtectedData:
    """What a budget protects.

    Attributes:
        dataset: What it is called.
        fingerprint: What tells it from others of that name, as sweeps compare it.
    """

    dataset: str
    fingerprint: str


def find_data(
    name: str, home: Home, *, data_dir: Path | None, train_split: str, eval_split: str
) -> ProtectedData:
    """Finds a data set as a sweep would.

    Raises:
        CommandError: There is none, or it has no such split.
    """
    try:
        config = DataConfig(
            name=name,
            data_dir=None if data_dir is None else str(data_dir),
            train_split=train_split,
            eval_split=eval_split,
        )
        found = describe(config, home.data_dir)
    except (ConfigError, DatasetError) as error:
        field = error.field if isinstance(error, DatasetError) else "name"
        option = {"name": "--dataset", "data_dir": "--data-dir"}.get(field)
        option = option or f"--{field.replace('_', '-')}"
        raise CommandError(
            f"{option}: {error}; allowed for data that TFDS does not hold: --fingerprint"
        ) from error
    return ProtectedData(dataset=f"{found.name}:{found.version}", fingerprint=found.fingerprint)


def typical_order(
    source: SpecSource, home: Home, epsilon: float, delta: float, on_spec: OnSpec | None = None
) -> float:
    """The order of Rényi divergence at which a budget holds the most of a spec's trials.

    Raises:
        SpecError: The specification is not allowed.
        CommandError: It proposes no trial whose cost is known.
    """
    plan = make_plan(source, home, on_spec, change=by_itself)
    parts: Counter[Step] = Counter()
    for mechanism in _mechanisms(plan):
        parts[mechanism.step] += mechanism.repetitions
    if not parts:
        raise CommandError(
            f"{plan.spec.name}: proposes no trial that could run, so none is typical"
        )
    return accounting.best_rdp_order(epsilon, delta, parts)


def room_for_spec(
    ledger: accounting.Ledger,
    name: str,
    source: SpecSource,
    home: Home,
    *,
    team: str | None,
    on_spec: OnSpec | None = None,
) -> Room:
    """What of a specification would still fit into a budget.

    Raises:
        SpecError: The specification is not allowed, or does not say what the budget says.
    """
    plan = make_plan(source, home, on_spec, change=paid_by(name, team))
    account, payer = ledger.account(name), plan.spec.privacy.team or ""
    kinds: list[tuple[Spending, int]]
    if plan.spec.privacy.policy == "private_selection":
        kinds = [] if plan.selection is None else [(plan.selection, 1)]
    else:
        kinds = _kinds(_mechanisms(plan))
    fits = tuple(_fit(account, kind, count, payer) for kind, count in kinds[:_MAX_KINDS])
    admitted, asked = len(plan.admitted), len(plan.proposals)
    return Room(
        heading=f"What of {plan.spec.name} would still fit",
        asked_heading="in the\nspec",
        fits=fits,
        hidden=max(0, len(kinds) - _MAX_KINDS),
        whole=_whole(plan, admitted, asked),
        whole_fits=admitted == asked,
        admitted=admitted,
        epsilon_after=plan.total_epsilon if admitted else plan.epsilon_before,
        note=_note(account),
    )


def room_for_paid_kinds(ledger: accounting.Ledger, name: str, *, team: str | None) -> Room | None:
    """What would still fit of the kinds of trials that a budget has paid for.

    Returns:
        None where it has paid for nothing, or nothing adds up.
    """
    account, payer = ledger.account(name), team or ""
    if account.terms.policy == "per_trial":
        return None
    if account.shares and team is None:
        return _none("It is divided among teams: --team tells what fits into a share.")
    ids = [
        request_id
        for state in ("open", "closed")
        for request_id in ledger.reservation_ids(name, state=state)[-_MAX_RESERVATIONS:]
    ]
    paid = _kinds(ledger.reservation(request_id).mechanism for request_id in ids)
    kinds = sorted(paid, key=lambda kind: -kind[1])
    if not kinds:
        return None
    fits = tuple(_fit(account, kind, count, payer) for kind, count in kinds[:_MAX_PAID_KINDS])
    if not any(fit.more for fit in fits):
        return _none(f"Nothing of what it has paid for: {_refusal(account, kinds[0][0], payer)}.")
    return Room(
        heading="What would still fit of what it has paid for",
        asked_heading="paid\nfor",
        fits=fits,
        hidden=max(0, len(kinds) - _MAX_PAID_KINDS),
        note=_note(account),
    )


def _none(obstacle: str) -> Room:
    return Room(heading="What would still fit", asked_heading="", obstacle=obstacle)


def _refusal(account: accounting.Account, kind: Spending, team: str) -> str:
    return account.decide([kind], team)[0].reason


def _mechanisms(plan: Plan) -> list[accounting.Mechanism]:
    return [proposal.mechanism for proposal in plan.proposals if proposal.config is not None]


def _kinds(spendings: Iterable[Spending]) -> list[tuple[Spending, int]]:
    """Distinct costs and how often each occurs, in the order in which they first do."""
    return list(Counter(spendings).items())


def _fit(account: accounting.Account, kind: Spending, count: int, team: str) -> Fit:
    more: int | None = account.copies_that_fit(kind, team, most=MOST_COPIES)
    at_least = more == MOST_COPIES
    if at_least and account.terms.policy == "per_trial":
        more = None
    if isinstance(kind, accounting.Selection):
        what = (
            f"best of {kind.mean:g} on average ({kind.distribution}) among "
            f"{_counted(len(kind.candidates), 'setting')}"
        )
        return Fit(what=what, asked=count, more=more, at_least=at_least)
    return Fit(
        sampling_prob=kind.sampling_prob,
        noise_multiplier=kind.noise_multiplier,
        iterations=kind.iterations,
        mechanism=_beside_dp_sgd(kind),
        asked=count,
        more=more,
        at_least=at_least and more is not None,
    )


def _beside_dp_sgd(mechanism: accounting.Mechanism) -> str:
    """What tells a mechanism from DP-SGD of the same numbers."""
    if isinstance(mechanism, accounting.BandedMatrixFactorizationMechanism):
        return f"{mechanism.bands} bands"
    if isinstance(mechanism, accounting.TruncatedDpSgdMechanism):
        return f"batches of at most {mechanism.truncated_batch_size}"
    return ""


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _whole(plan: Plan, admitted: int, asked: int) -> str:
    """Whether a whole specification fits, in words."""
    if admitted == asked:
        if plan.total_epsilon is None:
            return f"All of it fits: {_counted(asked, 'trial')}, each within the limit by itself."
        words = "the selection" if plan.selection is not None else _counted(asked, "trial")
        after = show_epsilon(plan.total_epsilon)
        return (
            f"All of it fits: {words}; epsilon {after} of {plan.limit.epsilon:.10g} is then taken."
        )
    refused = next(p.decision.reason for p in plan.proposals if not p.decision.admitted)
    some = f"{admitted} of {_counted(asked, 'trial')} fit" if admitted else "None of it fits"
    return f"{some}: {refused}."


def _note(account: accounting.Account) -> str:
    if account.terms.policy == "per_trial":
        return "Each trial is held to the limit by itself; how many there are does not matter."
    return "Each line for itself: as if nothing of the others were run."
