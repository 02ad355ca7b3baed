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
from accounting.calibration import LEAST_NOISE_MULTIPLIER
from accounting.policies import MOST_HINTS
from accounting.renyi import epsilon_of_rdp, parts_rdp
from sweeps.errors import Problem, SpecError, SweepError
from sweeps.guarantee import guarantee
from sweeps.limits import check_limit, limit_of
from sweeps.search_space import (
    Hyperparameters,
    candidates,
    data_config,
    expand,
    expected_batch_size,
    repeat_seed,
    shown_proxy,
    shown_setting,
    trial_config,
)
from sweeps.spec.domains import CALIBRATED
from sweeps.spec.search_spec import OptunaSpec
from sweeps.spec.sweep_spec import SweepSpec
from trainer.config import ModelConfig, TrialConfig
from trainer.data.dataset_location import find_or_prepare
from trainer.data.datasets import DatasetInfo, describe
from trainer.errors import CheckpointError, ConfigError, DatasetError
from trainer.training.plan import mechanism_of
from trainer.weights.checkpoints import architecture
from trainer.weights.initial_weights import check_initial_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A setting of the search space and what was decided about it.

    Attributes:
        number: Place in the sweep, from 0.
        setting: What was proposed.
        shown: The hyperparameters by name, as a person sees them.
        config: What would be trained; None where no noise meets the target, or there is no such
            mechanism: the count of `quantile` clipping leaves nothing for the gradients, say, or
            a largest batch is too small.
        decision: Whether it may, and why; `epsilon` is the trial's by itself.
        asks_budget: Whether the budget has to decide; otherwise the specification's own limit
            for one trial has refused it.
        repeat: Which repeat of its setting it is, from 0.
    """

    number: int
    setting: Hyperparameters
    shown: dict[str, Any]
    config: TrialConfig | None
    decision: accounting.Decision
    asks_budget: bool
    repeat: int = 0

    def repeated(self, repeats: int) -> "list[Proposal]":
        """The same setting so many times, each initialised in another way.

        They follow each other, and what one of them costs by itself all of them do.
        """
        return [
            dataclasses.replace(
                self,
                number=self.number + repeat,
                repeat=repeat,
                config=self.config
                and dataclasses.replace(self.config, seed=repeat_seed(self.config.seed, repeat)),
            )
            for repeat in range(repeats)
        ]

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
        return guarantee(self.spec.model_dump(mode="json"))

    @property
    def admitted(self) -> list[Proposal]:
        """The proposals that may start."""
        return [proposal for proposal in self.proposals if proposal.decision.admitted]

    @property
    def proposed_later(self) -> int:
        """How many trials the search proposes while others run, each decided on by itself."""
        search = self.spec.search
        if not isinstance(search, OptunaSpec):
            return 0
        return max(search.num_samples * search.repeats - len(self.admitted), 0)


def terms_of(spec: SweepSpec) -> accounting.BudgetTerms:
    """The terms of a budget that a spec would have for itself."""
    privacy = spec.privacy
    return accounting.BudgetTerms(
        epsilon=privacy.target_epsilon,
        delta=privacy.target_delta,
        policy=privacy.policy,
        neighboring_relation=privacy.neighboring_relation,
        privacy_unit=spec.privacy_unit,
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
    if terms.privacy_unit != spec.privacy_unit:
        protects = {"user": "whole users", "example": "single examples"}
        how = "without" if spec.privacy_unit == "example" else "with"
        message = (
            f"{budget.name!r} protects {protects[terms.privacy_unit]}, and trials {how} "
            f"data.user_feature draw {protects[spec.privacy_unit]}; allowed: a budget whose "
            f"privacy unit is {spec.privacy_unit}"
        )
        problems.append(Problem(message=message, key_path="privacy.budget"))
    if problems:
        raise SpecError(problems)


def describe_dataset(spec: SweepSpec, data_home: Path) -> DatasetInfo:
    """The public facts of a spec's data set, its initial weights checked against them.

    Args:
        spec: The specification.
        data_home: Where built-in data sets are kept.

    Raises:
        SpecError: If the data set or the initial weights are not what the spec needs, or the
            spec contradicts what was declared of the data set.
    """
    try:
        dataset = describe(data_config(spec), data_home)
    except DatasetError as error:
        raise SpecError([Problem(message=str(error), key_path=f"data.{error.field}")]) from error
    _check_declaration(spec, dataset)
    if spec.model.init_from is not None:
        model = ModelConfig(**spec.model.model_dump())
        wanted = architecture(model, dataset.image_shape, dataset.num_classes)
        try:
            check_initial_weights(model, wanted, dataset.fingerprint)
        except CheckpointError as error:
            raise SpecError([Problem(message=str(error), key_path="model.init_from")]) from error
    return dataset


def _check_declaration(spec: SweepSpec, dataset: DatasetInfo) -> None:
    """Checks that a spec keeps to what was declared of its data set once for all.

    Raises:
        SpecError: It does not; every difference is named.
    """
    declared = dataset.declaration
    if declared is None:
        return
    problems: list[Problem] = []

    def refuse(key_path: str, message: str) -> None:
        where = f"(`dp-sweeps data show {dataset.name}:{dataset.version}`)"
        problems.append(Problem(message=f"{message} {where}", key_path=key_path))

    feature = declared.user_feature
    if spec.data.user_feature != feature:
        wanted = "null, for it protects examples" if feature is None else f"{feature!r}"
        message = (
            f"{spec.data.user_feature or 'null'} is not what is declared of {dataset.name}; "
            f"allowed: {wanted}"
        )
        refuse("data.user_feature", message)
    relation = spec.privacy.neighboring_relation
    if declared.size == "protected" and relation == "zero_out":
        message = (
            f"zero_out makes the size public, and that of {dataset.name} is declared to be "
            "protected; allowed: add_or_remove_one"
        )
        refuse("privacy.neighboring_relation", message)
    number, given = declared.declared_num_examples, spec.data.declared_num_examples
    if number is not None and relation != "zero_out" and given != number:
        message = f"{given} is not what is declared of {dataset.name}; allowed: {number}"
        refuse("data.declared_num_examples", message)
    if problems:
        raise SpecError(problems)


def prepare_dataset(spec: SweepSpec, data_home: Path) -> None:
    """Writes a built-in data set to where the workers read it, once.

    Raises:
        SweepError: If it cannot be written.
    """
    try:
        find_or_prepare(data_config(spec), data_home)
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
        The plan, with one proposal for each repeat of each setting, in the order of
        `sweeps.search_space.expand`; under private_selection one per candidate.

    Raises:
        SpecError: If a setting's batches would be larger than the data set, or than a group of it.
    """
    privacy = spec.privacy
    settings = candidates(spec) if privacy.policy == "private_selection" else expand(spec)
    proposals: list[Proposal] = []
    propose = Proposer(spec, dataset, account.terms)
    repeats = spec.search.repeats
    for setting in settings:
        proposal = propose(len(proposals), setting)
        proposals += proposal.repeated(repeats)
        if on_decision is not None:
            on_decision(proposal)
    asking = [proposal for proposal in proposals if proposal.asks_budget]
    requests: list[accounting.Mechanism | accounting.Selection]
    requests = [proposal.mechanism for proposal in asking]
    selection = None
    if privacy.policy == "private_selection" and requests:
        selection = _selection(spec, [proposal.mechanism for proposal in asking])
        requests = [selection]
    verdicts = account.decide(requests, privacy.team or "", together=repeats)
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


