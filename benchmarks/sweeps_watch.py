"""What a worker does, as it says itself: steps, compilations, what it puts on the device.

`watch` is called in a worker's process, ours or plain Ray Tune's, before its first trial. It wraps
parts of the trainer, listens to JAX, and appends a line for each thing to a file of that process
below the folder that the environment names. `read` gives what all of them wrote.
"""

import dataclasses
import functools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "DP_SWEEPS_BENCHMARK_FOLDER"
STEP_PROGRAM = "program"
"""The name of the compiled program that takes steps (`trainer.training.resident`)."""

_COMPILED = "/jax/core/compile/backend_compile_duration"
_TRACED = "/jax/core/compile/jaxpr_trace_duration"
_CACHE_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass(frozen=True)
class Worker:
    """What one process wrote.

    Attributes:
        process: Its id.
        training_secs: Of each trial, in order, the time inside its steps; of a trial whose
            program is new, tracing and compilation with them.
        compiled: By trial, in order, how often XLA compiled each function. What the persistent
            cache had is not compiled.
        cached: Likewise, what the persistent cache had.
        traced: Likewise, how often JAX traced each function.
        loaded: How often a data set was read into memory.
        placed: How often one was put on the device.
    """

    process: int
    training_secs: list[float]
    compiled: list[Counter[str]]
    cached: list[Counter[str]]
    traced: list[Counter[str]]
    loaded: int
    placed: int


def read(folder: Path) -> list[Worker]:
    """What all workers wrote.

    Raises:
        RuntimeError: Nobody wrote anything, so that there is nothing to compare.
    """
    workers = [
        _worker(int(path.stem), [json.loads(line) for line in path.read_text().splitlines()])
        for path in sorted(folder.glob("*.jsonl"))
    ]
    workers = [worker for worker in workers if worker.training_secs]
    if not workers:
        raise RuntimeError(f"{folder}: no worker was watched")
    return workers


def _worker(process: int, lines: list[dict[str, Any]]) -> Worker:
    count = 1 + max((line["trial"] for line in lines), default=-1)
    secs = [0.0] * count
    counters: dict[str, list[Counter[str]]] = {
        kind: [Counter() for _ in range(count)] for kind in ("compiled", "cached", "traced")
    }
    kinds = Counter(line["kind"] for line in lines)
    for line in lines:
        # What comes before the first trial belongs to it.
        trial = max(0, line["trial"])
        if line["kind"] == "steps":
            secs[trial] += line["secs"]
        elif line["kind"] in counters:
            counters[line["kind"]][trial][line["name"]] += 1
    return Worker(process, secs, **counters, loaded=kinds["loaded"], placed=kinds["placed"])


@functools.cache
def watch() -> None:
    """Has this process write down what it does from here on."""
    import jax
    from jax import monitoring

    from trainer import trial as trials

    file = (Path(os.environ[FOLDER_VARIABLE]) / f"{os.getpid()}.jsonl").open("a", buffering=1)
    number = -1
    here = threading.local()

    def note(kind: str, **facts: Any) -> None:
        file.write(json.dumps({"kind": kind, "trial": number, **facts}) + "\n")

    def name_in(facts: dict[str, Any]) -> str:
        return str(facts.get("fun_name")).removeprefix("jit(").removesuffix(")")

    def on_event(event: str, **_: Any) -> None:
        if event == _CACHE_HIT:
            here.hit = True

    def on_duration(event: str, duration_secs: float, **facts: Any) -> None:
        if event == _COMPILED:
            hit, here.hit = getattr(here, "hit", False), False
            note("cached" if hit else "compiled", name=name_in(facts))
        elif event == _TRACED:
            note("traced", name=name_in(facts))

    monitoring.register_event_listener(on_event)
    monitoring.register_event_duration_secs_listener(on_duration)

    begin, advance = trials.Trial.__init__, trials.Trial.advance

    def watched_begin(self: trials.Trial, *args: Any, **kwargs: Any) -> None:
        nonlocal number
        number += 1
        begin(self, *args, **kwargs)

    def watched_advance(self: trials.Trial, *args: Any, **kwargs: Any) -> trials.Start:
        start = time.perf_counter()
        after = jax.block_until_ready(advance(self, *args, **kwargs))
        note("steps", secs=time.perf_counter() - start)
        return after

    def counted(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            note(kind)
            return function(*args)

        return call

    trials.Trial.__init__ = watched_begin
    trials.Trial.advance = watched_advance
    trials.load = counted("loaded", trials.load)
    trials.resident_data = counted("placed", trials.resident_data)
