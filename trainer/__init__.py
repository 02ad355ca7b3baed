"""One trial of DP-SGD, from configuration to report, in one process.

`run_trial` is the whole room from outside: it needs neither Ray nor MLflow. The modules follow
a trial's way: `config` (what it is), `dataset_location`, `datasets`, `scaling`, `plan` (the one
object that yields sampler, clipping, noise and the accounted mechanism), `keys` (secret),
`sampling`, `clipping`, `quantile_clipping`, `noise`, `models`, `optimizers`, `segment` (the
compiled program), `evaluation`, `checkpoints`, `reporting` (what may leave), and `loop`, which
puts them in order. `digits` is the built-in data set.

Importing this package imports no JAX; the names below are loaded when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import ClippingConfig, DataConfig, ModelConfig, TrialConfig
    from trainer.loop import TrialResult, run_trial, trial_reports
    from trainer.reporting import TrialReport

__all__ = [
    "ClippingConfig",
    "DataConfig",
    "ModelConfig",
    "TrialConfig",
    "TrialReport",
    "TrialResult",
    "run_trial",
    "trial_reports",
]

_HOMES = {
    "ClippingConfig": "trainer.config",
    "DataConfig": "trainer.config",
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
