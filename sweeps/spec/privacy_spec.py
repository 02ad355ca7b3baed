"""The privacy section: which policy, which numbers, which budget, who pays.

What would void a policy is refused here where the section alone shows it, and in
`sweeps.spec.sweep_spec` where it takes the rest of the specification to see it.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

from pydantic import Field, model_validator

from accounting import Distribution, Policy
from sweeps.spec.refusals import Allowed, Refusal, one_of, refused
from sweeps.spec.section import PositiveNumber, Section
from trainer.config import Accountant, NeighboringRelation

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.:/=,+-]{0,159}$"
_Name = Annotated[
    Annotated[str, Field(pattern=NAME_PATTERN)] | None,
    Allowed("null, or a name of letters, digits and _ . : / = , + -"),
]
_RDP_POLICIES = ("open", "private_selection")


class SelectionSpec(Section):
    """How private_selection draws the secret number of its trials, and what it shows."""

    distribution: Annotated[Distribution, one_of(Distribution)] = Field(
        description="The law of the number of trials. Wider ones cost less for the same mean."
    )
    mean: Annotated[float, Field(ge=1, le=10_000), Allowed("a number from 1 to 10000")] = Field(
        description="Mean number of trials."
    )
    shape: Annotated[
        Annotated[float, Field(gt=0, le=100)] | None, Allowed("null or a number in (0, 100]")
    ] = Field(default=None, description="Shape of negative_binomial; 1 is geometric.")
    reveal: Annotated[Literal["winner", "all_trials"], Allowed("winner")] = Field(
        default="winner",
        description="What is shown. Only winner keeps the guarantee; all_trials is refused.",
    )


class PrivacySpec(Section):
    """The guarantee that is asked for. A trial that cannot keep it is never started."""

    policy: Annotated[Policy, one_of(Policy)] = Field(
        description="What the guarantee covers. per_trial: each trial on its own, and not the "
        "sweep as a whole. declared: all trials together, their list fixed beforehand. open: "
        "everything trained under the budget, however it is chosen. private_selection: the best "
        "of a secret number of trials, of which nothing else is shown."
    )
    budget: _Name = Field(
        default=None,
        description="Name of a budget in the ledger (`dp-sweeps budget list`), whose terms the "
        "section must repeat; null makes one for this sweep alone.",
    )
    team: _Name = Field(
        default=None, description="Whose share pays, where the budget is divided among teams."
    )
    target_epsilon: PositiveNumber = Field(
        description="Largest epsilon: of a trial under per_trial, otherwise of all that the "
        "budget pays for."
    )
    target_delta: Annotated[float, Field(ge=1e-10, lt=1), Allowed("a number in [1e-10, 1)")] = (
        Field(description="The delta at which epsilon is reckoned; well below 1 / examples.")
    )
    trial_epsilon: Annotated[
        Annotated[float, Field(gt=0)] | None, Allowed("null or a number > 0")
    ] = Field(
        default=None,
        description="Largest epsilon of one trial by itself, to which calibrated noise is "
        "calibrated. Under per_trial that is target_epsilon.",
    )
    accountant: Annotated[Accountant, one_of(Accountant)] = Field(
        default="pld",
        description="pld is tight; rdp is looser, and quick for long runs. open and "
        "private_selection allow rdp alone, and take it by themselves.",
    )
    neighboring_relation: Annotated[NeighboringRelation, one_of(NeighboringRelation)] = Field(
        default="zero_out",
        description="Which data sets count as neighbours. zero_out: one example is blanked, and "
        "the size is public. add_or_remove_one: one example more or less; the size is protected.",
    )
    selection: SelectionSpec | None = Field(
        default=None, description="For private_selection: how many trials, and what is shown."
    )

    @model_validator(mode="before")
    @classmethod
    def _accountant_of_the_policy(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        section = cast("dict[str, Any]", value)
        if section.get("policy") in _RDP_POLICIES and "accountant" not in section:
            return {**section, "accountant": "rdp"}
        return section

    @model_validator(mode="after")
    def _fields_agree(self) -> "PrivacySpec":
        refusals = list(_refusals(self))
        if refusals:
            raise refused(*refusals)
        return self


def _refusals(privacy: PrivacySpec) -> Iterator[Refusal]:
    policy, selection = privacy.policy, privacy.selection
    if policy == "open" and privacy.accountant == "pld":
        message = (
            "pld is not allowed under open: sums of privacy loss distributions are no bound "
            "where trials are chosen in the light of earlier ones; allowed: rdp"
        )
        yield Refusal(("accountant",), message)
    if policy == "private_selection" and privacy.accountant == "pld":
        message = (
            "pld is not allowed under private_selection, whose cost is known for Rényi "
            "divergences alone; allowed: rdp"
        )
        yield Refusal(("accountant",), message)
    if privacy.trial_epsilon is not None:
        limit = privacy.target_epsilon
        if policy == "per_trial":
            message = f"{privacy.trial_epsilon:g} is not allowed; allowed: null under per_trial"
            yield Refusal(("trial_epsilon",), message)
        elif privacy.trial_epsilon > limit:
            message = f"{privacy.trial_epsilon:g} exceeds target_epsilon; allowed: <= {limit:g}"
            yield Refusal(("trial_epsilon",), message)
    if policy != "private_selection":
        if selection is not None:
            message = f"is not allowed under {policy}; allowed: null"
            yield Refusal(("selection",), message, at_key=True)
        return
    if selection is None:
        message = "is missing; allowed: {distribution: geometric, mean: 10}, for example"
        yield Refusal(("selection",), message)
        return
    if selection.reveal != "winner":
        message = (
            "all_trials is not allowed: whoever sees the trials that lost learns from all of "
            "them, and private_selection pays for the winner alone; allowed: winner"
        )
        yield Refusal(("selection", "reveal"), message)
    if (selection.shape is None) == (selection.distribution == "negative_binomial"):
        allowed = "a number in (0, 100]" if selection.shape is None else "null"
        message = (
            f"{selection.shape} is not allowed for {selection.distribution}; allowed: {allowed}"
        )
        yield Refusal(("selection", "shape"), message.replace("None", "null", 1))
