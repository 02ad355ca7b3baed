"""The parts of a trial's configuration that are about how it trains; see `trainer.config`.

Each has defaults under which it does nothing, so that a configuration names what it uses.
"""

import dataclasses
from typing import Literal, get_args

from trainer._validate import number, one_of, whole
from trainer.errors import ConfigError

Protection = Literal["public", "dp", "non_private"]

# A crop by more than this leaves little of any image that fits a benchmark.
MOST_PADDING = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismConfig:
    """Which mechanism a trial runs; the defaults are DP-SGD with Poisson sampling of examples.

    Sampling everybody in every step (``sampling_prob`` 1) is the full-batch mechanism and needs
    nothing here.

    Attributes:
        bands: Over how many steps noise is correlated (banded matrix factorisation;
            Choquette-Choo et al. 2023), >= 1; 1 is independent noise. With more, each unit
            belongs to one of ``bands`` groups, step t draws from group t mod ``bands`` alone,
            and ``sampling_prob`` is within the group.
        truncated_batch_size: Largest batch, >= 1: larger draws lose units at random, which is
            accounted for. None truncates nothing.
        num_units: How many units the data hold, public; needed with truncation, and only there.
        examples_per_user: Where users are protected, how many examples of each user drawn a step
            uses, >= 1; those of who has more are drawn.
    """

    bands: int = 1
    truncated_batch_size: int | None = None
    num_units: int | None = None
    examples_per_user: int | None = None

    def __post_init__(self) -> None:
        whole("mechanism.bands", self.bands, least=1)
        for field in ("truncated_batch_size", "num_units", "examples_per_user"):
            value = getattr(self, field)
            if value is not None:
                whole(f"mechanism.{field}", value, least=1)
        truncated = self.truncated_batch_size is not None
        if truncated and self.bands > 1:
            raise ConfigError(
                f"mechanism.truncated_batch_size={self.truncated_batch_size!r}: allowed with "
                f"bands={self.bands} is none, for their combination is not accounted"
            )
        if truncated != (self.num_units is not None):
            raise ConfigError(
                f"mechanism.num_units={self.num_units!r}: allowed is the public number of units "
                "with truncated_batch_size, and none without"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random views of an example, whose gradients are averaged before clipping.

    Averaging before clipping costs no privacy: an example still adds one clipped gradient to the
    sum (augmentation multiplicity; De et al. 2022, section 3.4).

    Attributes:
        views: Views of an example in a step, >= 1.
        flip: Whether a view is mirrored left to right, with probability 1/2.
        crop_padding: Pixels, >= 0: a view is a crop, at random, of the image padded by so many
            pixels on each side by reflection.
    """

    views: int = 1
    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        whole("augmentation.views", self.views, least=1)
        whole("augmentation.crop_padding", self.crop_padding, least=0)
        if self.crop_padding > MOST_PADDING:
            raise ConfigError(
                f"augmentation.crop_padding={self.crop_padding!r}: allowed is at most "
                f"{MOST_PADDING}"
            )
        if not isinstance(self.flip, bool):
            raise ConfigError(f"augmentation.flip={self.flip!r}: allowed is true or false")
        if self.views > 1 and not self.is_random:
            raise ConfigError(
                f"augmentation.views={self.views}: allowed without flip and crop_padding is 1, "
                "for all views would be the same"
            )

    @property
    def is_random(self) -> bool:
        """Whether views differ from the example at all."""
        return self.flip or self.crop_padding > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AveragingConfig:
    """Averages of the iterates, evaluated beside the last one; they cost no privacy.

    Attributes:
        ema_decay: Decay of an exponential moving average in (0, 1), warmed up as De et al. 2022
            do; None for none.
        polyak: Whether the mean of all iterates is kept (Polyak & Juditsky 1992).
    """

    ema_decay: float | None = None
    polyak: bool = False

    def __post_init__(self) -> None:
        if self.ema_decay is not None:
            number("averaging.ema_decay", self.ema_decay, low=0.0, high=1.0, or_high=False)
        if not isinstance(self.polyak, bool):
            raise ConfigError(f"averaging.polyak={self.polyak!r}: allowed is true or false")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How the examples on which a trial is measured are protected.

    Attributes:
        protection: ``public``: they are public, and accuracies are exact. ``dp``: they are
            private, and a report counts its right answers with noise, a mechanism of its own with
            an account of its own (`trainer.training.plan.evaluation_mechanism`). ``non_private``:
            they are private and accuracies are exact: reports hold them as private fields, which
            leave the trainer only for those who ask for them by that name.
        noise_multiplier: For ``dp``: standard deviation of the noise on a count, > 0.
    """

    protection: Protection = "public"
    noise_multiplier: float | None = None

    def __post_init__(self) -> None:
        one_of("evaluation.protection", self.protection, get_args(Protection))
        if self.noise_multiplier is not None:
            number("evaluation.noise_multiplier", self.noise_multiplier, low=0.0)
        if (self.protection == "dp") != (self.noise_multiplier is not None):
            allowed = "a number > 0" if self.protection == "dp" else "none"
            raise ConfigError(
                f"evaluation.noise_multiplier={self.noise_multiplier!r}: allowed with protection "
                f"{self.protection} is {allowed}"
            )
