"""What a trial takes beside the work on gradients: loop, reading, padding, checkpoints, memory.

    python benchmarks/training.py                    # everything, about ten minutes on two cores
    python benchmarks/training.py --only loop --only sampling
    python benchmarks/training.py --save             # also writes benchmarks/results/

Every figure is a ratio of two things measured in the same run, but where a limit is in seconds.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# See the top of benchmarks/clipping.py.
_HERE = Path(__file__).resolve().parent
sys.path = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax_privacy import batch_selection, noise_addition
from jax_privacy import clipping as jax_privacy_clipping
from rich.console import Console
from rich.table import Table

from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import AugmentationConfig
from trainer.data.synthetic.preparation import prepare_synthetic
from trainer.data.synthetic.request import Synthetic
from trainer.mechanism.keys import BranchKeys
from trainer.mechanism.sampling import Sampler, to_rows
from trainer.models import cross_entropy
from trainer.training import devices, runners
from trainer.training.objective import Data
from trainer.training.resident import Draw, make_resident_program
from trainer.training.runners import step_inputs
from trainer.training.step import Recipe
from trainer.trial import Trial
from trainer.weights.checkpoint_writer import CheckpointWriter

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured number and its limit.

    Attributes:
        name: What it is.
        value: The number.
        limit: What it must reach.
        at_most: Whether the limit is an upper one.
        note: What it was made from.
    """

    name: str
    value: float
    limit: float
    at_most: bool
    note: str

    @property
    def reached(self) -> bool:
        """Whether the number keeps to its limit."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit


DIGITS = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="sgd",
    learning_rate=1.0,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=256 / 1437,
    expected_batch_size=256.0,
    iterations=2000,
    report_every_steps=500,
    target_delta=1e-5,
    clipping=ClippingConfig(engine="book_keeping"),
)


def seconds(call: Callable[[], Any], rounds: int = 5) -> float:
    """Median time of a call whose result is waited for; the first one is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def nothing(step: int) -> None:
    """No progress is shown while something is measured."""


# --- The loop ------------------------------------------------------------------------------


