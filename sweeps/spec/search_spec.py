"""The search section: how trials are drawn from the search space."""

from typing import Annotated

from pydantic import Field

from sweeps.spec.refusals import Allowed
from sweeps.spec.section import Section, Seed

MAX_TRIALS = 100_000


class SearchSpec(Section):
    """How many trials are drawn from the search space."""

    num_samples: Annotated[
        int, Field(ge=1, le=MAX_TRIALS), Allowed(f"a whole number from 1 to {MAX_TRIALS}")
    ] = Field(
        default=1,
        description="How often the grid is run; random domains are drawn anew each time.",
    )
    seed: Seed = Field(default=0, description="Seed of the random domains. It is public.")
