"""What it saves to run trials of one shape as one program, beside one after another.

    python benchmarks/packing.py                   # about five minutes on two CPU cores
    python benchmarks/packing.py --only linear     # 64 linear heads alone
    python benchmarks/packing.py --save            # also writes benchmarks/results/

Whole trials without checkpoints, on digits: steps, reports, evaluation; what is compiled was
compiled before. Packed and alone take turns, and a figure is the ratio within a turn, the median
of some. The limit on an accelerator is a quarter for linear heads, which is what packing is for; a
CPU is busy with one trial, and packing is off there unless asked for.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# See the top of benchmarks/clipping.py.
_HERE = Path(__file__).resolve().parent
sys.path = [str(_HERE.parent), *(p for p in sys.path if Path(p).resolve() != _HERE)]

import jax
from rich.console import Console

from benchmarks.figures import Figure, arguments, conclude
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.loop import packed_reports, trial_reports
from trainer.pack import Pack

Tell = Callable[[str], None]

TURNS = 3
LINEAR = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="sgd",
    learning_rate=0.5,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=0.05,
    expected_batch_size=0.05 * 1437,
    iterations=400,
    report_every_steps=200,
    target_delta=1e-5,
    accountant="rdp",
)
CNN = dataclasses.replace(
    LINEAR, model=ModelConfig(name="cnn", channels=(4, 8)), iterations=20, report_every_steps=10
)


def linear(folder: Path, tell: Tell) -> Iterator[Figure]:
    """64 linear heads."""
    limit = 1.0 if jax.default_backend() == "cpu" else 1 / 4
    yield from _figures("64 linear heads", LINEAR, 64, (8, 16, 64), limit, folder, tell)


def cnn(folder: Path, tell: Tell) -> Iterator[Figure]:
    """8 small convolutional networks."""
    limit = 2.0 if jax.default_backend() == "cpu" else 1.0
    yield from _figures("8 convolutional networks", CNN, 8, (4, 8), limit, folder, tell)


def _figures(
    name: str,
    config: TrialConfig,
    count: int,
    widths: Sequence[int],
    limit: float,
    folder: Path,
    tell: Tell,
) -> Iterator[Figure]:
    configs = [dataclasses.replace(config, learning_rate=0.1 + n / count) for n in range(count)]
    tell(f"{name}: programs are compiled")
    _alone(configs[:1], folder)
    for width in widths:
        _packed(configs[:width], width, folder)
    ratios: dict[int, list[float]] = {width: [] for width in widths}
    alone_secs: list[float] = []
    for turn in range(TURNS):
        for width in widths:
            tell(f"{name}: alone and by {width}, turn {turn + 1} of {TURNS}")
            alone_secs.append(_secs(lambda: _alone(configs, folder)))
            packed = _secs(lambda width=width: _packed(configs, width, folder))
            ratios[width].append(packed / alone_secs[-1])
    for width, found in ratios.items():
        ratio = statistics.median(found)
        steps = count * config.iterations / statistics.median(alone_secs)
        note = f"x{1 / ratio:.2f} faster; alone {steps:,.0f} steps a second"
        yield Figure(f"time of {name} by {width}, x alone", ratio, limit, note)


def _alone(configs: Sequence[TrialConfig], folder: Path) -> None:
    for config in configs:
        for _ in trial_reports(config, data_home=folder):
            pass


def _packed(configs: Sequence[TrialConfig], width: int, folder: Path) -> None:
    for first in range(0, len(configs), width):
        pack = Pack(width)
        running = [
            packed_reports(pack, config, data_home=folder)
            for config in configs[first : first + width]
        ]
        while running:
            running = [each for each in running if _goes_on(each)]
            pack.run()


def _goes_on(reports: Iterator[object]) -> bool:
    """Runs a trial to where it waits; False if it has ended."""
    return any(report is None for report in reports)


def _secs(call: Callable[[], None]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


PARTS = {"linear": linear, "cnn": cnn}


def main() -> None:
    """Measures, prints a table, and exits with 1 if a limit was missed."""
    asked = arguments("What packing saves.", PARTS)
    notes = Console(stderr=True)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder, notes.status("…") as status:
        for name in asked.only or PARTS:
            figures += PARTS[name](Path(folder), status.update)
    versions = {"jax": jax.__version__, "on": jax.devices()[0].device_kind}
    conclude(figures, asked, name="packing", title="Packing", versions=versions)


if __name__ == "__main__":
    main()
