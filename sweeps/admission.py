"""The decision that comes before everything else: which trials the privacy budget allows.

    specification -> settings -> one mechanism each -> epsilon -> admitted | rejected, and why

Deciding starts nothing and writes nothing; `dp-sweeps check` is this module and a table.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import accounting
from sweeps.errors import Problem, SpecError, SweepError
from sweeps.guarantee import guarantee
from sweeps.search_space import Hyperparameters, expand, public_num_examples, trial_config
from sweeps.spec.domains import CALIBRATED
from sweeps.spec.sweep_spec import SweepSpec
from trainer.checkpoints import architecture, check_initial_params
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.dataset_location import find_or_prepare
from trainer.datasets import DatasetInfo, describe
from trainer.errors import CheckpointError, DatasetError
from trainer.plan import mechanism_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """A setting of the search space and what was decided about it.

    Attributes:
        number: Place in the sweep, from 0.
        shown: The hyperparameters by name, as a person sees them.
        config: What would be trained; None where no noise meets the budget.
        decision: Whether it may, and why.
    """

    number: int
    shown: dict[str, Any]
    config: TrialConfig | None
    decision: accounting.Decision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A specification with every decision about it made and nothing started.

    Attributes:
        spec: What was asked.
        dataset: The data set's public facts.
        proposals: Every setting and its decision.
    """

    spec: SweepSpec
    dataset: DatasetInfo
    proposals: Sequence[Proposal]

    @property
    def guarantee(self) -> str:
        """What the spec's policy promises, in words."""
        return guarantee(self.spec.privacy.model_dump())

    @property
    def admitted(self) -> list[Proposal]:
        """The proposals that may start."""
        return [proposal for proposal in self.proposals if proposal.decision.admitted]


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


def propose(
    spec: SweepSpec,
    dataset: DatasetInfo,
    on_decision: Callable[[Proposal], None] | None = None,
) -> list[Proposal]:
    """Decides on every setting that a spec proposes.

    Args:
        spec: The specification.
        dataset: Its data set's facts.
        on_decision: Called after each decision, to show progress.

    Returns:
        One proposal per setting, in the order of `sweeps.search_space.expand`.

    Raises:
        SpecError: If a setting's batches would be larger than the data set.
    """
    budget = accounting.PrivacyBudget(
        epsilon=spec.privacy.target_epsilon, delta=spec.privacy.target_delta
    )
    proposals: list[Proposal] = []
    calibrate = _Calibrator(spec, dataset)
    for number, setting in enumerate(expand(spec)):
        noise, refusal = calibrate(setting)
        # Building it also refuses a batch larger than the data, whatever the noise is.
        config = trial_config(
            spec,
            setting,
            num_examples=dataset.num_train,
            noise_multiplier=1.0 if noise is None else noise,
        )
        shown = {**dataclasses.asdict(setting), "sampling_prob": config.sampling_prob}
        if noise is None:
            decision = accounting.Decision(
                admitted=False, epsilon=math.inf, delta=budget.delta, reason=refusal
            )
            proposal = Proposal(number=number, shown=shown, config=None, decision=decision)
        else:
            decision = accounting.check_per_trial(
                mechanism_of(config), budget, accountant=spec.privacy.accountant
            )
            shown["noise_multiplier"] = noise
            proposal = Proposal(number=number, shown=shown, config=config, decision=decision)
        proposals.append(proposal)
        if on_decision is not None:
            on_decision(proposal)
    return proposals


class _Calibrator:
    """Finds the noise of settings that ask for ``calibrated``, once per distinct question."""

    def __init__(self, spec: SweepSpec, dataset: DatasetInfo) -> None:
        self._privacy = spec.privacy
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
        if batch_size > self._num_examples:
            return 1.0, ""  # `trial_config` refuses it in words
        try:
            return accounting.calibrate_noise_multiplier(
                target_epsilon=self._privacy.target_epsilon,
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
