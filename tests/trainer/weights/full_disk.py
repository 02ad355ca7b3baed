"""Run as a program of its own: a trial whose disk takes no more after its first checkpoint.

    python -m tests.trainer.weights.full_disk FOLDER DATA_HOME

Prints what became of it as JSON. No file of this process may grow beyond a limit then, which fails
where a full disk does: in the kernel, while the checkpoint is written.
"""

import json
import resource
import sys
from pathlib import Path

from tests.trainer.killed_trial import train
from trainer.errors import CheckpointError
from trainer.weights.checkpoint_writer import checkpoint_path

FULL_AT = 8
_LIMIT_BYTES = 2000  # enough for charges.json, not for parameters


def main(folder: Path, data_home: Path) -> None:
    def on_charge(step: int) -> None:
        if step == FULL_AT:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, resource.RLIM_INFINITY))

    try:
        train(folder, data_home, on_charge=on_charge)
    except CheckpointError as error:
        left = sorted(path.name for path in (folder / "checkpoints").iterdir())
        path = checkpoint_path(folder / "checkpoints", FULL_AT)
        sys.stdout.write(
            json.dumps({"error": str(error), "left": left, "refused": str(path)}) + "\n"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
