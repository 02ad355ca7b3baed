"""The decision that comes before everything else: which trials the privacy budget allows.

    specification -> settings -> one mechanism each -> its own epsilon -> the budget's account
                                                              -> admitted | rejected, and why

Deciding starts nothing and writes nothing; `dp-sweeps check` is this module and a table.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accounting
from accounting.account import LIST_POLICIES
from accounting.renyi import epsilon_of_rdp, parts_rdp
from sweeps.errors import Problem, SpecError, SweepError
from sweeps.guarantee import guarantee
from sweeps.search_space import (
    Hyperparameters,
    candidates,
    expand,
    public_num_examples,
    sampling_prob,
    trial_config,
)
from sweeps.spec.domains import CALIBRATED
from sweeps.spec.sweep_spec import SweepSpec
from trainer.checkpoints import architecture, check_initial_params
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.dataset_location import find_or_prepare
from trainer.datasets import DatasetInfo, describe
from trainer.errors import CheckpointError, ConfigError, DatasetError
from trainer.plan import mechanism_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A setting of the search space and what was decided about it.

    Attributes:
        number: Place in the sweep, from 0.
        shown: The hyperparameters by name, as a person sees them.
        config: What would be trained; None where no noise meets the target, or the count of
            `quantile` clipping leaves nothing for the gradients.
        decision: Whether it may, and why; `epsilon` is the trial's by itself.
        asks_budget: Whether the budget has to decide; otherwise the specification's own limit
            for one trial has refused it.
    """

    number: int
    shown: dict[str, Any]
    config: TrialConfig | None
    decision: accounting.Decision
    asks_budget: bool

    @property
    def mechanism(self) -> accounting.Mechanism:
        """What would be accounted; there is a `config`."""
        assert self.config is not None
        return mechanism_of(self.config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """What another policy would cost for the same specification.

    Attributes:
        policy: The other policy.
        epsilon: What it would cost in all.
        assumes: What that takes, in words.
    """

    policy: accounting.Policy
    epsilon: float
    assumes: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A specification with every decision about it made and nothing started.

    Attributes:
        spec: What was asked.
        dataset: The data set's public facts.
        proposals: Every setting and its decision; under private_selection every candidate.
        limit: What the budget may pay for in all; where each team has a list of its own, the
            team's share of that.
        selection: Under private_selection, what the budget pays for.
        total_epsilon: What the budget would have paid for in all, other sweeps included; None
            under per_trial, where nothing adds up.
        epsilon_before: What of that was taken before; None under per_trial, or if it could not
            be computed.
        alternatives: What other policies would cost.
    """

    spec: SweepSpec
    dataset: DatasetInfo
    proposals: Sequence[Proposal]
    limit: accounting.PrivacyBudget
    selection: accounting.Selection | None = None
    total_epsilon: float | None = None
    epsilon_before: float | None = None
    alternatives: Sequence[Alternative] = ()

    @property
    def guarantee(self) -> str:
        """What the spec's policy promises, in words."""
        return guarantee(self.spec.privacy.model_dump(), self.spec.clipping.model_dump())

    @property
    def admitted(self) -> list[Proposal]:
        """The proposals that may start."""
        return [proposal for proposal in self.proposals if proposal.decision.admitted]


def terms_of(spec: SweepSpec) -> accounting.BudgetTerms:
    """The terms of a budget that a spec would have for itself."""
    privacy = spec.privacy
    return accounting.BudgetTerms(
        epsilon=privacy.target_epsilon,
        delta=privacy.target_delta,
        policy=privacy.policy,
        neighboring_relation=privacy.neighboring_relation,
    )


def check_budget(spec: SweepSpec, dataset: DatasetInfo, budget: accounting.Budget) -> None:
    """Checks that a spec says what the budget that it names says.

    Under per_trial it may ask for less.

    Raises:
        SpecError: It does not; every difference is named.
    """
    problems: list[Problem] = []
    if budget.dataset_fingerprint != dataset.fingerprint:
        message = (
            f"{budget.name!r} protects {budget.dataset}, another data set than that of this "
            "specification; allowed: a budget for the same data (`dp-sweeps budget list`)"
        )
        problems.append(Problem(message=message, key_path="privacy.budget"))
    terms, privacy = budget.terms, spec.privacy
    for field, own in (
        ("policy", terms.policy),
        ("target_epsilon", terms.epsilon),
        ("target_delta", terms.delta),
        ("neighboring_relation", terms.neighboring_relation),
    ):
        given = getattr(privacy, field)
        if field == "target_epsilon" and terms.policy == "per_trial" and given <= own:
            continue
        if given != own:
            message = f"{given} is not what the budget {budget.name!r} says; allowed: {own}"
            problems.append(Problem(message=message, key_path=f"privacy.{field}"))
    if terms.privacy_unit != "example":
        message = (
            f"{budget.name!r} protects whole users, and trials of a sweep draw single examples; "
            "allowed: a budget whose privacy unit is example"
        )
        problems.append(Problem(message=message, key_path="privacy.budget"))
    if problems:
        raise SpecError(problems)


def describe_dataset(spec: SweepSpec, data_home: Path) -> DatasetInfo:
    """The public facts of a spec's data set, its initial checkpoint checked against them.

    Args:
        spec: The specification.
        data_home: Where built-in data sets are kept.

    Raises:
        SpecError: If the data set or the checkpoint is not what the spec needs.
    """
    try:
        dataset = describe(DataConfig(**_data_fields(spec)), data_home)
    except DatasetError as error:
        raise SpecError([Problem(message=str(error), key_path=f"data.{error.field}")]) from error
    if spec.model.init_from is not None:
        model = ModelConfig(**spec.model.model_dump())
        wanted = architecture(model, dataset.image_shape, dataset.num_classes)
        try:
            check_initial_params(Path(spec.model.init_from), wanted, dataset.fingerprint)
        except CheckpointError as error:
            raise SpecError([Problem(message=str(error), key_path="model.init_from")]) from error
    return dataset


def prepare_dataset(spec: SweepSpec, data_home: Path) -> None:
    """Writes a built-in data set to where the workers read it, once.

    Raises:
        SweepError: If it cannot be written.
    """
    try:
        find_or_prepare(DataConfig(**_data_fields(spec)), data_home)
    except DatasetError as error:
        raise SweepError(str(error)) from error


def decide(
    spec: SweepSpec,
    dataset: DatasetInfo,
    account: accounting.Account,
    on_decision: Callable[[Proposal], None] | None = None,
) -> Plan:
    """Decides on every setting that a spec proposes.

    Args:
        spec: The specification.
        dataset: Its data set's facts.
        account: What is taken from its budget so far.
        on_decision: Called after each setting's own cost is known, to show progress.

    Returns:
        The plan, with one proposal per setting in the order of `sweeps.search_space.expand`;
        under private_selection one per candidate.

    Raises:
        SpecError: If a setting's batches would be larger than the data set.
    """
    privacy = spec.privacy
    # The budget decides by itself whatever has no stricter limit here, and writes it down.
    stricter = privacy.accountant != "pld" or privacy.target_epsilon < account.terms.epsilon
    settings = candidates(spec) if privacy.policy == "private_selection" else expand(spec)
    proposals: list[Proposal] = []
    propose = _Proposer(spec, dataset)
    for number, setting in enumerate(settings):
        proposal = propose(number, setting)
        if proposal.config is not None and (
            proposal.decision.admitted or (privacy.policy == "per_trial" and not stricter)
        ):
            proposal = dataclasses.replace(proposal, asks_budget=True)
        proposals.append(proposal)
        if on_decision is not None:
            on_decision(proposal)
    asking = [proposal for proposal in proposals if proposal.asks_budget]
    requests: list[accounting.Mechanism | accounting.Selection]
    requests = [proposal.mechanism for proposal in asking]
    selection = None
    if privacy.policy == "private_selection" and requests:
        selection = _selection(spec, [proposal.mechanism for proposal in asking])
        requests = [selection]
    verdicts = account.decide(requests, privacy.team or "")
    if selection is not None:
        verdicts = verdicts * len(asking)
    for proposal, verdict in zip(asking, verdicts, strict=True):
        proposals[proposal.number] = dataclasses.replace(
            proposal,
            decision=dataclasses.replace(
                proposal.decision, admitted=verdict.admitted, reason=verdict.reason
            ),
        )
    before, total = _taken_before(account, privacy.team or ""), None
    if privacy.policy != "per_trial":
        admitted = [verdict.epsilon for verdict in verdicts if verdict.admitted]
        total = max(admitted or [verdict.epsilon for verdict in verdicts], default=before or 0.0)
    return Plan(
        spec=spec,
        dataset=dataset,
        proposals=proposals,
        limit=_limit(account, privacy.team or ""),
        selection=selection,
        total_epsilon=total,
        epsilon_before=before,
        alternatives=_alternatives(spec, [proposal.mechanism for proposal in asking], selection),
    )


def _limit(account: accounting.Account, team: str) -> accounting.PrivacyBudget:
    terms = account.terms
    share = account.fractions.get(team, 0.0) if terms.policy in LIST_POLICIES else 0.0
    try:
        return accounting.PrivacyBudget(epsilon=terms.epsilon * share, delta=terms.delta * share)
    except accounting.InvalidPrivacyParameter:  # no share of its own
        return accounting.PrivacyBudget(epsilon=terms.epsilon, delta=terms.delta)


def _taken_before(account: accounting.Account, team: str) -> float | None:
    """Epsilon of what a budget has paid for, as `Plan.total_epsilon` counts it."""
    terms, tally = account.terms, account.tally(team)
    if terms.policy == "per_trial":
        return None
    try:
        if terms.policy == "open":
            taken = parts_rdp(tally.committed, terms.order)
            taken += account.rdp_of_others(team) if account.shares else 0.0
            return epsilon_of_rdp(taken, terms.delta, terms.order)
        return account.cost(tally, (), _limit(account, team).delta)
    except accounting.AccountingError:
        return None  # it is information only; what is decided does not rest on it


def _selection(
    spec: SweepSpec, mechanisms: Sequence[accounting.Mechanism]
) -> accounting.Selection:
    wanted = spec.privacy.selection
    assert wanted is not None  # the specification was refused otherwise
    return accounting.Selection(
        candidates=tuple(mechanisms),
        distribution=wanted.distribution,
        mean=wanted.mean,
        shape=wanted.shape,
    )


def _alternatives(
    spec: SweepSpec,
    mechanisms: Sequence[accounting.Mechanism],
    selection: accounting.Selection | None,
) -> list[Alternative]:
    """What `declared` and `private_selection` cost against each other."""
    delta = spec.privacy.target_delta
    try:
        if selection is not None:
            count = math.ceil(selection.mean)
            dearest = max(mechanisms, key=lambda m: accounting.epsilon(m, delta=delta))
            cost = accounting.epsilon_of_list(
                {dearest.step: dearest.repetitions * count}, delta=delta
            )
            assumes = f"{count} trials, all of them shown, each as dear as the dearest candidate"
            return [Alternative(policy="declared", epsilon=cost, assumes=assumes)]
        if spec.privacy.policy == "declared" and len(mechanisms) > 1:
            other = accounting.Selection(
                candidates=tuple(mechanisms),
                distribution="geometric",
                mean=float(len(mechanisms)),
            )
            cost = accounting.selection_epsilon([other], delta=delta)
            assumes = (
                f"{len(mechanisms)} trials on average (geometric), drawn independently, run to "
                "their ends, and only the winner is ever shown"
            )
            return [Alternative(policy="private_selection", epsilon=cost, assumes=assumes)]
    except accounting.AccountingError:
        return []  # it is information only; what is decided does not rest on it
    return []


class _Proposer:
    """Turns settings into proposals, by each trial's own cost."""

    def __init__(self, spec: SweepSpec, dataset: DatasetInfo) -> None:
        privacy = spec.privacy
        self._spec, self._dataset = spec, dataset
        limit = privacy.trial_epsilon or privacy.target_epsilon
        self._limit = accounting.PrivacyBudget(epsilon=limit, delta=privacy.target_delta)
        self._calibrate = _Calibrator(spec, dataset, limit)

    def __call__(self, number: int, setting: Hyperparameters) -> Proposal:
        num_examples = self._dataset.num_train
        # Refuses a batch larger than the data, whatever the noise is.
        prob = sampling_prob(self._spec, setting, num_examples)
        shown = {**dataclasses.asdict(setting), "sampling_prob": prob}
        noise, refusal = self._calibrate(setting)
        config = None
        if noise is not None:
            shown["noise_multiplier"] = noise
            try:
                config = trial_config(
                    self._spec, setting, num_examples=num_examples, noise_multiplier=noise
                )
            except ConfigError as error:
                refusal = str(error)
        if config is None:
            decision = accounting.Decision(
                admitted=False, epsilon=math.inf, delta=self._limit.delta, reason=refusal
            )
            return Proposal(
                number=number, shown=shown, config=None, decision=decision, asks_budget=False
            )
        decision = accounting.check_per_trial(
            mechanism_of(config), self._limit, accountant=self._spec.privacy.accountant
        )
        return Proposal(
            number=number, shown=shown, config=config, decision=decision, asks_budget=False
        )


class _Calibrator:
    """Finds the noise of settings that ask for ``calibrated``, once per distinct question."""

    def __init__(self, spec: SweepSpec, dataset: DatasetInfo, target_epsilon: float) -> None:
        self._privacy, self._target_epsilon = spec.privacy, target_epsilon
        self._num_examples = public_num_examples(spec, dataset.num_train)
        self._known: dict[tuple[float, int], tuple[float | None, str]] = {}

    def __call__(self, setting: Hyperparameters) -> tuple[float | None, str]:
        """The setting's noise multiplier, or None and why there is none."""
        if setting.noise_multiplier != CALIBRATED:
            return float(setting.noise_multiplier), ""
        question = (setting.expected_batch_size, setting.iterations)
        if question not in self._known:
            self._known[question] = self._calibrate(*question)
        return self._known[question]

    def _calibrate(self, batch_size: float, iterations: int) -> tuple[float | None, str]:
        try:
            return accounting.calibrate_noise_multiplier(
                target_epsilon=self._target_epsilon,
                target_delta=self._privacy.target_delta,
                sampling_prob=batch_size / self._num_examples,
                iterations=iterations,
                accountant=self._privacy.accountant,
                neighboring_relation=self._privacy.neighboring_relation,
            ), ""
        except accounting.AccountingError as error:
            return None, f"no noise_multiplier could be found: {error}"


def _data_fields(spec: SweepSpec) -> dict[str, Any]:
    return spec.data.model_dump(exclude={"declared_num_examples"})
