"""One trial of DP-SGD, from configuration to report, in one process.

`run_trial` is the whole room from outside: it needs neither Ray nor MLflow. The modules follow
a trial's way:

* what it is: `config`, `config_sections`
* data: `dataset_location`, `dataset_form`, `reading`, `scaling`, `users`, `datasets`; `streaming`
  (of what does not fit on the devices); `digits`, `synthetic` and `preparing` write data sets,
  `catalog` lists them, `declaration` is what is said of one for every sweep
* the mechanism: `plan` (the one object that yields sampler, clipping, noise and what is
  accounted), `keys` (secret), `branch` (public), `sampling`, `clipping`, `quantile_clipping`,
  `noise`
* the model: `models`, `network` (what of it is trained), `weight_files`, `initial_weights`
* a step: `objective`, `augmentation`, `optimizers`, `schedules`, `averages`, `step`; compiled for
  resident examples in `resident`, of several trials at once in `packed`, for streamed examples in
  `streamed`; driven by `runners`
* the trial: `devices`, `engine`, `beginning`, `trial`, `evaluation`, `checkpoints`, `reporting`
  (what may leave), and `loop`, which puts them in order; `pack`, of several that go together
* `alone`: the room as a program, ``python -m trainer``

Importing this package imports no JAX; the names below are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
    from trainer.config_sections import (
        AugmentationConfig,
        AveragingConfig,
        EvaluationConfig,
        MechanismConfig,
    )
    from trainer.loop import TrialResult, run_trial, trial_reports
    from trainer.mechanism.branch import Branch
    from trainer.reporting import TrialReport

__all__ = [
    "AugmentationConfig",
    "AveragingConfig",
    "Branch",
    "ClippingConfig",
    "DataConfig",
    "EvaluationConfig",
    "MechanismConfig",
    "ModelConfig",
    "TrialConfig",
    "TrialReport",
    "TrialResult",
    "run_trial",
    "trial_reports",
]

_HOMES = {
    "AugmentationConfig": "trainer.config_sections",
    "AveragingConfig": "trainer.config_sections",
    "Branch": "trainer.mechanism.branch",
    "ClippingConfig": "trainer.config",
    "DataConfig": "trainer.config",
    "EvaluationConfig": "trainer.config_sections",
    "MechanismConfig": "trainer.config_sections",
    "ModelConfig": "trainer.config",
    "TrialConfig": "trainer.config",
    "TrialReport": "trainer.reporting",
    "TrialResult": "trainer.loop",
    "run_trial": "trainer.loop",
    "trial_reports": "trainer.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
