"""Run as one of several processes of a trial: trains, and prints what it came to as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax

from trainer.config import DataConfig

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    sys.argv[3], num_processes=int(sys.argv[4]), process_id=int(sys.argv[5])
)

from tests.trainer.on_many_devices import CONFIG  # noqa: E402
from trainer.errors import TrainerError  # noqa: E402
from trainer.loop import run_trial  # noqa: E402
from trainer.mechanism.keys import BranchKeys  # noqa: E402


def main(data_home: Path, out: Path) -> None:
    from trainer.training import devices

    # The first process alone is asked for a root; what the others get is what it has.
    root = bytes(range(32)) if jax.process_index() == 0 else bytes(32)
    setattr(devices, "BranchKeys", _with_root(root))  # noqa: B010
    losses = {}
    for placement in ("device", "streamed"):
        data = DataConfig(name="digits", train_split="train[:1435]", placement=placement)
        config = dataclasses.replace(CONFIG, data=data)
        charged: list[int] = []
        result = run_trial(
            config,
            data_home=data_home,
            checkpoint_dir=out / placement,
            secrets_dir=out / "secrets",
            charge=lambda branch, step, charged=charged: charged.append(step) or step,
            num_devices=None,
        )
        losses[placement] = [result.report.eval_loss, len(charged)]

    def refuse(branch, step):
        raise RuntimeError("no more")

    try:
        run_trial(CONFIG, data_home=data_home, charge=refuse, num_devices=None)
    except (TrainerError, RuntimeError) as error:
        losses["refused"] = type(error).__name__
    where = {"process": jax.process_index(), "devices": len(jax.devices())}
    sys.stdout.write(json.dumps({**where, **losses}) + "\n")


def _with_root(root: bytes):
    class Known(BranchKeys):
        def __init__(self, given: bytes | None = None) -> None:
            super().__init__(given or root)

    return Known


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
