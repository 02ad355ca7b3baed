"""Small specifications as files."""

import json

import yaml

SPEC = {
    "version": 1,
    "name": "small",
    "data": {"name": "digits"},
    "model": {"name": "logistic_regression"},
    "privacy": {"policy": "per_trial", "target_epsilon": 3.0, "target_delta": 1e-5},
    "search_space": {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "expected_batch_size": {"grid_search": [32, 512]},
        "iterations": 20,
        "noise_multiplier": 1.5,
        "l2_clip_norm": 1.0,
    },
    "report_every_steps": 10,
}


def write(folder, changes=None, **top):
    """A spec file: SPEC with ``section.key`` replaced; a value of ... removes the key."""
    spec = json.loads(json.dumps(SPEC))
    for path, value in (changes or {}).items():
        *sections, key = path.split(".")
        target = spec
        for section in sections:
            target = target.setdefault(section, {})
        if value is ...:
            del target[key]
        else:
            target[key] = value
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({**spec, **top}, sort_keys=False))
    return path
