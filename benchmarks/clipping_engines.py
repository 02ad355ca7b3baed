"""The engines of clipped gradients, compiled and measured for memory before they are run.

XLA lays a program's memory out when it compiles, so how large a batch an engine can take is
known without running it: temporary memory grows in a straight line with the batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax_privacy import clipping as jax_privacy_clipping

from benchmarks.clipping_models import Case, Problem
from benchmarks.clipping_rows import Row, timed
from trainer.clipping import Engine, clipped_grad

ENGINES: tuple[Engine, ...] = ("vmap", "two_pass", "book_keeping", "auto")
CLIP_NORM = 1.0
_PROBE_BATCH = 2
_QUICK_SECONDS = 1.0
_LONGEST_SECONDS = 60.0


def functions(problem: Problem) -> dict[str, Callable[..., Any]]:
    """The plain gradient and every way to a clipped one, of ``(params, inputs, labels)``."""
    terms: dict[str, Any] = {"l2_clip_norm": CLIP_NORM, "batch_argnums": (1, 2)}
    found: dict[str, Callable[..., Any]] = {
        "plain": jax.grad(problem.loss),
        "jax_privacy": jax_privacy_clipping.clipped_grad(problem.loss, **terms),
    }
    for engine in ENGINES:
        found[engine] = clipped_grad(problem.loss, engine=engine, **terms)
    return found


@dataclass
class Program:
    """One engine compiled for a case.

    Attributes:
        row: What is known of it.
        temporary: Temporary bytes by batch size.
        compiled: Executables by batch size.
        result: What a call with very few examples gave.
    """

    row: Row
    temporary: dict[int, int] = field(default_factory=dict)
    compiled: dict[int, Callable[..., Any]] = field(default_factory=dict)
    result: Any = None

    def call(self, problem: Problem, size: int) -> Callable[[], Any]:
        """A call with a batch of ``size`` examples that returns when it is done."""
        inputs, labels = problem.batch(size)
        return lambda: jax.block_until_ready(self.compiled[size](problem.params, inputs, labels))


def compile_program(
    case: Case, problem: Problem, engine: str, function: Callable[..., Any]
) -> Program:
    """Compiles an engine for the case's batch size and for a smaller one.

    An engine that refuses the model gets a note and no executables.
    """
    program = Program(Row(case.name, "jax", engine, case.batch_size))
    for size in _sizes(case):
        arguments = (problem.params, *problem.batch(size))
        jax.clear_caches()
        made: list[Any] = []
        try:
            seconds = timed(lambda a=arguments, m=made: m.append(_compile(function, a)))
        except Exception as error:  # an engine may refuse a model for whatever reason it has
            program.row.note = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return program
        compiled = made[0]
        memory = compiled.memory_analysis()
        program.compiled[size] = compiled
        program.temporary[size] = memory.temp_size_in_bytes
        if size == case.batch_size:
            program.row.compile_seconds = seconds
            program.row.temporary_bytes = memory.temp_size_in_bytes
            program.row.argument_bytes = memory.argument_size_in_bytes
            program.row.output_bytes = memory.output_size_in_bytes
    program.row.bytes_per_example, _ = _line(program.temporary)
    return program


def first_calls(
    programs: Sequence[Program], problem: Problem, cap: float, tell: Callable[[str], None]
) -> None:
    """Calls every program once; what would hold the benchmark up loses its executables.

    A call cannot be interrupted. So each is tried on very few examples first, and goes no
    further if the whole batch might then take a minute.

    Args:
        programs: The plain gradient's first.
        problem: Their problem.
        cap: How many times the plain gradient a call may take; what is slower is called once.
        tell: Called with the name of the engine that is tried.
    """
    few, batch_size = _PROBE_BATCH, programs[0].row.batch_size
    plain_of_few = plain = math.inf
    for program in programs:
        row = program.row
        if not program.compiled:
            continue
        tell(f"{row.engine}, first call")
        seconds, program.result = _warm_seconds(program.call(problem, few))
        plain_of_few = min(plain_of_few, seconds)
        if seconds * batch_size / few > _LONGEST_SECONDS:
            ratio = seconds / plain_of_few
            row.note = f"not run: {few} examples took {seconds:.1f} s, {ratio:.0f} x plain"
            program.compiled.clear()
            continue
        seconds, _ = _warm_seconds(program.call(problem, batch_size))
        plain = min(plain, seconds)
        if seconds > cap * plain:
            row.seconds, row.note = [seconds], f"called once: more than {cap:.0f} x plain"
            program.compiled.clear()


def _warm_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a first call and its result; of a later one if the first is quick."""
    results: list[Any] = []
    seconds = timed(lambda: results.append(call()))
    if seconds < _QUICK_SECONDS:
        seconds = min(seconds, *(timed(call) for _ in range(2)))
    return seconds, results[0]


def compare_memory(programs: Sequence[Program]) -> None:
    """Fills in how many examples each engine can take in the memory that ``vmap`` needs."""
    allowed = {p.row.engine: p.row.temporary_bytes for p in programs}.get("vmap")
    for program in programs:
        if allowed is None or program.row.bytes_per_example is None:
            continue
        slope, fixed = _line(program.temporary)
        if slope > 0:
            program.row.examples = max(0, int((allowed - fixed) / slope + 1e-6))


def leaves(result: Any) -> list[np.ndarray]:
    """A gradient's leaves as NumPy arrays."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


def _compile(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def _sizes(case: Case) -> list[int]:
    """Two batch sizes, which tell how memory grows; with the smaller an engine is tried."""
    return [_PROBE_BATCH, case.batch_size]


def _line(temporary: dict[int, int]) -> tuple[float, float]:
    """Slope and intercept of the line through bytes by batch size."""
    (few, least), (many, most) = sorted(temporary.items())
    slope = (most - least) / (many - few)
    return slope, most - slope * many