class Proposer:
    """Turns settings into proposals, by each trial's own cost; the budget is yet to be asked.

    Args:
        spec: The specification.
        dataset: Its data set's facts.
        terms: Of the budget that it draws on.
    """

    def __init__(
        self, spec: SweepSpec, dataset: DatasetInfo, terms: accounting.BudgetTerms
    ) -> None:
        self._spec = spec
        # The budget decides by itself whatever has no stricter limit here, and writes it down.
        stricter = spec.privacy.accountant != "pld" or spec.privacy.target_epsilon < terms.epsilon
        self._budget_is_limit = spec.privacy.policy == "per_trial" and not stricter
        self._privacy = spec.privacy.model_dump(mode="json")
        self._num_units = num_units(spec, dataset)
        self._limit = limit_of(self._privacy)
        self._calibrated: dict[tuple[float, int], float | accounting.AccountingError] = {}
        self._hints = MOST_HINTS

    def __call__(self, number: int, setting: Hyperparameters) -> Proposal:
        """What a setting costs by itself.

        Args:
            number: Its place in the sweep.
            setting: The setting.

        Raises:
            SpecError: Its batches would be larger than the data set, or than a group of it.
        """
        spec, units = self._spec, self._num_units
        # Refuses a batch larger than the data, whatever the noise is.
        shown = shown_setting(spec, setting, units)
        config, refusal = None, ""
        try:
            noise = self._noise(setting)
            shown["noise_multiplier"] = noise
            config = trial_config(spec, setting, num_units=units, noise_multiplier=noise)
            mechanism = mechanism_of(config)
            shown |= shown_proxy(spec, config) | self._real_epsilon(setting, noise)
        except accounting.CalibrationError as error:
            refusal = f"no noise_multiplier could be found: {error}"
        except (ConfigError, accounting.AccountingError) as error:
            refusal = str(error)
        else:
            decision = check_limit(self._privacy, mechanism, hint=self._hints > 0)
            self._hints -= not decision.admitted
            return Proposal(
                number=number,
                setting=setting,
                shown=shown,
                config=config,
                decision=decision,
                asks_budget=decision.admitted or self._budget_is_limit,
            )
        decision = accounting.Decision(
            admitted=False, epsilon=math.inf, delta=self._limit.delta, reason=refusal
        )
        return Proposal(
            number=number,
            setting=setting,
            shown=shown,
            config=None,
            decision=decision,
            asks_budget=False,
        )

    def _real_epsilon(self, setting: Hyperparameters, noise: float) -> dict[str, float | None]:
        """What the run itself would cost, where a trial is a proxy of it."""
        if not self._spec.proxy.is_proxy:
            return {}
        real = trial_config(
            self._spec.real, setting, num_units=self._num_units, noise_multiplier=noise
        )
        cost = accounting.epsilon(
            mechanism_of(real), delta=real.target_delta, accountant=real.accountant
        )
        return {"real_epsilon": cost if math.isfinite(cost) else None}

    def _noise(self, setting: Hyperparameters) -> float:
        """The setting's noise multiplier, calibrated once per distinct question.

        Raises:
            ConfigError: There is no such trial, whatever its noise.
            accounting.AccountingError: Likewise, or no noise meets the target.
        """
        if setting.noise_multiplier != CALIBRATED:
            return float(setting.noise_multiplier)
        question = (
            expected_batch_size(self._spec.real, setting, self._num_units),
            setting.iterations,
        )
        if question not in self._calibrated:
            try:
                self._calibrated[question] = self._calibrate(setting)
            except accounting.AccountingError as error:
                self._calibrated[question] = error
        answer = self._calibrated[question]
        if isinstance(answer, accounting.AccountingError):
            raise answer
        return answer

    def _calibrate(self, setting: Hyperparameters) -> float:
        # With the least noise that could be found: what is refused then is refused with any.
        config = trial_config(
            self._spec.real,
            setting,
            num_units=self._num_units,
            noise_multiplier=LEAST_NOISE_MULTIPLIER,
        )
        return accounting.calibrate_noise_of(
            mechanism_of(config),
            target_epsilon=self._spec.proxy.target_epsilon or self._limit.epsilon,
            target_delta=self._limit.delta,
            accountant=self._spec.privacy.accountant,
        )


def num_units(spec: SweepSpec, dataset: DatasetInfo) -> int | None:
    """How many units a data set holds: users where they are protected, else examples.

    Public or not; `sweeps.search_space.public_num_units` knows which.
    """
    return dataset.num_train if spec.privacy_unit == "example" else dataset.num_users
