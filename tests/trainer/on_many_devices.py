"""Run as a program of its own, with devices that XLA makes up: trials on one and on several.

Prints a JSON object: for each case the largest difference between the two, and by how much the
trial moved its parameters.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import AugmentationConfig, MechanismConfig
from trainer.mechanism.keys import BranchKeys
from trainer.training import devices
from trainer.trial import Trial

CONFIG = TrialConfig(
    data=DataConfig(name="digits", train_split="train[:1435]"),  # no multiple of the devices
    model=ModelConfig(name="mlp", hidden_sizes=(16,)),
    optimizer="momentum",
    learning_rate=0.2,
    l2_clip_norm=1.0,
    noise_multiplier=1.0,
    sampling_prob=0.1,
    expected_batch_size=143.5,
    iterations=6,
    report_every_steps=6,
    target_delta=1e-5,
    clipping=ClippingConfig(engine="vmap"),  # compiles quickest
)
CASES = {
    "resident": {},
    "truncated": {"mechanism": MechanismConfig(truncated_batch_size=190, num_units=1435)},
    "banded": {"mechanism": MechanismConfig(bands=3), "sampling_prob": 0.3},
    "full batch": {"sampling_prob": 1.0, "expected_batch_size": 1435.0},
    "views": {"augmentation": AugmentationConfig(views=2, crop_padding=1)},
    "microbatches": {"clipping": ClippingConfig(engine="vmap", microbatch_size=3)},
    "counted": {"clipping": ClippingConfig(mode="quantile", engine="vmap")},
    "streamed views": {
        "data": dataclasses.replace(CONFIG.data, placement="streamed"),
        "augmentation": AugmentationConfig(views=2, crop_padding=1),
    },
}


def trained(config: TrialConfig, data_home: Path, num_devices: int) -> tuple[list, list]:
    trial = Trial(config, data_home, devices.topology(num_devices))
    at = trial.start(None, None)
    before = [np.array(leaf) for leaf in jax.tree.leaves(at.state)]
    at = trial.advance(at, config.iterations, lambda step: None)
    assert trial.report(at, config.iterations, 0).outcome == "completed"
    assert trial.checkpoint(at)["step"] == config.iterations
    trial.close()
    return before, [np.array(leaf) for leaf in jax.tree.leaves(at.state)]


def largest(ones: list, others: list) -> float:
    return max(float(np.max(np.abs(a - b), initial=0)) for a, b in zip(ones, others, strict=True))


def main(data_home: Path) -> None:
    setattr(devices, "BranchKeys", lambda: BranchKeys(bytes(range(32))))  # noqa: B010
    results = {}
    for name, changes in CASES.items():
        config = dataclasses.replace(CONFIG, **changes)
        before, alone = trained(config, data_home, 1)
        _, together = trained(config, data_home, len(jax.devices()))
        results[name] = [largest(alone, together), largest(before, alone)]
    sys.stdout.write(json.dumps({"devices": len(jax.devices()), "cases": results}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
