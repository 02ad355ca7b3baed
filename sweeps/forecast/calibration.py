"""Trains a few steps of each shape here and now, on random data of the same form.

No example of the real data set is read and no budget is touched, so it costs no privacy. It
happens in a process of its own, in the environment of a worker and below a temporary folder:

    python -m sweeps.forecast.calibration FOLDER

with the job on standard input; it answers with a line for each trial.
"""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
# JAX's devices have no annotations.

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import WorkerResources, worker_environment
from sweeps.admission import Plan
from sweeps.errors import SweepError
from sweeps.forecast.measured import Measured, family_of
from sweeps.search_space import public_num_units
from trainer.config import TrialConfig
from trainer.data.synthetic.preparation import prepare_synthetic
from trainer.data.synthetic.request import Synthetic
from trainer.errors import DatasetError

_MOST_BYTES = 1 << 28
_STEPS_SECS = 3.0
_NAME = "calibration"


def calibrate(plan: Plan, on_trial: Callable[[], None] = lambda: None) -> list[Measured]:
    """Measures what trials of a plan take; of batches of many sizes, the smallest and the largest.

    Args:
        plan: The plan.
        on_trial: Called after each of `chosen`.

    Returns:
        Two for each trial that was measured: as the first of a worker, which compiles, and as a
        later one of the same shape.

    Raises:
        SweepError: It cannot be measured here; the message says why.
    """
    configs = chosen(plan)
    if not configs:
        return []
    with tempfile.TemporaryDirectory(prefix="dp-sweeps-") as name:
        folder = Path(name)
        try:
            substitutes = _with_random_data(plan, configs, folder)
        except DatasetError as error:
            raise SweepError(f"--calibrate: no random data of this form: {error}") from error
        asked = plan.spec.resources
        resources = WorkerResources(cpus=asked.cpus_per_trial, gpus=asked.gpus_per_trial)
        job = json.dumps(
            {
                "configs": [config.to_json() for config in substitutes],
                "num_devices": max(1, math.ceil(resources.gpus)),
            }
        )
        with (
            open(folder / "errors", "w+", encoding="utf-8") as errors,
            subprocess.Popen(
                [sys.executable, "-m", "sweeps.forecast.calibration", name],
                env={**os.environ, **worker_environment(resources, folder / "cache")},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(job)
            process.stdin.close()
            found: list[Measured] = []
            for config, line in zip(configs, process.stdout, strict=False):
                found += [Measured(config=config, **facts) for facts in json.loads(line)]
                on_trial()
            if process.wait():
                errors.seek(0)
                said = errors.read().strip().rpartition("\n")[2]
                raise SweepError(f"--calibrate: it cannot be measured here: {said}")
    return found


def chosen(plan: Plan) -> list[TrialConfig]:
    """Of the trials that were admitted those that are measured, as few as tell of all."""
    admitted = [one.config for one in plan.admitted if one.config is not None]
    families = itertools.groupby(
        sorted(admitted, key=lambda config: (repr(family_of(config)), config.sampling_prob)),
        key=lambda config: repr(family_of(config)),
    )
    found: list[TrialConfig] = []
    for _, family in families:
        smallest, *more = family
        found.append(smallest)
        if more and more[-1].sampling_prob > smallest.sampling_prob:
            found.append(more[-1])
    return found


def _with_random_data(
    plan: Plan, configs: Sequence[TrialConfig], folder: Path
) -> list[TrialConfig]:
    """The same trials on a random data set below a folder, which has no more than is needed."""
    spec, shape = plan.spec, plan.dataset.image_shape
    by_users = spec.privacy_unit == "user"
    each = spec.mechanism.examples_per_user or 1
    sizes = plan.dataset.num_users if by_users else plan.dataset.num_train
    units = public_num_units(spec, sizes)
    fewer = units
    if spec.mechanism.truncated_batch_size is None:  # whose cost depends on the number of units
        room = _MOST_BYTES // (math.prod(shape) * each)
        largest = max(config.sampling_prob for config in configs) * units
        fewer = min(units, max(room, math.ceil(2 * largest)))
    request = Synthetic(
        name=_NAME,
        num_examples=fewer * each,
        shape=shape,
        num_classes=plan.dataset.num_classes,
        num_users=fewer if by_users else None,
    )
    prepare_synthetic(request, folder)
    data = dataclasses.replace(
        configs[0].data,
        name=request.dataset_name,
        data_dir=str(folder),
        train_split="train",
        eval_split="test",
        user_feature="user" if by_users else None,
    )
    return [
        dataclasses.replace(
            config, data=data, sampling_prob=min(1.0, config.sampling_prob * units / fewer)
        )
        for config in configs
    ]


# -- in the process that measures ----------------------------------------------------------------


def _measure(config: TrialConfig, folder: Path, num_devices: int) -> list[dict[str, Any]]:
    """A trial as the first of its worker, and once more as a later one.

    The first reports after every step, which says how many of them the second can take between
    two reports, and what a report takes.
    """
    one = _begin(config, 1, folder / "first", num_devices)
    every = min(config.report_every_steps, max(config.iterations // 3, 1))
    every = max(1, min(every, int(_STEPS_SECS / max(one.between_secs, 1e-6))))
    again = _begin(config, every, folder / "again", num_devices)
    step_secs = again.between_secs / every
    if 1 < every < config.report_every_steps:
        # between = every * step + report, for the one and for the other.
        report = max(0.0, (one.between_secs * every - again.between_secs) / (every - 1))
        step_secs = max(0.0, (again.between_secs - report) / every)
        step_secs += report / config.report_every_steps
    return [
        {
            "start_secs": max(0.0, begun.first_secs - begun.between_secs),
            "step_secs": step_secs,
            "checkpoint_bytes": begun.checkpoint_bytes,
            "where": _device(),
        }
        for begun in (one, again)
    ]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A trial that was begun: seconds to its first report, and from there to the next."""

    first_secs: float
    between_secs: float
    checkpoint_bytes: int


def _begin(config: TrialConfig, every: int, folder: Path, num_devices: int) -> _Begun:
    from trainer.loop import trial_reports  # JAX: only in the process that measures

    config = dataclasses.replace(config, report_every_steps=every)
    begin = time.perf_counter()
    reports = trial_reports(
        config, data_home=folder, checkpoint_dir=folder, num_devices=num_devices
    )
    moments = [time.perf_counter() for _ in itertools.islice(reports, 3)]
    reports.close()
    newest = max(folder.glob("step-*"), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    first = moments[0] - begin
    # Of one report alone, all that is known is how long all of it took.
    between = min((b - a for a, b in itertools.pairwise(moments)), default=first)
    return _Begun(first, between, size)


def _device() -> str:
    import jax

    device = jax.devices()[0]
    return "CPU" if device.platform == "cpu" else str(device.device_kind)


def _main(folder: Path) -> None:
    job = json.load(sys.stdin)
    for number, facts in enumerate(job["configs"]):
        place = folder / f"trial-{number}"
        found = _measure(TrialConfig.from_json(facts), place, job["num_devices"])
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
