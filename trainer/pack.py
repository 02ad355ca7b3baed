"""Several trials in one process that take their steps together.

A small model leaves an accelerator idle, whatever the batch. In a pack, trials whose steps one
program can take (`trainer.training.packed`) wait for each other: each runs on its own to where it
wants steps, then all of them get theirs in one call, and so it is with measuring. Everything else
is a trial's own: it charges before anything of its steps leaves, checkpoints, reports, fails, and
is ended by itself, and nobody else notices.

    pack = Pack(2)
    running = [packed_reports(pack, config, data_home=...) for config in configs]
    for report in map(next, running):   # None: it waits
        ...
    pack.run()                          # once all of them wait

Which trials share a program is seen from what they are; those that cannot run alone, each in its
turn: streamed ones, those on several devices, those of correlated noise, which are bound to one
lane for good, and those for which there is no lane left.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Generator, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import jax

from trainer.beginning import tree_digest
from trainer.device_memory import is_out_of_memory
from trainer.errors import PackTooLarge
from trainer.training.evaluation import Utility, evaluate_packed
from trainer.training.packed import Lane, Share, in_lanes, take_steps
from trainer.training.runners import OnStep, ResidentRunner
from trainer.trial import Start, Trial


class Pack:
    """Trials that take their steps together. Not for several threads.

    Args:
        width: How many at most; the others run alone. A program is compiled for this many lanes,
            and a lane that no trial has is idle.
    """

    def __init__(self, width: int) -> None:
        self._free = [Lane(number, width) for number in range(width)]
        self._frozen: dict[str, Any] = {}
        self._groups: dict[Trial, Hashable] = {}
        self._steps: list[_Steps] = []
        self._measurements: list[_Measurement] = []

    @property
    def free(self) -> Sequence[Lane]:
        """The lanes that no trial has."""
        return tuple(self._free)

    @contextlib.contextmanager
    def holding(self, trial: Trial) -> Iterator[None]:
        """Gives a trial that has started the lane that it asks for, as long as the block lasts."""
        if trial.lane is None:
            yield
            return
        self._free.remove(trial.lane)
        # Trials that share a program share what it does not change, too: once on the device.
        digest = tree_digest(trial.frozen)
        trial.frozen = trial.runner.frozen = self._frozen.setdefault(digest, trial.frozen)
        data, sampler = id(trial.runner.data), trial.plan.sampler
        averages = (trial.config.averaging.ema_decay is None, trial.config.averaging.polyak)
        self._groups[trial] = (trial.recipe, data, sampler, averages, digest)
        try:
            yield
        finally:
            del self._groups[trial]
            self._free = sorted([*self._free, trial.lane])

    def advance(
        self, trial: Trial, at: Start, stop: int, on_step: OnStep
    ) -> Generator[None, None, Start]:
        """As `Trial.advance`; yields while the trial waits for the others.

        Raises:
            PackTooLarge: The trials do not fit on the device together.
        """
        if trial.lane is None:
            return trial.advance(at, stop, on_step)
        wanted = _Steps(trial, at, stop, on_step)
        yield from _waiting(self._steps, wanted)
        return wanted.at

    def utilities(self, trial: Trial, at: Start) -> Generator[None, None, dict[str, Utility]]:
        """As `Trial.utilities`; yields while the trial waits for the others.

        Raises:
            PackTooLarge: As in `advance`. Measured alone it could come out otherwise than when its
                branch is gone on with, and a count under the same noise would tell the difference.
        """
        if trial.lane is None:
            return trial.utilities(at)
        wanted = _Measurement(trial, trial.models(at), {})
        yield from _waiting(self._measurements, wanted)
        return wanted.utilities

    def run(self) -> None:
        """Measures what waits to be measured; else takes steps, up to where a trial has its own.

        To be called once every trial of the pack waits: one that is late takes its steps later.
        What goes wrong is raised where the trials wait that it concerns.
        """
        if self._measurements:
            for of_group in self._grouped(self._measurements):
                with _failing(of_group):
                    _measure(of_group)
            return
        for of_group in self._grouped(self._steps):
            with _failing(of_group):
                _take(of_group)

    def _grouped(self, wanted: "Sequence[_W]") -> "list[list[_W]]":
        """Those that one program can serve, together."""
        groups: dict[Hashable, list[_W]] = defaultdict(list)
        for each in wanted:
            if not each.is_done:
                groups[self._groups[each.trial]].append(each)
        return list(groups.values())


@dataclasses.dataclass(eq=False)
class _Wanted:
    """What a trial waits for.

    Attributes:
        trial: The trial.
        error: Why it gets nothing.
    """

    trial: Trial
    error: Exception | None = dataclasses.field(default=None, init=False)

    @property
    def is_done(self) -> bool:
        return self.error is not None


@dataclasses.dataclass(eq=False)
class _Steps(_Wanted):
    at: Start
    stop: int
    on_step: OnStep

    @property
    def is_done(self) -> bool:
        return self.error is not None or self.at.step >= self.stop


@dataclasses.dataclass(eq=False)
class _Measurement(_Wanted):
    models: dict[str, Any]
    utilities: dict[str, Utility]

    @property
    def is_done(self) -> bool:
        return self.error is not None or bool(self.utilities)


_W = TypeVar("_W", bound=_Wanted)


def _waiting(line: list[_W], wanted: _W) -> Generator[None]:
    line.append(wanted)
    try:
        while not wanted.is_done:
            yield
    finally:
        line.remove(wanted)
    if wanted.error is not None:
        raise wanted.error


@contextlib.contextmanager
def _failing(wanted: Sequence[_Wanted]) -> Iterator[None]:
    """Tells those concerned of an error."""
    try:
        yield
    except Exception as error:
        for each in wanted:
            each.error = each.error or _told(error, len(wanted))


def _told(error: Exception, count: int) -> Exception:
    if not is_out_of_memory(error):
        return error
    told = PackTooLarge(f"{count} trials at once: out of memory; allowed is fewer, or one alone")
    told.__cause__ = error
    return told


def _take(group: list[_Steps]) -> None:
    count = min(each.stop - each.at.step for each in group)
    shares: list[Share] = []
    for each in group:
        runner = each.trial.runner
        assert isinstance(runner, ResidentRunner)  # others run alone
        shares.append(Share(_lane(each.trial), runner, each.at.state, each.at.keys, each.at.step))

    def on_steps(taken: int) -> None:
        for each in group:
            if each.error is None:
                with _failing([each]):
                    each.on_step(each.at.step + taken)

    states = jax.block_until_ready(take_steps(group[0].trial.recipe, shares, count, on_steps))
    for each, state in zip(group, states, strict=True):
        each.at = each.at._replace(state=state, step=each.at.step + count)


def _measure(group: list[_Measurement]) -> None:
    trial = group[0].trial
    images, labels = trial.eval_arrays()
    for prefix in group[0].models:
        params = in_lanes({_lane(each.trial): each.models[prefix] for each in group})
        found = evaluate_packed(trial.network, params, trial.frozen, images, labels)
        for each in group:
            each.utilities[prefix] = found[_lane(each.trial).number]


def _lane(trial: Trial) -> Lane:
    assert trial.lane is not None  # those that have none run alone
    return trial.lane
