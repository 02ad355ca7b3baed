"""The mechanism section: what is drawn and what noise is added, the same for every trial.

It is not searched: the guarantee names the mechanism, and it is one sentence for all trials.
What it cannot be combined with is refused here where the specification shows it; whether a
largest batch is large enough depends on a trial's batch size and on the data, so
`sweeps.admission` decides it for each of them.
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, model_validator

from sweeps.spec.domains import FULL, MAX_ITERATIONS, MAX_WHOLE, AnyDomain
from sweeps.spec.privacy_spec import PrivacySpec
from sweeps.spec.refusals import Allowed, Refusal, refused
from sweeps.spec.section import Section

_WholeOrNull = Annotated[
    Annotated[int, Field(ge=1, le=MAX_WHOLE)] | None, Allowed("null or a whole number >= 1")
]


class MechanismSpec(Section):
    """Which mechanism trials run. The defaults are DP-SGD with Poisson sampling."""

    bands: Annotated[
        Annotated[int, Field(ge=1, le=MAX_ITERATIONS)],
        Allowed(f"a whole number from 1 to {MAX_ITERATIONS}"),
    ] = Field(
        default=1,
        description="Over how many steps noise is correlated (banded matrix factorisation). The "
        "data are split into so many groups, of which each step draws from the next; 1 is "
        "independent noise and one group.",
    )
    truncated_batch_size: _WholeOrNull = Field(
        default=None,
        description="Largest batch: larger draws lose examples at random, which is accounted "
        "for. At least 4 standard deviations above expected_batch_size; null truncates nothing.",
    )
    examples_per_user: _WholeOrNull = Field(
        default=None,
        description="With data.user_feature: how many examples of each user drawn a step uses; "
        "those of who has more are drawn at random.",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> "MechanismSpec":
        if self.bands > 1 and self.truncated_batch_size is not None:
            message = (
                f"{self.truncated_batch_size} is not allowed with {self.bands} bands, for their "
                "combination is not accounted; allowed: null, or 1 in bands"
            )
            raise refused(Refusal(("truncated_batch_size",), message))
        return self


def mechanism_refusals(
    mechanism: MechanismSpec,
    *,
    privacy: PrivacySpec,
    user_feature: str | None,
    clipping_mode: str,
    optimizer: AnyDomain,
    expected_batch_size: AnyDomain,
    iterations: AnyDomain,
) -> Iterator[Refusal]:
    """What the rest of a specification says that its mechanism cannot be combined with."""
    yield from _user_refusals(mechanism, user_feature)
    if mechanism.bands > 1:
        yield from _banded_refusals(
            mechanism.bands, clipping_mode, optimizer, expected_batch_size, iterations
        )
    if mechanism.truncated_batch_size is not None:
        yield from _truncated_refusals(
            mechanism.truncated_batch_size, privacy, expected_batch_size
        )


def _user_refusals(mechanism: MechanismSpec, user_feature: str | None) -> Iterator[Refusal]:
    path, examples = ("mechanism", "examples_per_user"), mechanism.examples_per_user
    if user_feature is None and examples is not None:
        message = (
            f"{examples} is not allowed, for without data.user_feature nobody's examples are "
            "counted; allowed: null"
        )
        yield Refusal(path, message)
    if user_feature is not None and examples is None:
        message = (
            "is missing; allowed: a whole number >= 1. With data.user_feature whole users are "
            "drawn, and a step uses so many examples of each"
        )
        yield Refusal(path, message)


def _banded_refusals(
    bands: int,
    clipping_mode: str,
    optimizer: AnyDomain,
    expected_batch_size: AnyDomain,
    iterations: AnyDomain,
) -> Iterator[Refusal]:
    fewest = int(iterations.bounds()[0])
    if bands > fewest:
        message = (
            f"{bands} exceeds the fewest iterations of a trial, {fewest}; allowed: a whole "
            f"number from 1 to {fewest}"
        )
        yield Refusal(("mechanism", "bands"), message)
    because = f"with {bands} bands, for it reckons with noise that is independent in every step"
    if clipping_mode == "quantile":
        message = f"quantile is not allowed {because}; allowed: flat, per_layer, automatic"
        yield Refusal(("clipping", "mode"), message)
    if "dp_adam_bc" in optimizer.values:
        message = f"dp_adam_bc is not allowed {because}; allowed: any other"
        yield Refusal(("search_space", "optimizer"), message)
    if FULL in expected_batch_size.values:
        message = (
            f"{FULL} is not allowed with {bands} bands, for each step draws from one of {bands} "
            "groups; allowed: a number, at most the size of a group"
        )
        yield Refusal(("search_space", "expected_batch_size"), message)


def _truncated_refusals(
    size: int, privacy: PrivacySpec, expected_batch_size: AnyDomain
) -> Iterator[Refusal]:
    path = ("mechanism", "truncated_batch_size")
    if privacy.neighboring_relation != "zero_out":
        message = (
            f"{size} is not allowed under {privacy.neighboring_relation}, which protects how many "
            "there are, and the cost of truncated batches depends on that; allowed: null, or "
            "zero_out in privacy.neighboring_relation"
        )
        yield Refusal(path, message)
    if privacy.accountant == "rdp":
        remedy = "pld in privacy.accountant"
        if privacy.policy in ("open", "private_selection"):
            remedy = "per_trial or declared in privacy.policy"
        message = (
            f"{size} is not allowed with accountant rdp, which has no cost of truncated batches; "
            f"allowed: null, or {remedy}"
        )
        yield Refusal(path, message)
    if FULL in expected_batch_size.values:
        message = (
            f"{FULL} is not allowed with truncated_batch_size {size}, for of everybody nothing "
            "may be cut; allowed: a number"
        )
        yield Refusal(("search_space", "expected_batch_size"), message)
