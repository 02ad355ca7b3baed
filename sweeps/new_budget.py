"""A new budget as somebody asks for it, checked before anything is written."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from accounting import Budget, BudgetTerms, NeighboringRelation, Policy, PrivacyUnit
from sweeps.budgets import OnSpec, ProtectedData, find_data, typical_order
from sweeps.database.tables import existing_ledger, open_ledger
from sweeps.errors import CommandError, StoreError
from sweeps.home import Home
from sweeps.service import SpecSource, read_spec
from sweeps.spec.privacy_spec import NAME_PATTERN
from sweeps.spec.sweep_spec import SweepSpec
from trainer.data.datasets import DatasetInfo

_MAX_TEXT = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """What is asked for, as the options of ``dp-sweeps budget create``; None: not given."""

    name: str
    spec: SpecSource | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    train_split: str | None = None
    eval_split: str | None = None
    fingerprint: str | None = None
    policy: Policy | None = None
    epsilon: float | None = None
    delta: float | None = None
    neighboring_relation: NeighboringRelation | None = None
    privacy_unit: PrivacyUnit | None = None
    rdp_order: float | None = None
    typical: SpecSource | None = None


def create_budget(
    options: BudgetOptions,
    home: Home,
    *,
    by: str,
    tell: Callable[[str], None],
    on_spec: OnSpec | None = None,
) -> Budget:
    """Makes a budget, after a warning where others protect the same data.

    Args:
        options: What is wanted.
        home: Where the ledger and the built-in data sets are kept.
        by: Who makes it, for the journal.
        tell: Called with what the person should know: such a warning, or that it is there already.
        on_spec: As `sweeps.service.make_plan` takes it.

    Returns:
        The budget; the one that is there already, if its terms are the same.

    Raises:
        CommandError: The options contradict each other, something is missing, or there is a
            budget of that name with other terms. Nothing was written, as with all of these:
        SpecError: A specification is not allowed.
        accounting.InvalidPrivacyParameter: The terms are not allowed.
    """
    if not re.fullmatch(NAME_PATTERN, options.name):
        raise CommandError(
            f"{options.name!r}: allowed is a name of letters, digits and _ . : / = , + -, which "
            "begins with a letter or digit"
        )
    spec, found = (None, None) if options.spec is None else read_spec(options.spec, home)
    terms = _terms(options, spec, home, on_spec)
    data = _data(options, spec, found, home)
    budgets = _budgets(home)
    for budget in budgets:
        if budget.name == options.name:
            return _same(budget, terms, data, tell)
    _warn(budgets, data, tell)
    return open_ledger(home).create_budget(
        options.name,
        dataset=data.dataset,
        dataset_fingerprint=data.fingerprint,
        epsilon=terms.epsilon,
        delta=terms.delta,
        policy=terms.policy,
        neighboring_relation=terms.neighboring_relation,
        privacy_unit=terms.privacy_unit,
        rdp_order=terms.rdp_order,
        by=by,
    )


def _terms(
    options: BudgetOptions, spec: SweepSpec | None, home: Home, on_spec: OnSpec | None
) -> BudgetTerms:
    """Each term as its option says, else as the specification does."""
    policy, epsilon, delta = options.policy, options.epsilon, options.delta
    relation, unit = options.neighboring_relation, options.privacy_unit
    if spec is not None:
        policy = spec.privacy.policy if policy is None else policy
        epsilon = spec.privacy.target_epsilon if epsilon is None else epsilon
        delta = spec.privacy.target_delta if delta is None else delta
        relation = spec.privacy.neighboring_relation if relation is None else relation
        unit = spec.privacy_unit if unit is None else unit
    if policy is None or epsilon is None or delta is None:
        given = {"--policy": policy, "--epsilon": epsilon, "--delta": delta}
        missing = [option for option, value in given.items() if value is None]
        if options.dataset is None:
            missing.insert(0, "--dataset")
        raise CommandError(f"{', '.join(missing)}: missing; allowed beside them: --from SPEC")
    if options.typical is not None and (options.rdp_order is not None or policy != "open"):
        beside = f"under {policy}" if options.rdp_order is None else "beside --rdp-order"
        raise CommandError(
            f"--typical: is not allowed {beside}; it chooses the order of an open budget"
        )
    terms = BudgetTerms(
        epsilon=epsilon,
        delta=delta,
        policy=policy,
        neighboring_relation=relation or "zero_out",
        privacy_unit=unit or "example",
        rdp_order=options.rdp_order,
    )
    if options.typical is None:
        return terms
    order = typical_order(options.typical, home, terms.epsilon, terms.delta, on_spec)
    return dataclasses.replace(terms, rdp_order=order)


def _data(
    options: BudgetOptions, spec: SweepSpec | None, found: DatasetInfo | None, home: Home
) -> ProtectedData:
    """The data that the options name, else those of the specification."""
    looks = {
        "--data-dir": options.data_dir,
        "--train-split": options.train_split,
        "--eval-split": options.eval_split,
    }
    chosen = [option for option, value in looks.items() if value is not None]
    if options.fingerprint is not None:
        if chosen:
            raise CommandError(
                f"{chosen[0]}: is not allowed beside --fingerprint, which looks nothing up"
            )
        own = "" if found is None else f"{found.name}:{found.version}"
        return ProtectedData(
            dataset=_text("--dataset", options.dataset or own),
            fingerprint=_text("--fingerprint", options.fingerprint),
        )
    if found is not None and options.dataset is None and not chosen:
        return ProtectedData(
            dataset=f"{found.name}:{found.version}", fingerprint=found.fingerprint
        )
    # A specification's directory and splits are those of its own data set.
    data = spec.data if spec is not None and options.dataset is None else None
    name = options.dataset or (data.name if data else None)
    if name is None:
        raise CommandError("--dataset: missing; allowed beside it: --from SPEC")
    own_dir = Path(data.data_dir) if data and data.data_dir else None
    return find_data(
        name,
        home,
        data_dir=options.data_dir or own_dir,
        train_split=options.train_split or (data.train_split if data else "train"),
        eval_split=options.eval_split or (data.eval_split if data else "test"),
    )


def _text(option: str, text: str) -> str:
    if not text or len(text) > _MAX_TEXT or not text.isprintable():
        raise CommandError(f"{option}: allowed is a printable text of 1 to {_MAX_TEXT} characters")
    return text


def _budgets(home: Home) -> list[Budget]:
    try:
        return existing_ledger(home).budgets()
    except StoreError:
        return []  # There is no ledger yet.


def _same(
    budget: Budget, terms: BudgetTerms, data: ProtectedData, tell: Callable[[str], None]
) -> Budget:
    """The budget that is there, if it is the one that is wanted."""
    there = (budget.terms, budget.dataset, budget.dataset_fingerprint, budget.one_off)
    if there != (terms, data.dataset, data.fingerprint, False):
        raise CommandError(
            f"budget {budget.name!r}: exists already, with other terms (`dp-sweeps budget show "
            f"{budget.name}`), and terms never change; allowed: another name"
        )
    tell(f"{budget.name} exists already, with these terms")
    return budget


def _warn(budgets: list[Budget], data: ProtectedData, tell: Callable[[str], None]) -> None:
    others = [
        f"{other.name} ({other.terms.policy}, epsilon {other.terms.epsilon:g})"
        for other in budgets
        if other.dataset_fingerprint == data.fingerprint
        and other.state != "retired"
        and not other.one_off
    ]
    if others:
        tell(
            f"warning: the same data is protected by {', '.join(others)}; guarantees add up for "
            "whoever sees results of both"
        )
