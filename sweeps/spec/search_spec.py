"""The search section: where a sweep's configurations come from. Names are Ray Tune's."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema

from sweeps.spec.domains import Value
from sweeps.spec.refusals import Allowed, Refusal, one_of, refused
from sweeps.spec.section import PositiveWhole, Section, Seed
from trainer.yaml_text import show

MAX_TRIALS = 100_000

ObjectiveName = Literal["utility", "epsilon", "frontier"]

_NumTrials = Annotated[
    int, Field(ge=1, le=MAX_TRIALS), Allowed(f"a whole number from 1 to {MAX_TRIALS}")
]
_REPEATS = (
    "How many trials each configuration is, with other noise and another initialisation each. "
    "Their mean is what is shown; each is admitted and paid for as any trial."
)


def _word_or_number(raw: object) -> Value:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        message = f"{show(raw)} is not allowed; allowed: a value of the field"
        raise refused(Refusal((), message))
    return raw


_Value = Annotated[
    Any, BeforeValidator(_word_or_number), WithJsonSchema({"type": ["string", "number"]})
]
_Points = Annotated[
    tuple[Annotated[dict[str, _Value], Field(min_length=1)], ...],
    Field(strict=False, max_length=MAX_TRIALS),
    Allowed("a list of mappings from fields of search_space to values"),
]


class _ListedSpec(Section):
    """What a search says that has all its configurations before anything runs."""

    num_samples: _NumTrials = Field(
        default=1,
        description="How often the grid is run; random domains are drawn anew each time.",
    )
    repeats: _NumTrials = Field(default=1, description=_REPEATS)
    seed: Seed = Field(default=0, description="Seed of what is drawn. It is public.")
    points_to_evaluate: _Points = Field(
        default=(),
        description="Points of the search space that come first, one in place of each sample. "
        "Fields that a point leaves out are drawn, or take their turn, as without it.",
    )


class RandomSpec(_ListedSpec):
    """Every point of the grid; random domains are drawn independently."""

    name: Annotated[Literal["random"], Allowed("random")] = Field(
        default="random", description="Where configurations come from."
    )


class QuasiRandomSpec(_ListedSpec):
    """As random, but what is drawn covers the space evenly (a shifted Sobol' sequence)."""

    name: Annotated[Literal["quasi_random"], Allowed("quasi_random")] = Field(
        description="Where configurations come from."
    )


class OptunaSpec(Section):
    """Optuna's tree-structured Parzen estimator, which learns from the trials so far."""

    name: Annotated[Literal["optuna"], Allowed("optuna")] = Field(
        description="Where configurations come from."
    )
    num_samples: _NumTrials = Field(
        description="How many configurations are run; refused ones add none."
    )
    repeats: _NumTrials = Field(default=1, description=_REPEATS)
    seed: Seed = Field(default=0, description="Seed of what is drawn. It is public.")
    points_to_evaluate: _Points = Field(
        default=(),
        description="Points of the search space that come first. Fields that a point leaves out "
        "are drawn.",
    )
    n_startup_trials: PositiveWhole = Field(
        default=10,
        description="How many configurations, points_to_evaluate included, are drawn before the "
        "first that is learnt.",
    )
    objective: Annotated[ObjectiveName, one_of(ObjectiveName)] = Field(
        default="utility",
        description="What is looked for. utility: the best eval_accuracy. epsilon: the smallest "
        "epsilon that reaches min_utility. frontier: both, weighed against each other.",
    )
    min_utility: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None, Allowed("null or a number from 0 to 1")
    ] = Field(default=None, description="For the objective epsilon: the least eval_accuracy.")
    max_refused: PositiveWhole = Field(
        default=100,
        description="After so many refused configurations in a row the search has ended.",
    )


SEARCHES: dict[str, type[BaseModel]] = {
    "optuna": OptunaSpec,
    "quasi_random": QuasiRandomSpec,
    "random": RandomSpec,
}


def _random_unless_named(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {"name": "random", **cast("dict[str, Any]", value)}


SearchSpec = Annotated[
    RandomSpec | QuasiRandomSpec | OptunaSpec,
    Field(discriminator="name"),
    BeforeValidator(_random_unless_named),
    Allowed("{num_samples: ...} or {name: optuna, num_samples: ...}"),
]
