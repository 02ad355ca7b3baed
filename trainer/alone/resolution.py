"""From what a file says, and what the data set is, to a `TrialConfig`.

    sampling_prob          expected_batch_size / (number of units), in each of the groups of banded
                           noise; only where the number of units is public
    expected_batch_size    ``full``: all units of a step's group, which then all take part
    mechanism.num_units    the number of units, where batches are truncated
    noise_multiplier       ``calibrated``: the smallest that keeps within ``target_epsilon``

Needs no JAX, and the data set only where one of the first three is asked for.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import accounting
from trainer._validate import number, whole
from trainer.alone.trial_file import CALIBRATED, FULL, TARGET, TrialFile
from trainer.config import DataConfig, TrialConfig
from trainer.data.datasets import DatasetInfo, describe
from trainer.errors import CheckpointError, ConfigError, DatasetError
from trainer.training.plan import batches_of, evaluation_mechanism, mechanism_of
from trainer.weights.checkpoints import architecture
from trainer.weights.initial_weights import check_initial_weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolved:
    """A trial that may be run, and what it costs.

    Attributes:
        config: The trial.
        epsilon: What all its steps cost at ``config.target_delta``.
        eval_epsilon: What counting with noise costs the evaluation examples; None where it is
            not done.
        dataset: Public facts of the data set; None where it is absent and was not needed.
        missing: Why it is absent.
    """

    config: TrialConfig
    epsilon: float
    eval_epsilon: float | None
    dataset: DatasetInfo | None
    missing: DatasetError | None = None


def resolve(file: TrialFile, data_home: Path) -> Resolved:
    """Adds what the file leaves out, and reckons the cost.

    Args:
        file: What the person wrote.
        data_home: Where built-in data sets are kept.

    Raises:
        ConfigError: Something is missing that nothing can be taken from, or is not allowed; or
            the initial weights do not fit.
        DatasetError: The data set is needed and cannot be read.
        AccountingError: The cost cannot be computed, or no noise meets the target.
    """
    fields: dict[str, Any] = {**file.fields, "mechanism": {**file.fields.get("mechanism", {})}}
    try:
        data = DataConfig(**fields["data"])
        dataset, missing = _described(data, data_home)

        def num_units() -> int:
            """Of the data set, which is needed from here on."""
            if dataset is None:
                assert missing is not None
                raise missing
            return dataset.num_train if dataset.num_users is None else dataset.num_users

        if fields.get("neighboring_relation", "zero_out") == "zero_out":
            _add_from_units(fields, num_units)
        else:
            _refuse_what_needs_units(fields)
        config = _with_noise(fields, file.target_epsilon)
        mechanism = mechanism_of(config)
        _check_weights(config, dataset)
    except (ConfigError, accounting.InvalidPrivacyParameter) as error:
        raise file.placed(error) from error
    how: dict[str, Any] = {"delta": config.target_delta, "accountant": config.accountant}
    counting = evaluation_mechanism(config)
    return Resolved(
        config=config,
        epsilon=accounting.epsilon(mechanism, **how),
        eval_epsilon=None if counting is None else accounting.epsilon(counting, **how),
        dataset=dataset,
        missing=missing,
    )


def _check_weights(config: TrialConfig, dataset: DatasetInfo | None) -> None:
    """Checks what the headers of initial weights tell."""
    if config.model.init_from is None or dataset is None:
        return
    wanted = architecture(config.model, dataset.image_shape, dataset.num_classes)
    try:
        check_initial_weights(config.model, wanted, dataset.fingerprint)
    except CheckpointError as error:
        raise ConfigError(f"model.init_from={config.model.init_from!r}: {error}") from error


def _described(
    data: DataConfig, data_home: Path
) -> tuple[DatasetInfo | None, DatasetError | None]:
    try:
        return describe(data, data_home), None
    except DatasetError as error:
        if error.field != "name":  # it is there, and something else is wrong
            raise
        return None, error


def _add_from_units(fields: dict[str, Any], num_units: Callable[[], int]) -> None:
    """Adds what depends on the number of units, where that is public."""
    mechanism = fields["mechanism"]
    truncated = mechanism.get("truncated_batch_size") is not None
    given = mechanism.get("num_units")
    if truncated and given != num_units():
        if given is not None:
            raise ConfigError(
                f"mechanism.num_units={given!r}: allowed is {num_units()}, the number of units in "
                "the data, or nothing"
            )
        mechanism["num_units"] = num_units()
    bands = mechanism.get("bands", 1)
    whole("mechanism.bands", bands, least=1)
    size = fields["expected_batch_size"]
    if size == FULL:
        if truncated:
            raise ConfigError(
                f"expected_batch_size={FULL!r}: allowed with mechanism.truncated_batch_size is a "
                "number, for a batch of everybody is never cut"
            )
        if fields.setdefault("sampling_prob", 1.0) != 1:
            raise ConfigError(
                f"sampling_prob={fields['sampling_prob']!r}: allowed with expected_batch_size "
                f"{FULL} is 1"
            )
        fields |= batches_of(FULL, num_units(), bands)._asdict()
    elif "sampling_prob" not in fields:
        number("expected_batch_size", size, low=0.0)
        fields |= batches_of(size, num_units(), bands)._asdict()


def _refuse_what_needs_units(fields: dict[str, Any]) -> None:
    """Refuses what would tell how many units there are."""
    protects = "for neighboring_relation add_or_remove_one protects the number of units"
    if fields["expected_batch_size"] == FULL:
        raise ConfigError(
            f"expected_batch_size={FULL!r}: allowed is a public number, {protects}; with "
            "sampling_prob 1 everybody takes part in every step"
        )
    if "sampling_prob" not in fields:
        raise ConfigError(
            f"sampling_prob=None: allowed is a number in [2^-32, 1], {protects}; such as "
            "expected_batch_size divided by a public guess of that number"
        )


def _with_noise(fields: dict[str, Any], target_epsilon: float | None) -> TrialConfig:
    """The configuration, its noise calibrated or held to the target."""
    calibrated = fields["noise_multiplier"] == CALIBRATED
    if calibrated and target_epsilon is None:
        raise ConfigError(
            f"noise_multiplier={CALIBRATED!r}: allowed with {TARGET}, which is missing, or a "
            "number > 0"
        )
    if target_epsilon is not None:
        number(TARGET, target_epsilon, low=0.0)
    if not calibrated:
        config = _config(fields)
        if target_epsilon is not None:
            _check_target(config, target_epsilon)
        return config
    assert target_epsilon is not None
    # Any noise will do for the shape of the mechanism; a count's is checked with the right one.
    clipping = {**fields.get("clipping", {}), "mode": "flat"}
    shape = _config({**fields, "noise_multiplier": 1.0, "clipping": clipping})
    noise_multiplier = accounting.calibrate_noise_of(
        mechanism_of(shape),
        target_epsilon=target_epsilon,
        target_delta=shape.target_delta,
        accountant=shape.accountant,
    )
    return _config({**fields, "noise_multiplier": noise_multiplier})


def _check_target(config: TrialConfig, target_epsilon: float) -> None:
    budget = accounting.PrivacyBudget(epsilon=target_epsilon, delta=config.target_delta)
    decision = accounting.check_per_trial(
        mechanism_of(config), budget, accountant=config.accountant
    )
    if not decision.admitted:
        raise ConfigError(
            f"{TARGET}={target_epsilon!r}: {decision.reason}; or noise_multiplier {CALIBRATED}"
        )


def _config(fields: Mapping[str, Any]) -> TrialConfig:
    hints = typing.get_type_hints(TrialConfig)
    sections = {
        name: hints[name](**given) for name, given in fields.items() if isinstance(given, dict)
    }
    return TrialConfig(**{**fields, **sections})
