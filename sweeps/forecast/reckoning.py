"""From what trials were seen to take to what a plan will take.

A trial takes ``start + iterations * step`` seconds of a worker. ``step`` depends on the batch:
between two batches that were measured it is taken to lie on a line, for a step is work per example
and work besides. The first trial of a shape on each worker starts as slowly as any that was seen,
since it compiles; those after it as most did.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Hashable, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from sweeps.admission import Plan
from sweeps.database.checkpoint_rows import KEPT_CHECKPOINTS
from sweeps.database.store import Store
from sweeps.database.tables import existing_ledger
from sweeps.errors import DatabaseError, StoreError
from sweeps.forecast.calibration import calibrate
from sweeps.forecast.earlier_trials import earlier_trials
from sweeps.forecast.measured import Measured, family_of
from sweeps.home import Home
from sweeps.spec.scheduler_spec import FifoSpec
from sweeps.spec.sweep_spec import SweepSpec
from trainer.config import TrialConfig


@dataclasses.dataclass(frozen=True)
class Range:
    """A number that is foreseen: the best guess, and what it lies between by all that was seen."""

    about: float
    least: float
    most: float

    def times(self, factor: float) -> "Range":
        """The same, so many times."""
        return Range(self.about * factor, self.least * factor, self.most * factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a plan will take of machines.

    Attributes:
        trials: How many trials it is about: those that are admitted, or under private_selection
            as many as are run on average, and those that the search proposes later.
        unknown_trials: For how many of them there is nothing to go by; they are left out.
        concurrent: Workers at a time.
        trials_per_worker: Trials at a time in each, at most.
        is_most: Whether trials may be pruned, or a rule of the stop section may end the sweep
            before: then this is the most that it takes.
        origin: Where all of it comes from, in words; where nothing is known, what would tell.
        accelerator_hours: As ``stop.accelerator_hours`` counts: hours of workers, each times its
            GPUs, or its CPUs where it has none. None where nothing is known.
        wall_secs: From the first trial's start to the last one's end, if so many run at a time
            as the specification allows; None where nothing is known.
        checkpoint_bytes: On disk in the end, one for each trial that ran; None where unknown.
        most_checkpoint_bytes: On disk at most, while trials run; likewise.
    """

    trials: float
    unknown_trials: float
    concurrent: int
    trials_per_worker: int
    is_most: bool
    origin: str
    accelerator_hours: Range | None = None
    wall_secs: Range | None = None
    checkpoint_bytes: int | None = None
    most_checkpoint_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return dataclasses.asdict(self)


def forecast(
    plan: Plan,
    home: Home,
    *,
    calibrated: bool = False,
    on_trial: Callable[[], None] = lambda: None,
) -> Forecast:
    """Foresees what a plan will take.

    Args:
        plan: The plan.
        home: Where earlier trials are recorded. Nothing is written to it.
        calibrated: Whether to measure here and now, on random data, instead of looking there.
        on_trial: Called after each trial that is measured (`calibration.chosen`).

    Raises:
        SweepError: If it cannot be measured.
    """
    if calibrated:
        measured = calibrate(plan, on_trial)
        wheres = sorted({one.where for one in measured})
        origin = f"calibrated here on {', '.join(wheres)} with random data"
        if plan.spec.resources.trials_per_worker == 1:
            return reckon(plan, measured, origin)
        origin += ", each trial by itself"  # what they save together is left out
        return dataclasses.replace(reckon(plan, measured, origin), is_most=True)
    try:
        with closing(existing_ledger(home, check=False)) as ledger:
            measured = earlier_trials(plan, Store(ledger))
    except StoreError:  # there is none yet
        measured = []
    except DatabaseError as error:  # what is decided does not rest on it
        return dataclasses.replace(reckon(plan, [], ""), origin=f"unknown: {error}")
    wheres = sorted({one.where for one in measured})
    others = f" and {len(wheres) - 3} more" if len(wheres) > 3 else ""
    count = f"{len(measured)} earlier trial{'s' * (len(measured) != 1)}"
    return reckon(plan, measured, f"from {count} on {', '.join(wheres[:3])}{others}")


