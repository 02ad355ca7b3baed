"""What a private selection runs, drawn from one secret: how many trials, and what each of them is.

    secret, 256 bits of the operating system's entropy
      -> how many trials, by the law of `privacy.selection`
      -> of each trial, by its number alone: a value of every field by its domain, drawn again
         until the budget pays for such a trial

The trials are independent of each other and identically distributed, and nothing of this looks at
data or results: that is what repeat-and-select assumes (`accounting.selection`). The draws follow
from the secret, so whoever goes on with a selection after a crash draws the same again: a count
that is drawn until one likes it would not have the law that was paid for.
"""

import dataclasses
import functools
import hashlib
import random
from typing import Any

from accounting import Mechanism, Selection
from accounting.selection import draw_count
from sweeps.errors import SweepError
from sweeps.search_space import (
    Hyperparameters,
    hyperparameters,
    in_order,
    sampling_prob,
    trial_config,
    value_at,
)
from sweeps.spec.domains import CALIBRATED, Value
from sweeps.spec.sweep_spec import SweepSpec
from trainer.config import TrialConfig
from trainer.errors import ConfigError
from trainer.training.plan import mechanism_of

SECRET_BYTES = 32
# Of what is drawn, something is not paid for where admission refused some of the candidates, and
# something is not allowed where values do not go together. Which is public.
_MOST_TRIES = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawnTrial:
    """One trial of a private selection.

    Attributes:
        setting: A value of each field of the search space.
        config: What is trained.
    """

    setting: Hyperparameters
    config: TrialConfig

    @property
    def shown(self) -> dict[str, Any]:
        """The hyperparameters by name, as a person sees those of any trial."""
        config = self.config
        return {
            **dataclasses.asdict(self.setting),
            "expected_batch_size": config.expected_batch_size,
            "sampling_prob": config.sampling_prob,
            "noise_multiplier": config.noise_multiplier,
        }


class SelectionDraws:
    """The number of trials of a private selection, and its trials. All of it is secret.

    Args:
        secret: `SECRET_BYTES` secret bytes.
        spec: A specification under private_selection.
        selection: What its budget pays for. A trial that it does not cover is never drawn.
        num_units: How many units the data set holds, as in `sweeps.search_space`.
    """

    def __init__(
        self, secret: bytes, spec: SweepSpec, selection: Selection, num_units: int | None
    ) -> None:
        if len(secret) != SECRET_BYTES:
            raise ValueError(f"secret has {len(secret)} bytes: allowed is {SECRET_BYTES}")
        self._secret, self._spec, self._selection = secret, spec, selection
        self._num_units = num_units
        self._domains = in_order(spec)

    @functools.cached_property
    def count(self) -> int:
        """How many trials there are; under "poisson" possibly none."""
        return draw_count(self._selection, _Stream(self._secret, b"count", 0))

    def trial(self, number: int) -> DrawnTrial:
        """One of the trials.

        Args:
            number: Its place, from 0.

        Raises:
            SweepError: The budget pays for hardly anything that the specification can draw.
        """
        stream = _Stream(self._secret, b"trial", number)
        for _ in range(_MOST_TRIES):
            values: dict[str, Value] = {}
            for name, domain in self._domains.items():
                values[name] = value_at(domain.given(values), stream.random())
            setting = hyperparameters(values)
            for noise in self._noises(setting):
                if (config := self._paid_for(setting, noise)) is not None:
                    return DrawnTrial(setting=setting, config=config)
        raise SweepError("its budget pays for hardly anything that its specification can draw")

    def _noises(self, setting: Hyperparameters) -> list[float]:
        """The noise of a setting; where it is calibrated, what admission may have found."""
        if setting.noise_multiplier != CALIBRATED:
            return [float(setting.noise_multiplier)]
        prob = sampling_prob(self._spec, setting, self._num_units)
        paid = {m.noise_multiplier for m in self._selection.candidates if m.sampling_prob == prob}
        # The least that covers it: what it was calibrated to.
        return sorted(paid)

    def _paid_for(self, setting: Hyperparameters, noise: float) -> TrialConfig | None:
        """A setting as a trial; None if it is not allowed, or costs more than what is paid for."""
        try:
            config = trial_config(
                self._spec, setting, num_units=self._num_units, noise_multiplier=noise
            )
        except ConfigError:
            return None
        mechanism = mechanism_of(config)
        covered = any(_covers(paid, mechanism) for paid in self._selection.candidates)
        return config if covered else None


def _covers(paid: Mechanism, mechanism: Mechanism) -> bool:
    """Whether a mechanism costs at most what another does: more noise, and less of the rest."""
    return (
        type(paid) is type(mechanism)
        and paid.noise_multiplier <= mechanism.noise_multiplier
        and paid.sampling_prob >= mechanism.sampling_prob
        and paid.repetitions >= mechanism.repetitions
        and paid.neighboring_relation == mechanism.neighboring_relation
        and paid.privacy_unit == mechanism.privacy_unit
    )


class _Stream(random.Random):
    """Uniform numbers that follow from a secret, a purpose and a number: keyed BLAKE2b."""

    def __init__(self, secret: bytes, purpose: bytes, number: int) -> None:
        super().__init__(0)  # of Python's own generator, which is not asked
        self._secret, self._purpose, self._number = secret, purpose, number
        self._taken = 0

    def random(self) -> float:
        """The next one, a multiple of 2^-53 in [0, 1)."""
        place = self._number.to_bytes(8, "little") + self._taken.to_bytes(8, "little")
        self._taken += 1
        digest = hashlib.blake2b(place, key=self._secret, person=self._purpose, digest_size=8)
        return (int.from_bytes(digest.digest(), "little") >> 11) * 2.0**-53
