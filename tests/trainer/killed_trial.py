"""A trial as a service runs it, all that it needs in one folder; as a program, one that is killed.

    python -m tests.trainer.killed_trial FOLDER DATA_HOME STEP [FORK_FROM]

kills its own process, as `kill -9` would, when the charge of STEP is durable.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

from trainer.alone.charges import FileCharges, charged_terms
from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import AveragingConfig
from trainer.loop import TrialResult, run_trial
from trainer.training.plan import mechanism_of
from trainer.weights.checkpoint_writer import checkpoints_in
from trainer.weights.checkpoints import first_readable
from trainer.weights.weight_files import read_arrays

CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="momentum",
    learning_rate=0.5,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=0.05,
    expected_batch_size=0.05 * 1437,
    iterations=12,
    report_every_steps=4,
    target_delta=1e-5,
    accountant="rdp",
    averaging=AveragingConfig(polyak=True),
    # Of two that give other bits neither may be preferred because a machine is busy.
    clipping=ClippingConfig(engine="vmap"),
)
CHILD = dataclasses.replace(CONFIG, learning_rate=0.25, noise_multiplier=3.0)
FORKED_AT = 4
SPENT_BEFORE = (mechanism_of(CONFIG).after(FORKED_AT),)


def charges_of(folder, config=CONFIG):
    folder.mkdir(exist_ok=True)
    path = folder / "charges.json"
    return FileCharges(path, charged_terms(config), create=not path.exists())


def train(folder, data_home, config=CONFIG, on_charge=None, **more) -> TrialResult:
    """Goes on with what is in a folder, or begins there."""
    return run_trial(config, data_home=data_home, **kept_in(folder, config, on_charge), **more)


def kept_in(folder, config, on_charge=None):
    """What a trial needs to go on with what is in a folder, or to begin there, as arguments."""
    charges = charges_of(folder, config)

    def charge(branch, step):
        total = charges.charge(branch, step)
        if on_charge is not None:
            on_charge(step)
        return total

    return {
        "checkpoint_dir": folder / "checkpoints",
        "resume_from": first_readable(checkpoints_in(folder / "checkpoints")).path,
        "known_branches": charges.branches,
        "secrets_dir": folder / "secrets",
        "charge": charge,
    }


def fork(folder, data_home, parent, config=CHILD, **more) -> TrialResult:
    """As `train`, from another trial's checkpoint."""
    return train(folder, data_home, config, fork_from=parent, spent_before=SPENT_BEFORE, **more)


def arrays(checkpoint):
    """Everything that a checkpoint holds, by name, as bytes."""
    return {
        f"{part}/{name}": value.tobytes()
        for part in ("params", "opt_state", "averages")
        if (checkpoint / part).is_dir()
        for name, value in read_arrays(checkpoint / part, "orbax")
    }


def _killed(folder: Path, data_home: Path, step: int, parent: Path | None) -> None:
    def on_charge(charged):
        if charged == step:
            os.kill(os.getpid(), signal.SIGKILL)

    if parent is None:
        train(folder, data_home, on_charge=on_charge)
    else:
        fork(folder, data_home, parent, on_charge=on_charge)


if __name__ == "__main__":
    _killed(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
