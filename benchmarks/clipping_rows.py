"""What the clipping benchmark notes about an engine, and how it takes time.

Machines are noisy, and shared ones noisier. So engines take turns: in each round every engine
is called once, and its time is compared with that of the plain gradient in the same round.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# A turn of a fast engine is several calls, so that what the engine before it left in the caches
# does not count for much.
_TURN_SECONDS = 0.05


@dataclass
class Row:
    """One engine on one model.

    Attributes:
        model: Name of the case.
        library: ``jax`` or ``torch``; ratios are taken within a library.
        engine: ``plain`` is the ordinary, non-private gradient.
        batch_size: Examples of one call.
        seconds: Time per call, one figure per round.
        ratio: Time over the plain gradient's, median of rounds.
        ratio_of_least: The same, shortest time over shortest time.
        compile_seconds: Lowering and compilation.
        compile_ratio: Over the plain gradient's.
        temporary_bytes: What the program needs beside arguments and outputs.
        temporary_ratio: Over the plain gradient's.
        argument_bytes: Parameters and batch.
        output_bytes: The result.
        bytes_per_example: By how much temporary memory grows with each example.
        examples: The largest batch whose temporary memory is no more than that of ``vmap``
            with ``batch_size`` examples.
        distance: Relative L2 distance of the result from that of per-example clipping with
            the library's own engine.
        note: Why figures are missing.
    """

    model: str
    library: str
    engine: str
    batch_size: int
    seconds: list[float] = field(default_factory=list)
    ratio: float | None = None
    ratio_of_least: float | None = None
    compile_seconds: float | None = None
    compile_ratio: float | None = None
    temporary_bytes: int | None = None
    temporary_ratio: float | None = None
    argument_bytes: int | None = None
    output_bytes: int | None = None
    bytes_per_example: float | None = None
    examples: int | None = None
    distance: float | None = None
    note: str = ""


def timed(work: Callable[[], object]) -> float:
    """Seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turn(call: Callable[[], object]) -> float:
    """Seconds per call of as many calls as a turn holds, one at least."""
    start, calls = time.perf_counter(), 0
    while True:
        call()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= _TURN_SECONDS:
            return passed / calls


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    budget: float,
    tell: Callable[[str], None],
) -> dict[str, list[float]]:
    """Times of every call in every round.

    Args:
        calls: What to time, warmed up; each returns when its work is done.
        rounds: How often each gets its turn.
        budget: Seconds after which a call gets no further turns.
        tell: Called with the name of the call whose turn it is.

    Returns:
        For each name its times in the order of rounds; fewer where the budget was spent.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        for name, call in calls.items():
            if spent[name] < budget:
                tell(name)
                spent[name] += timed(lambda c=call, n=name: times[n].append(turn(c)))
    return times


def compare(row: Row, plain: Row) -> None:
    """Fills a row's ratios to the plain gradient of the same model and library."""
    if row.seconds and plain.seconds:
        rounds = zip(row.seconds, plain.seconds, strict=False)
        row.ratio = statistics.median(theirs / least for theirs, least in rounds)
        row.ratio_of_least = min(row.seconds) / min(plain.seconds)
    if row.compile_seconds and plain.compile_seconds:
        row.compile_ratio = row.compile_seconds / plain.compile_seconds
    if row.temporary_bytes is not None and plain.temporary_bytes:
        row.temporary_ratio = row.temporary_bytes / plain.temporary_bytes
