"""A small trial as a file, and the command line in this process."""

import json

import pytest
import yaml

from trainer.alone import command as command_module
from trainer.data.datasets import DatasetInfo

TRIAL = {
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "l2_clip_norm": 1.0,
    "noise_multiplier": 2.0,
    "expected_batch_size": 100,
    "iterations": 20,
    "report_every_steps": 10,
    "target_delta": 1e-5,
}

INFO = DatasetInfo(
    name="digits",
    version="1.0.0",
    num_train=1000,
    num_eval=200,
    image_shape=(8, 8, 1),
    num_classes=10,
    fingerprint="0" * 32,
)


def write(folder, changes=None, name="trial.yaml"):
    """TRIAL with ``section.key`` replaced; a value of ... removes the key."""
    trial = json.loads(json.dumps(TRIAL))
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        target = trial
        for section in sections:
            target = target.setdefault(section, {})
        if value is ...:
            del target[key]
        else:
            target[key] = value
    path = folder / name
    path.write_text(yaml.safe_dump(trial, sort_keys=False))
    return path


def run_command(monkeypatch, capsys, *arguments):
    """Exit code, standard output and standard error of a command line."""
    monkeypatch.setattr("sys.argv", ["trainer", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        command_module.main()
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out, printed.err
