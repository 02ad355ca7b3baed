"""The search space: what differs between trials, and how much of it is listed.

A field may depend on another one, which then has a constant or listed values and depends on none
itself: so there are no chains and no cycles. Each of those values has its branch, and no branch is
left without.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, cast

from pydantic import Field, model_validator

from sweeps.spec.allowed_domains import (
    BATCH_SIZES,
    ITERATIONS,
    NOISES,
    NUMBERS,
    NUMBERS_OR_ZERO,
    OPTIMIZERS,
    SCHEDULES,
    STEPS,
)
from sweeps.spec.domains import (
    BY,
    CALIBRATED,
    ELSE,
    FULL,
    AnyDomain,
    ConditionalDomain,
    Domain,
    Value,
    branch_key,
)
from sweeps.spec.refusals import Refusal, refused
from sweeps.spec.section import Section
from sweeps.spec.yaml_source import suggestion
from trainer.yaml_text import KeyPath, show


class SearchSpace(Section):
    """What differs between trials: of each field a constant, a domain, or one by another field."""

    optimizer: Annotated[AnyDomain, OPTIMIZERS] = Field(
        description="Optimizer, as in optax; dp_adam_bc and scale_then_privatize are Adam for "
        "noisy gradients."
    )
    learning_rate: Annotated[AnyDomain, NUMBERS] = Field(
        description="Step size; the largest of a schedule."
    )
    expected_batch_size: Annotated[AnyDomain, BATCH_SIZES] = Field(
        description="Mean size of a Poisson-sampled batch: each example joins a step with "
        "probability expected_batch_size / examples, or with bands, each of the step's group "
        f"with so many times that. {FULL}: all examples join every step. With data.user_feature "
        "all of this is about users."
    )
    iterations: Annotated[AnyDomain, ITERATIONS] = Field(description="Number of noisy steps.")
    noise_multiplier: Annotated[AnyDomain, NOISES] = Field(
        description=f"Noise standard deviation / sensitivity; {CALIBRATED} is the smallest that "
        "keeps the trial within the target."
    )
    l2_clip_norm: Annotated[AnyDomain, NUMBERS] = Field(
        description="Bound on one example's gradient norm."
    )
    weight_decay: Annotated[AnyDomain, NUMBERS_OR_ZERO] = Field(
        default=Domain("constant", (0.0,)),
        description="Decoupled weight decay: it touches no gradient and costs no privacy.",
    )
    learning_rate_schedule: Annotated[AnyDomain, SCHEDULES] = Field(
        default=Domain("constant", ("constant",)),
        description="How the learning rate falls to zero over the iterations, after the warm-up.",
    )
    warmup_steps: Annotated[AnyDomain, STEPS] = Field(
        default=Domain("constant", (0,)),
        description="Steps over which the learning rate rises first.",
    )

    def domains(self) -> Iterator[tuple[str, AnyDomain]]:
        """The fields and their domains, in the order in which they are declared."""
        for name in type(self).model_fields:
            yield name, cast("AnyDomain", getattr(self, name))

    def parts(self) -> Iterator[tuple[KeyPath, Domain]]:
        """Every domain that a field may have, by itself, and where it stands."""
        for name, domain in self.domains():
            for path, part in domain.parts():
                yield (name, *path), part

    def num_listed(self, point: Mapping[str, Value]) -> int:
        """How many settings the grid has, but for the fields that a point gives.

        Args:
            point: Values of some fields, as `point_refusals` allows them.
        """
        domains = dict(self.domains())
        total = 1
        for name, domain in domains.items():
            if isinstance(domain, ConditionalDomain):
                continue
            dependent = [
                other
                for field, other in domains.items()
                if isinstance(other, ConditionalDomain) and other.by == name and field not in point
            ]
            # Nothing that depends on what is drawn is a grid, so one value stands for all.
            values = domain.values[: domain.num_listed]
            total *= sum(
                math.prod(other.given({name: value}).num_listed for other in dependent)
                for value in ((point[name],) if name in point else values)
            )
        return total

    def point_refusals(self, point: Mapping[str, Value]) -> Iterator[Refusal]:
        """What of a point is not in the space, whatever the fields are that it leaves out."""
        domains = dict(self.domains())
        for name, value in point.items():
            if name not in domains:
                message = f"unknown key{suggestion(name, domains)}; allowed: {', '.join(domains)}"
                yield Refusal((name,), message, at_key=True)
                continue
            for where, domain in self._possible(domains[name], point):
                if not domain.contains(value):
                    said = f"{json.dumps(value)} is not in the search space{where}"
                    yield Refusal((name,), f"{said}; allowed: in {json.dumps(domain.plain())}")
                    break

    def _possible(
        self, domain: AnyDomain, point: Mapping[str, Value]
    ) -> Iterator[tuple[str, Domain]]:
        """The domains that a field may have where a point says what it does, and when."""
        if isinstance(domain, Domain):
            yield "", domain
            return
        by = domain.by
        values = cast("Domain", getattr(self, by)).values
        for value in dict.fromkeys(values):
            if point.get(by, value) == value:
                yield f" where {by} is {branch_key(value)}", domain.given({by: value})

    @model_validator(mode="after")
    def _branches_agree(self) -> "SearchSpace":
        domains = dict(self.domains())
        refusals = [
            refusal._replace(path=(name, *refusal.path))
            for name, domain in domains.items()
            if isinstance(domain, ConditionalDomain)
            for refusal in _conditional_refusals(domain, domains)
        ]
        if refusals:
            raise refused(*refusals)
        return self


def _conditional_refusals(
    domain: ConditionalDomain, domains: Mapping[str, AnyDomain]
) -> Iterator[Refusal]:
    """What is wrong with a domain that depends on another field."""
    by, other = domain.by, domains.get(domain.by)
    if other is None:
        message = f"{show(by)} is no field of search_space{suggestion(by, domains)}"
        yield Refusal((BY,), f"{message}; allowed: {', '.join(domains)}")
        return
    if isinstance(other, ConditionalDomain) or other.is_range:
        is_so = "is drawn from a range" if isinstance(other, Domain) else "depends on a field, too"
        message = (
            f"{by} {is_so}; allowed: a field that is a constant, or one of the domains "
            "grid_search and choice"
        )
        yield Refusal((BY,), message)
        return
    branches, taken = dict(domain.branches), [branch_key(value) for value in other.values]
    for key in branches:
        if key not in taken and key != ELSE:
            known = [*dict.fromkeys(taken), ELSE]
            message = f"{by} is never that{suggestion(key, known)}; allowed: {', '.join(known)}"
            yield Refusal((key,), message, at_key=True)
    missing = [key for key in dict.fromkeys(taken) if key not in branches]
    if missing and ELSE not in branches:
        message = (
            f"says nothing of {by} {', '.join(missing)}; allowed: a domain for each value that "
            f"{by} may have, or {ELSE} for the rest of them"
        )
        yield Refusal((), message, at_key=True)
    if not missing and ELSE in branches:
        message = f"is left with no value of {by}; allowed: only what can be"
        yield Refusal((ELSE,), message, at_key=True)
    for key, branch in branches.items() if other.is_random else ():
        if branch.kind == "grid_search":
            message = (
                f"grid_search is not allowed where {by} is drawn, for how many trials there are "
                f"would be left to chance; allowed: choice here, or grid_search in {by}"
            )
            yield Refusal((key,), message)
