"""A search that learns: Optuna's tree-structured Parzen estimator, asked anew each time.

What has been tried is in the database, so a search needs no state of its own: a proposal follows
from the specification, the trials so far and its number. A driver that comes back after a crash
proposes what the dead one would have proposed.

A configuration that the budget refused counts as infeasible, the more so the further it was over
its limit; a trial that was pruned ranks below those that reached more steps.

Fields that depend on another one are proposed after it, from what was tried with the value that
it has now: each branch of the space is modelled by itself, as in the tree that the method is named
after.

Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; Watanabe and Hutter
2023, "c-TPE", for what is infeasible.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from sweeps.search.tried import Tried
from sweeps.spec.domains import ConditionalDomain, Domain, Value, step_indices
from sweeps.spec.search_spec import ObjectiveName, OptunaSpec
from sweeps.spec.sweep_spec import SweepSpec

_DIRECTIONS: dict[ObjectiveName, list[Literal["maximize", "minimize"]]] = {
    "utility": ["maximize"],
    "epsilon": ["minimize"],
    "frontier": ["maximize", "minimize"],
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


def propose(spec: SweepSpec, tried: Sequence[Tried], number: int) -> dict[str, Value]:
    """A configuration to try next.

    Args:
        spec: A specification whose search is `OptunaSpec`.
        tried: What was proposed before, in order.
        number: How many were proposed before in all; with ``search.seed`` it seeds the draw.

    Returns:
        A value of each field of the search space.
    """
    search = spec.search
    assert isinstance(search, OptunaSpec)
    fields = dict(spec.search_space.domains())
    seeds = np.random.SeedSequence([search.seed, number]).generate_state(1 + len(fields))
    alone = {name: domain for name, domain in fields.items() if isinstance(domain, Domain)}
    values = _propose(search, alone, tried, int(seeds[0]))
    for by, seed in zip(alone, seeds[1:], strict=False):
        branch = {
            name: domain.given(values)
            for name, domain in fields.items()
            if isinstance(domain, ConditionalDomain) and domain.by == by
        }
        if branch:
            alike = [each for each in tried if each.values[by] == values[by]]
            values |= _propose(search, branch, alike, int(seed))
    return values


def _propose(
    search: OptunaSpec, domains: Mapping[str, Domain], tried: Sequence[Tried], seed: int
) -> dict[str, Value]:
    """Values of some fields together."""
    distributions = {
        name: _distribution(domain) for name, domain in domains.items() if domain.is_random
    }
    study = optuna.create_study(
        directions=_DIRECTIONS[search.objective],
        sampler=optuna.samplers.TPESampler(n_startup_trials=1, multivariate=True, seed=seed),
    )
    frozen = (_frozen(search, each, domains, distributions) for each in tried)
    study.add_trials([trial for trial in frozen if trial is not None])
    drawn = study.ask(distributions).params
    return {
        name: _value(domain, drawn[name]) if name in drawn else domain.values[0]
        for name, domain in domains.items()
    }


def _frozen(
    search: OptunaSpec,
    tried: Tried,
    domains: Mapping[str, Domain],
    distributions: dict[str, BaseDistribution],
) -> FrozenTrial | None:
    """What Optuna is told of a configuration; None for nothing."""

    def told(state: TrialState = TrialState.COMPLETE, **more: Any) -> FrozenTrial:
        params = {name: _param(domains[name], tried.values[name]) for name in distributions}
        return create_trial(state=state, params=params, distributions=distributions, **more)

    nothing = [0.0] * (2 if search.objective == "frontier" else 1)
    if tried.outcome == "running":
        return told(TrialState.RUNNING)
    if tried.outcome == "refused":
        return told(values=nothing, constraints={"privacy": tried.excess})
    if tried.outcome == "failed":
        return None
    if tried.outcome == "diverged" or tried.utility is None or tried.epsilon is None:
        return told(values=nothing, constraints={"utility": math.inf})
    match search.objective:
        case "utility" if tried.outcome == "pruned":
            return told(TrialState.PRUNED, intermediate_values={tried.step: tried.utility})
        case "utility":
            return told(values=[tried.utility])
        case "epsilon":
            assert search.min_utility is not None
            short = search.min_utility - tried.utility
            return told(values=[tried.epsilon], constraints={"utility": short})
        case "frontier":
            return told(values=[tried.utility, tried.epsilon])


def _distribution(domain: Domain) -> BaseDistribution:
    if domain.kind == "choice":
        return CategoricalDistribution(tuple(dict.fromkeys(domain.values)))
    low, high = domain.values[:2]
    match domain.kind:
        case "randint" | "lograndint":
            log = domain.kind == "lograndint"
            return IntDistribution(int(low), int(high) - 1, log=log)
        case "quniform":
            step = float(domain.values[2])
            first, last = step_indices(float(low), float(high), step)
            return IntDistribution(first, last)
        case _:
            return FloatDistribution(float(low), float(high), log=domain.kind == "loguniform")


def _param(domain: Domain, value: Value) -> Value:
    """A value as its distribution has it."""
    match domain.kind:
        case "quniform":
            return round(float(value) / float(domain.values[2]))
        case "randint" | "lograndint":
            return int(value)
        case _:
            return value


def _value(domain: Domain, param: Any) -> Value:
    if domain.kind == "quniform":
        return float(f"{param * float(domain.values[2]):.12g}")
    return param
