"""What would still fit into a budget, as plain values: for the table and the JSON of it."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """One kind of trial, and how many more of it would fit.

    Attributes:
        sampling_prob: Of the trial's mechanism; 0 for a selection.
        noise_multiplier: Likewise.
        iterations: Likewise.
        mechanism: What else the mechanism is, in words; empty for DP-SGD.
        what: A selection in words; empty for a trial.
        asked: How many of them there are where the kind was found.
        more: How many more would be admitted, made together; None for any number.
        at_least: Whether counting stopped at `more`.
    """

    sampling_prob: float = 0.0
    noise_multiplier: float = 0.0
    iterations: int = 0
    mechanism: str = ""
    what: str = ""
    asked: int
    more: int | None
    at_least: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """What would still fit.

    Attributes:
        heading: What the kinds of trials are taken from.
        asked_heading: Over the column of `Fit.asked`.
        fits: One per kind.
        hidden: Kinds that are left out.
        whole: Whether a whole specification fits, in words; None where there is none.
        whole_fits: Whether it does; None where there is none.
        admitted: How many trials of it would be admitted; None where there is none.
        epsilon_after: What would be taken of the budget then; None under per_trial and where
            there is no specification.
        obstacle: What refuses everything, whatever it costs; else empty.
        note: A remark on the numbers; else empty.
    """

    heading: str
    asked_heading: str
    fits: Sequence[Fit] = ()
    hidden: int = 0
    whole: str | None = None
    whole_fits: bool | None = None
    admitted: int | None = None
    epsilon_after: float | None = None
    obstacle: str = ""
    note: str = ""