def reckon(plan: Plan, measured: Sequence[Measured], origin: str) -> Forecast:
    """What a plan will take, if its trials are like those that were measured.

    Args:
        plan: The plan.
        measured: What trials were seen to take; those of other shapes are left out.
        origin: Where that comes from, in words.
    """
    spec, resources = plan.spec, plan.spec.resources
    configs = [one.config for one in plan.admitted if one.config is not None]
    in_all = float(len(configs) + plan.proposed_later)
    concurrent, width, at_least = resources.max_concurrent_trials, resources.trials_per_worker, 1
    if plan.selection is not None and configs:
        # One after the other, and the best so far beside the one that runs.
        in_all, concurrent, at_least = plan.selection.mean, 1, 2
    stops = any(value is not None for value in spec.stop.model_dump().values())
    unknown = Forecast(
        trials=in_all,
        unknown_trials=in_all,
        concurrent=concurrent,
        trials_per_worker=width,
        is_most=stops or not isinstance(spec.scheduler, FifoSpec),
        origin="unknown, for no trial of these shapes ran yet; --calibrate measures it"
        if configs
        else "unknown, for none of those listed is admitted",
    )
    known = _known(configs, measured, concurrent * width)
    if not known:
        return unknown
    # What is drawn or proposed beyond the list is taken to be like the list.
    share = in_all / len(configs)
    count = len(known) * share
    longest = _by_each(max, [each.secs for each in known])
    total = _by_each(sum, [each.secs for each in known]).times(share)
    total = _stopped(total, longest, count, spec)
    workers = max(1.0, min(float(concurrent), count))
    each_has = max(1.0, min(float(width), count / concurrent))
    sizes = [each.checkpoint_bytes for each in known if each.checkpoint_bytes is not None]
    kept = most = None
    if len(sizes) == len(known):
        kept = max(sizes) if plan.selection is not None else round(sum(sizes) * share)
        # While it runs, a trial has some more, and one that is being written.
        most = kept + round(max(sizes) * KEPT_CHECKPOINTS * max(at_least, workers * each_has))
    return dataclasses.replace(
        unknown,
        unknown_trials=in_all - count,
        accelerator_hours=total.times(_devices(spec) / 3600),
        wall_secs=_by_each(max, [total.times(1 / workers), longest.times(each_has)]),
        checkpoint_bytes=kept,
        most_checkpoint_bytes=most,
        origin=origin,
    )


def _devices(spec: SweepSpec) -> float:
    return spec.resources.gpus_per_trial or spec.resources.cpus_per_trial


def _stopped(total: Range, longest: Range, count: float, spec: SweepSpec) -> Range:
    """Seconds of all workers, where a rule of stop may end the sweep; what runs then goes on."""
    rule, workers = spec.stop, spec.resources.max_concurrent_trials
    at_once = workers * spec.resources.trials_per_worker
    if rule.trials is not None and rule.trials < count:
        total = _by_each(min, [total, longest.times(rule.trials + at_once - 1)])
    if rule.accelerator_hours is not None:
        secs = _fixed(rule.accelerator_hours * 3600 / _devices(spec))
        total = _by_each(min, [total, _by_each(sum, [secs, longest.times(at_once)])])
    if rule.time_budget_s is not None:
        secs = _fixed(rule.time_budget_s * workers)
        total = _by_each(min, [total, _by_each(sum, [secs, longest.times(at_once)])])
    return total


@dataclasses.dataclass(frozen=True)
class _Known:
    """What one trial will take."""

    secs: Range
    checkpoint_bytes: int | None


def _known(
    configs: Sequence[TrialConfig], measured: Sequence[Measured], at_once: int
) -> list[_Known]:
    """What each trial will take of which something is known; so many begin at once."""
    families: dict[Hashable, list[Measured]] = collections.defaultdict(list)
    for one in measured:
        families[family_of(one.config)].append(one)
    begun: collections.Counter[Hashable] = collections.Counter()
    found: list[_Known] = []
    for config in configs:
        family = family_of(config)
        step = _step(config.sampling_prob, families[family])
        if step is None:
            continue
        starts = [one.start_secs for one in families[family]]
        usual, slowest = statistics.median_low(starts), max(starts)
        shape = (family, config.sampling_prob)
        begun[shape] += 1
        compiles = begun[shape] <= at_once
        start = Range(slowest if compiles else usual, min(starts), slowest)
        sizes = [one.checkpoint_bytes for one in families[family]]
        size = max((each for each in sizes if each is not None), default=None)
        secs = _by_each(sum, [start, step.times(config.iterations)])
        found.append(_Known(secs, size))
    return found


def _step(sampling_prob: float, measured: Sequence[Measured]) -> Range | None:
    """Seconds of a step, on the line between the nearest batches; None outside of all."""
    by_batch: dict[float, list[float]] = collections.defaultdict(list)
    for one in measured:
        by_batch[one.config.sampling_prob].append(one.step_secs)
    batches = sorted(by_batch)
    if not batches or not batches[0] <= sampling_prob <= batches[-1]:
        return None

    def at(statistic: Callable[[Sequence[float]], float]) -> float:
        there = [statistic(by_batch[batch]) for batch in batches]
        return float(np.interp(sampling_prob, batches, there))

    return Range(at(statistics.median), at(min), at(max))


def _fixed(value: float) -> Range:
    return Range(value, value, value)


def _by_each(combine: Callable[[list[float]], float], ranges: Sequence[Range]) -> Range:
    """Combines the guesses, the least and the most of some ranges."""
    return Range(
        combine([each.about for each in ranges]),
        combine([each.least for each in ranges]),
        combine([each.most for each in ranges]),
    )
