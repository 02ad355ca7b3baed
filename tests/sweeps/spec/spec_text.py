"""A specification that is allowed, in text, and how one that is not is refused."""

from pathlib import Path

import pytest

from sweeps.errors import SpecError
from sweeps.spec.reading import parse_spec
from sweeps.spec.yaml_source import load_yaml

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "specs" / "digits.yaml"

GOOD = """\
version: 1
name: digits
data: {name: digits}
model:
  name: mlp
  hidden_sizes: [64, 32]
privacy:
  policy: per_trial
  target_epsilon: 8.0
  target_delta: 1.0e-5
  neighboring_relation: zero_out
search_space:
  optimizer: {grid_search: [sgd, adam]}
  learning_rate: {grid_search: [0.1, 1, 8]}
  expected_batch_size: {choice: [64, 256]}
  iterations: 150
  noise_multiplier: 2.0
  l2_clip_norm: 1.0
search: {num_samples: 2, seed: 3}
scheduler: {name: async_hyperband, grace_period: 25, reduction_factor: 3}
report_every_steps: 25
seed: 0
resources: {max_concurrent_trials: 2, cpus_per_trial: 1, gpus_per_trial: 0}
"""
GOOD_DATA = load_yaml(DIGITS).data


def good(old="", new=""):
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def refusal(text):
    with pytest.raises(SpecError) as caught:
        parse_spec(text, source="x.yaml")
    return str(caught.value)
