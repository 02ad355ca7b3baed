"""Which engine, and how many examples at a time: measured once, then remembered.

No engine wins everywhere. Which one does depends on the model, the shapes, the device and the
compiler, so `choose` runs them, on made-up data of the same shapes: nothing private steers it.
What was chosen is kept on disk, one file for each (program, shapes, device, versions), with the
measurements that it rests on, and is said once through the logger ``trainer.clipping``.

The largest microbatch that fits is the whole batch or what is left of it by halving: halved while
the compiled program wants more memory than the device has, or runs out of it when run. A smaller
one is tried as well and taken if it is faster.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from trainer.clipping.engines import rows_alone
from trainer.clipping.loss import Batch, Problem
from trainer.clipping.running import Clipping, EngineName, run
from trainer.device_memory import free_bytes, is_out_of_memory

LOGGER = logging.getLogger("trainer.clipping")

HOME_VARIABLE = "DP_SWEEPS_HOME"

_FORMAT = 1
_ENGINES: tuple[EngineName, ...] = ("book_keeping", "two_pass", "vmap")

# An engine's runs: at least two, more while they take less than this together.
_RUN_SECS = 0.3

# Another engine than the first has to be faster by more than what noise could feign.
_CLEARLY = 0.97

# Of the memory that is free when measuring; the rest of a training step needs some as well.
_MEMORY_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One engine at one size.

    Attributes:
        engine: Which.
        microbatch_size: Examples at a time, or None for all.
        secs: Median time of a batch, or None if it did not fit.
        temp_bytes: Memory that the compiled program wants beside its arguments and results.
    """

    engine: EngineName
    microbatch_size: int | None
    secs: float | None
    temp_bytes: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is run.

    Attributes:
        engine: Which.
        microbatch_size: Examples at a time, or None for all.
        reason: Why, in words.
        measurements: What it rests on; empty where there was nothing to measure.
    """

    engine: EngineName
    microbatch_size: int | None
    reason: str
    measurements: tuple[Measurement, ...] = ()

    @property
    def temp_bytes(self) -> int:
        """Memory that the chosen program wants; 0 where nothing was measured."""
        chosen = (self.engine, self.microbatch_size)
        runs = [m for m in self.measurements if (m.engine, m.microbatch_size) == chosen]
        return max((m.temp_bytes for m in runs if m.secs is not None), default=0)

    @property
    def fits(self) -> bool:
        """Whether the memory that is free now is enough for the chosen program."""
        return self.temp_bytes <= _MEMORY_SHARE * free_bytes()


def choose(
    problem: Problem, batch: Batch, clipping: Clipping, microbatch_size: int | None
) -> Choice:
    """The engine for a loss and the shapes of its arguments.

    Args:
        problem: The loss.
        batch: Its arguments; shapes alone are used, so they may be traced.
        clipping: The rule.
        microbatch_size: Examples at a time if that is settled, or None to choose it as well.

    Returns:
        The choice for exactly this program and device, measured now if it never was or if
        it would not fit the memory that is free.
    """
    if batch.size == 0:
        return Choice("book_keeping", microbatch_size, "there is nothing to compute")
    if rows_alone(problem, batch):
        reason = "no weight meets more than one row of an example, so there is nothing to weigh"
        return Choice("book_keeping", microbatch_size, reason)
    closed, _ = _closed(problem, batch)
    digest = _digest(closed, batch, clipping, microbatch_size)
    known = _remembered(digest)
    if known is not None and known.fits:
        return known
    choice = _measured(problem, batch, clipping, microbatch_size)
    # What fits while something else holds the memory is chosen for this process alone.
    _remember(digest, choice, on_disk=known is None)
    return choice


def _closed(problem: Problem, batch: Batch) -> tuple[Any, Any]:
    example = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in batch.examples]
    make = jax.make_jaxpr(problem.loss, return_shape=True)
    return make(batch.leaves, batch.shared, example)


def _digest(closed: Any, batch: Batch, clipping: Clipping, microbatch_size: int | None) -> str:
    """Names the program, its shapes, the device and the versions that compile for it."""
    device = jax.devices()[0]
    # Functions in an equation's parameters are printed with their address.
    program = re.sub(r"0x[0-9a-f]+", "", str(closed.jaxpr))
    facts = [
        _FORMAT,
        program,
        batch.size,
        microbatch_size,
        clipping.mode,
        clipping.nan_safe,
        clipping.rescale_to_unit_norm,
        clipping.spmd_axis_name,
        device.platform,
        device.device_kind,
        os.cpu_count() if device.platform == "cpu" else None,
        jax.__version__,
        importlib.metadata.version("jaxlib"),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


_KEPT_IN: ContextVar[Path | None] = ContextVar("kept_in", default=None)


@contextlib.contextmanager
def kept_in(folder: Path) -> Generator[None]:
    """Keeps what is chosen within a block in a folder, for who must not tell what it runs."""
    token = _KEPT_IN.set(folder)
    try:
        yield
    finally:
        _KEPT_IN.reset(token)


def _folder() -> Path:
    if (folder := _KEPT_IN.get()) is not None:
        return folder
    home = os.environ.get(HOME_VARIABLE) or Path.home() / ".dp-sweeps"
    return Path(home).expanduser() / "clipping"


@functools.lru_cache(maxsize=256)
def _in_memory(folder: Path, digest: str) -> list[Choice]:
    """A place for a choice of this process: also where no file can be written."""
    return []


def _remembered(digest: str) -> Choice | None:
    folder = _folder()
    place = _in_memory(folder, digest)
    if not place:
        try:
            record = json.loads((folder / f"{digest}.json").read_text())["choice"]
            measurements = tuple(Measurement(**m) for m in record.pop("measurements"))
            place.append(Choice(**record, measurements=measurements))
        except (OSError, ValueError, KeyError, TypeError):
            # Absent, or half a file of a machine that lost power: measured again.
            return None
    return place[0]


def _remember(digest: str, choice: Choice, on_disk: bool) -> None:
    folder = _folder()
    _in_memory(folder, digest)[:] = [choice]
    if not on_disk:
        return
    record = {
        "choice": dataclasses.asdict(choice),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
            json.dump(record, file, indent=2)
        Path(file.name).replace(folder / f"{digest}.json")
    except OSError as error:
        LOGGER.warning("the choice of a clipping engine cannot be kept: %s", error)


def _measured(
    problem: Problem, batch: Batch, clipping: Clipping, microbatch_size: int | None
) -> Choice:
    LOGGER.info("measuring clipping engines for a batch of %d examples, once", batch.size)
    # The caller may be tracing a program of its own, whose values are not numbers yet.
    with jax.ensure_compile_time_eval():
        bench = _Bench(problem, batch, clipping)
        results: list[Measurement] = []
        for engine in _ENGINES:
            results += bench.largest(engine, microbatch_size)
        if microbatch_size is None:
            results += bench.smaller(_fastest(results))
    choice = _best(results, batch.size)
    LOGGER.info("clipping by %s: %s", choice.engine, choice.reason)
    return choice


def _fastest(results: Sequence[Measurement]) -> Measurement | None:
    """The quickest that fitted; the earlier one of two that noise cannot tell apart."""
    best = None
    for result in results:
        if result.secs is None:
            continue
        if best is None or best.secs is None or result.secs < _CLEARLY * best.secs:
            best = result
    return best


def _best(results: Sequence[Measurement], batch_size: int) -> Choice:
    best = _fastest(results)
    if best is None or best.secs is None:
        # One example at a time by the engine that needs least; if that fails, it says so.
        return Choice("two_pass", 1, "nothing fitted the device's memory", tuple(results))
    others = []
    for engine in _ENGINES:
        runs = [r.secs for r in results if r.engine == engine and r.secs is not None]
        if engine != best.engine:
            others.append(f"{engine} {min(runs) / best.secs:.2g}x" if runs else f"{engine} no fit")
    size = "all" if best.microbatch_size is None else f"{best.microbatch_size}"
    reason = (
        f"{best.secs * 1e3:.3g} ms for {batch_size} examples, {size} at a time; "
        f"{', '.join(others)}"
    )
    return Choice(best.engine, best.microbatch_size, reason, tuple(results))


class _Bench:
    """Runs engines on made-up arguments."""

    def __init__(self, problem: Problem, batch: Batch, clipping: Clipping) -> None:
        closed, shape = _closed(problem, batch)
        tree = jax.tree.structure(shape)
        num_consts = len(closed.consts)

        def loss(leaves: Sequence[Any], shared: Sequence[Any], example: Sequence[Any]) -> Any:
            # What the caller's loss closed over may be traced: here it is an argument.
            program = core.ClosedJaxpr(closed.jaxpr, list(shared[:num_consts]))
            outputs = core.jaxpr_as_fun(program)(*leaves, *shared[num_consts:], *example)
            return jax.tree.unflatten(tree, outputs)

        rng = np.random.default_rng(0)
        make = functools.partial(_made_up, rng)
        self.problem = Problem(loss, problem.gradient_tree)
        self.batch = Batch(
            leaves=[make(leaf) for leaf in batch.leaves],
            shared=[make(x) for x in [*closed.consts, *batch.shared]],
            examples=[make(x) for x in batch.examples],
        )
        self.clipping = dataclasses.replace(clipping, l2_clip_norm=1.0)
        self.free_bytes = _MEMORY_SHARE * free_bytes()

    def largest(self, engine: EngineName, settled: int | None) -> Iterator[Measurement]:
        """Measures an engine at the size that is settled, or halves it until it fits."""
        size = settled
        result = self.time(engine, size)
        yield result
        while result.secs is None and size != 1 and settled is None:
            size = (size or self.batch.size) // 2 or 1
            result = self.time(engine, size)
            yield result

    def smaller(self, best: Measurement | None) -> Iterator[Measurement]:
        """Measures ever smaller sizes for as long as that is faster."""
        while best is not None and best.secs is not None:
            size = (best.microbatch_size or self.batch.size) // 4
            if size < 1:
                return
            result = self.time(best.engine, size)
            yield result
            if result.secs is None or result.secs > best.secs * _CLEARLY:
                return
            best = result

    def time(self, engine: EngineName, size: int | None) -> Measurement:
        """Compiles and runs one program."""
        is_padding = jnp.zeros(self.batch.size, bool)

        def program(leaves: Any, shared: Any, examples: Any) -> Any:
            batch = Batch(leaves, shared, examples)
            return run(engine, size, self.problem, batch, is_padding, self.clipping).grads

        arguments = (self.batch.leaves, self.batch.shared, self.batch.examples)
        compiled = jax.jit(program).lower(*arguments).compile()
        analysis = compiled.memory_analysis()
        # A backend that cannot say is asked by running.
        temp_bytes = 0 if analysis is None else analysis.temp_size_in_bytes
        secs = None
        if temp_bytes <= self.free_bytes:
            try:
                secs = _median_secs(lambda: compiled(*arguments))
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        return Measurement(engine, size, secs, temp_bytes)


def _median_secs(call: Any) -> float:
    jax.block_until_ready(call())
    runs: list[float] = []
    while len(runs) < 2 or (sum(runs) < _RUN_SECS and len(runs) < 20):
        start = time.perf_counter()
        jax.block_until_ready(call())
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


def _made_up(rng: np.random.Generator, like: Any) -> jax.Array:
    """An array of the same shape and type: small random numbers, zero where not floating."""
    shape, dtype = jnp.shape(like), jnp.result_type(like)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(like))
        return jax.random.split(jax.random.key(0, impl=impl), shape)
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.asarray(rng.normal(scale=0.1, size=shape), dtype)
    return jnp.zeros(shape, dtype)
