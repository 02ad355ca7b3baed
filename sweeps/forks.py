"""What somebody wants of a fork, as the configuration of one trial.

    parent's configuration + changes -> its sweep's specification, these its only setting
                                     -> read, checked and expanded as any specification

So a change is parsed as the specification would parse it, and refused in the same words. Whether
the budget allows the fork is decided where it becomes a trial (`sweeps.database.forking`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.admission import describe_dataset, num_units
from sweeps.database.forking import NewFork
from sweeps.database.store import Store
from sweeps.errors import CommandError, Problem, SpecError, StoreError
from sweeps.guarantee import proxy_scale
from sweeps.home import Home
from sweeps.search_space import expand, shown_proxy, shown_setting, trial_config
from sweeps.spec.domains import BY, CALIBRATED, ConditionalDomain
from sweeps.spec.reading import validate_spec
from sweeps.spec.space_spec import SearchSpace
from sweeps.spec.sweep_spec import SweepSpec
from sweeps.spec.yaml_source import document_of, parse_yaml, suggestion
from sweeps.user_models import check_model_allowed
from trainer.config import TrialConfig
from trainer.errors import ConfigError


def new_fork(
    store: Store,
    home: Home,
    trial_id: str,
    changes: Mapping[str, Any],
    *,
    from_step: int | None = None,
    iterations: int | None = None,
    exempt: bool = True,
) -> NewFork:
    """Works out what a fork would be.

    Args:
        store: The database.
        home: Where built-in data sets are kept.
        trial_id: The trial to go on from.
        changes: Fields of the search space and their values, from `parse_changes`.
        from_step: The step of the checkpoint; None for the newest.
        iterations: The step at which the fork ends; None for where its parent does.
        exempt: As `NewFork`'s.

    Raises:
        StoreError: If there is no such trial, or it could never run.
        SpecError: If a change is not allowed; every problem is named.
        CommandError: If the changes do not go with the rest of the configuration.
    """
    parent = store.trial(trial_id)
    if parent is None or parent.trial_config is None:
        raise StoreError(
            f"trial {trial_id!r}: not in the ledger, or not one that ran; `dp-sweeps show` lists "
            "them"
        )
    config = TrialConfig.from_json(parent.trial_config)
    document = store.sweep(parent.sweep_id).spec
    setting = {name: getattr(config, name) for name in SearchSpace.model_fields}
    scale = proxy_scale(document)
    if scale != 1:  # what ran is a proxy of what is said
        setting["expected_batch_size"] *= scale
        setting["noise_multiplier"] *= scale
    more = {} if iterations is None else {"iterations": iterations}
    spec = _spec_of_one(document, {**setting, **changes, **more})
    check_model_allowed(spec.model.name)
    dataset = describe_dataset(spec, home.data_dir)
    units = num_units(spec, dataset)
    (one,) = expand(spec)
    try:
        forked = trial_config(
            spec,
            one,
            num_units=units,
            noise_multiplier=float(one.noise_multiplier),
        )
    except ConfigError as error:
        raise CommandError(f"--set: {error}") from error
    # Nothing is initialised, but it goes on with what was, with the seed of its parent's repeat.
    forked = dataclasses.replace(forked, seed=config.seed)
    return NewFork(
        parent_trial_id=trial_id,
        from_step=from_step,
        config=shown_setting(spec, one, units) | shown_proxy(spec, forked),
        trial_config=forked,
        dataset_fingerprint=dataset.fingerprint,
        exempt=exempt,
    )


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Reads ``KEY=VALUE`` texts, whose values are as a specification would say them.

    Raises:
        CommandError: If one is no such text, its key is no field of the search space, or a key
            comes twice.
        SpecError: If a value cannot be read.
    """
    changes: dict[str, Any] = {}
    names = [name for name in SearchSpace.model_fields if name != "iterations"]
    for text in texts:
        key, is_given, value = text.partition("=")
        if not is_given:
            raise CommandError(f"--set {text!r}: allowed is KEY=VALUE, as learning_rate=0.5")
        if key == "iterations":
            raise CommandError(f"--set {text!r}: allowed is --iterations {value}")
        if key not in names:
            hint = suggestion(key, names)
            raise CommandError(f"--set {text!r}: unknown key{hint}; allowed: {', '.join(names)}")
        if key in changes:
            raise CommandError(f"--set {text!r}: {key} is set twice; allowed is once")
        read = parse_yaml(f"{key}: {value}", source=f"--set {key}").data
        if len(read) != 1:
            raise CommandError(f"--set {text!r}: allowed is one value")
        changes |= read
    return changes


def _spec_of_one(document: Mapping[str, Any], setting: Mapping[str, Any]) -> SweepSpec:
    """A sweep's specification as if it had proposed one setting, which nobody prunes."""
    data = {
        **document,
        "search_space": dict(setting),
        "search": {"num_samples": 1},
        # Its noise is a number, so there is nothing to calibrate.
        "proxy": {**document.get("proxy", {}), "target_epsilon": None},
        "scheduler": {"name": "fifo"},
    }
    spec = validate_spec(document_of(data))
    problems = [
        Problem(message=f"{found} is not allowed in a fork; allowed: {allowed}", key_path=path)
        for path, found, allowed in _more_than_one(spec)
    ]
    if problems:
        raise SpecError(problems)
    return spec


def _more_than_one(spec: SweepSpec) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for name, domain in spec.search_space.domains():
        kind = BY if isinstance(domain, ConditionalDomain) else domain.kind
        if kind != "constant":
            found.append((f"search_space.{name}", kind, "one value"))
    if CALIBRATED in spec.search_space.noise_multiplier.values:
        # It is reckoned for a trial that starts from nothing.
        found.append(("search_space.noise_multiplier", CALIBRATED, "a number > 0"))
    return found