def loop(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Steps on digits and a linear head: ours, what the host does for it, a step per dispatch."""
    trial = Trial(DIGITS, folder, devices.topology(1))
    at = trial.start(None, None)
    steps = 500
    tell(f"{steps} steps of a linear head on digits")

    state = jax.tree.map(jnp.copy, at.state)

    def ours() -> Any:
        fresh = jax.tree.map(jnp.copy, state)
        return trial.runner.advance(trial.recipe, fresh, at.keys, 0, steps, nothing)

    def inputs() -> None:
        for begin in range(0, steps, 100):
            jax.device_put(step_inputs(trial.plan, at.keys, begin, begin + 100, 100))

    tell("the same with jax-privacy's pieces, a dispatch for each")
    one_by_one = _stepwise(trial, steps)
    whole, host, stepwise = (seconds(call) for call in (ours, inputs, one_by_one))
    each = f"{1e3 * whole / steps:.2f} ms a step"
    yield Figure("host's part of a step", host / whole, 0.05, True, each)
    theirs = f"{1e3 * stepwise / steps:.2f} ms a step with a dispatch for each piece"
    yield Figure("steps per second, x jax-privacy's pieces", stepwise / whole, 5, False, theirs)


def _stepwise(trial: Trial, steps: int) -> Callable[[], Any]:
    """A loop as jax-privacy's documentation shows it: sample, gather, clip, add noise, update."""
    data: Data = trial.runner.data
    network = trial.network
    optimizer = optax.sgd(1.0)
    sampling = batch_selection.CyclicPoissonSampling(DIGITS.sampling_prob, steps)
    images, labels = np.asarray(data.images), np.asarray(data.labels)

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(cross_entropy(network.logits(params, {}, images), labels)[0])

    grad_fn = jax_privacy_clipping.clipped_grad(
        loss, l2_clip_norm=1.0, batch_argnums=(1, 2), normalize_by=256.0
    )
    clipped = jax.jit(grad_fn)
    stddev = 2.0 * grad_fn.sensitivity()
    privatizer = noise_addition.gaussian_privatizer(stddev=stddev, prng_key=jax.random.key(1))
    add_noise = jax.jit(privatizer.update)
    update = jax.jit(lambda grads, state, params: optimizer.update(grads, state, params))
    apply = jax.jit(optax.apply_updates)

    def run() -> Any:
        params = trial.initial.trainable
        noise_state, opt_state = privatizer.init(params), optimizer.init(params)
        for chosen in sampling.batch_iterator(len(labels), rng=np.random.default_rng(0)):
            indices = batch_selection.pad_to_multiple_of(chosen, 32)
            grads = clipped(
                params, images[indices], labels[indices], is_padding_example=indices == -1
            )
            grads, noise_state = add_noise(grads, noise_state)
            updates, opt_state = update(grads, opt_state, params)
            params = apply(params, updates)
        return params

    return run


# --- Reading -------------------------------------------------------------------------------


def reading(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Streamed 32x32 images at batch 4,096, and who waits for whom."""
    tell("writing 20,000 images of 32x32x3")
    request = Synthetic(name="benchmark", num_examples=20_000, shape=(32, 32, 3), num_classes=10)
    prepare_synthetic(request, folder)
    config = dataclasses.replace(
        DIGITS,
        data=DataConfig(name="synthetic_benchmark", scaling="divide_by_255", placement="streamed"),
        model=ModelConfig(name="cnn"),
        sampling_prob=4096 / 20_000,
        expected_batch_size=4096.0,
        clipping=ClippingConfig(engine="book_keeping", microbatch_size=256),
    )
    waited = _Waits()
    trial = Trial(config, folder, devices.topology(1))
    at = trial.start(None, None)
    tell("a small CNN on batches of 4,096, streamed")
    original = runners.stream
    try:
        runners.stream = waited.watching(original)  # type: ignore[assignment]
        at = trial.advance(at, 2, nothing)
        waited.total = 0.0
        begin = time.perf_counter()
        trial.advance(at, 7, nothing)
        whole = time.perf_counter() - begin
    finally:
        runners.stream = original
        trial.close()
    note = f"{whole / 5:.2f} s a step"
    yield Figure("part of the time that the device waits", waited.total / whole, 0.05, True, note)


class _Waits:
    """Adds up how long rows are waited for."""

    total = 0.0

    def watching(self, stream: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            rows = stream(*args, **kwargs)
            try:
                while True:
                    begin = time.perf_counter()
                    try:
                        row = next(rows)
                    except StopIteration:
                        return
                    self.total += time.perf_counter() - begin
                    yield row
            finally:
                rows.close()

        return watched


# --- Sampling and padding ------------------------------------------------------------------


def sampling(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Drawing on the host, and slots that nobody sits in."""
    tell("drawing batches")
    keys = BranchKeys()
    large = Sampler(num_units=1_281_167, sampling_prob=16_384 / 1_281_167)
    times = []
    for step in range(20):
        begin = time.perf_counter()
        to_rows(large.indices(keys.sampling_rng(step)), large.capacity)
        times.append(time.perf_counter() - begin)
    note = "16,384 of 1,281,167 expected"
    millis = 1e3 * statistics.median(times)
    yield Figure("host sampling, ms a step", millis, 10, True, note)
    for batch, size, limit in ((4096, 50_000, 0.08), (65_536, 1_281_167, 0.02)):
        sampler = Sampler(num_units=size, sampling_prob=batch / size)
        slots = [
            to_rows(sampler.indices(keys.sampling_rng(step)), sampler.capacity).size
            for step in range(200)
        ]
        waste = sum(slots) / (batch * len(slots)) - 1
        note = f"rows of {sampler.capacity}, 200 batches"
        yield Figure(f"padding at {batch:,}", waste, limit, True, note)


# --- Checkpoints ---------------------------------------------------------------------------


def checkpoints(folder: Path, tell: Tell) -> Iterator[Figure]:
    """How long training stands still for a checkpoint, of 60 seconds."""
    tell("checkpoints of WRN-16-4 with momentum")
    config = dataclasses.replace(
        DIGITS, model=ModelConfig(name="wrn_16_4"), optimizer="momentum", noise_multiplier=1.0
    )
    trial = Trial(config, folder, devices.topology(1))
    at = trial.start(None, None)
    times = []
    with CheckpointWriter(folder / "checkpoints") as writer:
        for step in range(6):
            begin = time.perf_counter()
            writer.save(lambda step=step: trial.checkpoint(at._replace(step=step)))
            times.append(time.perf_counter() - begin)
            writer.finish()
    begin = time.perf_counter()
    with CheckpointWriter(folder / "checkpoints") as writer:
        writer.save(lambda: trial.checkpoint(at))
    behind = time.perf_counter() - begin
    blocked = statistics.median(times)
    note = f"{1e3 * blocked:.0f} ms each; {1e3 * behind:.0f} ms in the background"
    yield Figure("training blocked, at one a minute", blocked / 60, 0.02, True, note)


# --- Memory --------------------------------------------------------------------------------


def memory(folder: Path, tell: Tell) -> Iterator[Figure]:
    """Peak memory of a step of WRN-16-4 at 4,096 with 16 views, beside that of its microbatch."""
    tell("compiling WRN-16-4 with 16 views, twice")
    del folder
    microbatch, examples = 4, 50_000
    whole = _temp_bytes(Draw(examples, capacity=4390), examples, microbatch)
    part = _temp_bytes(Draw(microbatch, capacity=microbatch), examples, None)
    note = f"{whole / 2**20:.0f} against {part / 2**20:.0f} MiB, microbatches of {microbatch}"
    yield Figure("memory of a step, x its microbatch", whole / part, 1.1, True, note)


def _temp_bytes(draw: Draw, num_examples: int, microbatch_size: int | None) -> float:
    from trainer.models import make_model
    from trainer.models.network import Network
    from trainer.training.objective import Objective
    from trainer.training.optimizers import make_optimizer
    from trainer.training.step import StepInputs, Traced, TrainState

    network = Network(make_model(ModelConfig(name="wrn_16_4"), 10))
    views = AugmentationConfig(views=16, flip=True, crop_padding=4)
    recipe = Recipe(
        Objective(network, views), "sgd", microbatch_size=microbatch_size, engine="book_keeping"
    )

    def arguments() -> Any:
        params = network.init((32, 32, 3), 0).trainable
        state = TrainState(params, make_optimizer("sgd", 1.0).init(params), jnp.float32(1), {}, ())
        data = Data(
            jnp.zeros((num_examples, 32, 32, 3)), jnp.zeros(num_examples, jnp.int32), None, 0
        )
        key = jnp.zeros((100, 2), jnp.uint32)
        steps = StepInputs(jnp.zeros(100, jnp.int32), key, key, key, jnp.zeros(100))
        traced = jax.tree.map(jnp.float32, Traced(1.0, 1.0, 1.0))
        return state, {}, data, None, steps, jnp.int32(1), traced, jnp.uint32(1)

    program = make_resident_program(recipe, draw)
    compiled = program.lower(*jax.eval_shape(arguments)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


# --- The table -----------------------------------------------------------------------------

PARTS = {
    "loop": loop,
    "reading": reading,
    "sampling": sampling,
    "checkpoints": checkpoints,
    "memory": memory,
}


def main() -> None:
    """Measures, prints a table, and exits with 1 if a limit was missed."""
    parser = argparse.ArgumentParser(description="What a trial takes beside its gradients.")
    parser.add_argument("--only", action="append", choices=list(PARTS), help="one part; repeat")
    parser.add_argument("--json", action="store_true", help="figures as JSON on standard output")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    chosen = parser.parse_args()
    notes = Console(stderr=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, notes.status("…") as status:
        for name in chosen.only or PARTS:
            figures += PARTS[name](Path(folder), status.update)
    device = jax.devices()[0]
    where = f"{device.device_kind} ({os.cpu_count()} CPUs), jax {jax.__version__}"
    table = Table(title=f"Training, {where}, Python {platform.python_version()}")
    for column in ("figure", "measured", "must reach", "", "of"):
        table.add_column(column)
    for figure in figures:
        sign = "<=" if figure.at_most else ">="
        reached = "yes" if figure.reached else "NO"
        limit = f"{sign} {figure.limit:g}"
        table.add_row(figure.name, f"{figure.value:.3g}", limit, reached, figure.note)
    rows = [{**dataclasses.asdict(figure), "reached": figure.reached} for figure in figures]
    record = {"device": device.device_kind, "jax": jax.__version__, "figures": rows}
    if chosen.json:
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        Console().print(table)
    if chosen.save:
        today = datetime.date.today().isoformat()
        target = _HERE / "results" / f"training-{device.platform}-{today}"
        target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        with target.with_suffix(".md").open("w") as file:
            Console(file=file, width=160).print(table)
    sys.exit(not all(figure.reached for figure in figures))


if __name__ == "__main__":
    main()
