"""The specification: what is taken, and that each refusal says where, what and what else."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jsonschema
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.errors import Problem, SpecError
from sweeps.spec.domains import Domain
from sweeps.spec.reading import load_spec, parse_spec, validate_spec
from sweeps.spec.sweep_spec import (
    MAX_TRIALS,
    AsyncHyperBandSpec,
    FifoSpec,
    SweepSpec,
    json_schema,
)
from sweeps.spec.yaml_source import load_yaml, parse_yaml
from trainer.config import ModelName

ROOT = Path(__file__).resolve().parents[3]
DIGITS = ROOT / "specs" / "digits.yaml"
SCHEMA = ROOT / "specs" / "schema.json"

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


def test_a_good_spec_is_read():
    spec = parse_spec(GOOD)
    assert spec.privacy.target_epsilon == 8.0
    assert spec.privacy.target_delta == 1e-5
    assert spec.privacy.accountant == "pld"
    assert spec.model.hidden_sizes == (64, 32)
    assert spec.scheduler == AsyncHyperBandSpec(
        name="async_hyperband", grace_period=25, reduction_factor=3
    )
    assert spec.search_space.learning_rate == Domain("grid_search", (0.1, 1.0, 8.0))
    assert spec.search_space.iterations == Domain("constant", (150,))
    assert spec.search_space.expected_batch_size == Domain("choice", (64.0, 256.0))
    assert spec.num_trials == 2 * 3 * 2


def test_what_may_be_left_out():
    text = GOOD[: GOOD.index("search: {")]
    spec = parse_spec(text)
    assert spec.scheduler == FifoSpec(name="fifo")
    assert (spec.search.num_samples, spec.search.seed, spec.seed) == (1, 0, 0)
    assert spec.report_every_steps == 25
    assert spec.resources.max_concurrent_trials == 1
    assert (spec.data.train_split, spec.data.eval_split) == ("train", "test")


@pytest.mark.parametrize(
    ("field", "text", "domain"),
    [
        ("learning_rate", "{uniform: [0.1, 8]}", Domain("uniform", (0.1, 8.0))),
        ("learning_rate", "{loguniform: [1e-5, 1]}", Domain("loguniform", (1e-5, 1.0))),
        ("learning_rate", "{quniform: [0.1, 1, 0.1]}", Domain("quniform", (0.1, 1.0, 0.1))),
        ("learning_rate", "{choice: [1, 1, 2]}", Domain("choice", (1.0, 1.0, 2.0))),
        ("expected_batch_size", "{lograndint: [16, 512]}", Domain("lograndint", (16, 512))),
        ("iterations", "{randint: [50, 200]}", Domain("randint", (50, 200))),
        ("iterations", "{grid_search: [50, 100]}", Domain("grid_search", (50, 100))),
        ("noise_multiplier", "calibrated", Domain("constant", ("calibrated",))),
        (
            "noise_multiplier",
            "{grid_search: [calibrated, 2]}",
            Domain("grid_search", ("calibrated", 2.0)),
        ),
        ("optimizer", "lamb", Domain("constant", ("lamb",))),
    ],
)
def test_domains(field, text, domain):
    lines = [
        f"  {field}: {text}" if line.startswith(f"  {field}:") else line
        for line in GOOD.splitlines()
    ]
    spec = parse_spec("\n".join(lines))
    assert getattr(spec.search_space, field) == domain
    assert parse_spec(spec.canonical_json()) == spec


NUMBER_DOMAINS = "grid_search, choice, uniform, loguniform, quniform, randint, lograndint"
LR = "  learning_rate: {grid_search: [0.1, 1, 8]}"

BAD = [
    # Keys
    (
        good("model:", "modle: 1\nmodel:"),
        "x.yaml:4:1: modle: unknown key (did you mean model?); allowed: version, name, data, ",
    ),
    (
        good("  target_epsilon", "  target_epsilom: 1\n  target_epsilon"),
        "x.yaml:9:3: privacy.target_epsilom: unknown key (did you mean target_epsilon?); "
        "allowed: policy, budget, team, target_epsilon, target_delta, trial_epsilon, ",
    ),
    (
        good("seed: 0", "seed: 0\ntarget_delta: 1"),
        "x.yaml:23:1: target_delta: unknown key (did you mean privacy.target_delta?); allowed: ",
    ),
    (
        good("  name: mlp", "  name: mlp\n  version: 1"),
        "x.yaml:6:3: model.version: unknown key (did you mean the top-level version?); allowed: ",
    ),
    (good("seed: 0", "seed: 0\n<<: {}"), "x.yaml:23:1: '<<': unknown key; allowed: "),
    (good("version: 1\n"), "x.yaml:1:1: version: is missing; allowed: 1"),
    (good("version: 1\n", "version: 1\nname: a\n"), "x.yaml:3:1: name: is given twice, first"),
    # Values
    (good("version: 1", "version: 2"), "x.yaml:1:10: version: 2 is not allowed; allowed: 1"),
    (good("version: 1", "version: true"), "x.yaml:1:10: version: true is not allowed; allowed: 1"),
    (good("version: 1", "version: 1.0"), "x.yaml:1:10: version: 1.0 is not allowed; allowed: 1"),
    (
        good("name: digits", "name: Digits"),
        "x.yaml:2:7: name: 'Digits' is not allowed; allowed: 1 to 64 of a-z, 0-9, _ and -",
    ),
    (good("name: digits", "name: a/b"), "x.yaml:2:7: name: 'a/b' is not allowed; allowed: 1 to"),
    (good("name: digits", 'name: "a\\n"'), "x.yaml:2:7: name: 'a\\n' is not allowed; allowed: 1"),
    (
        good("name: digits", 'name: "\\ud800"'),
        "x.yaml:2:7: name: '\\ud800' holds half a character; allowed: whole ones",
    ),
    (good("name: digits", "name: 7"), "x.yaml:2:7: name: 7 is not allowed; allowed: 1 to 64 of"),
    (
        good("{name: digits}", "{name: ../etc}"),
        "x.yaml:3:14: data.name: '../etc' is not allowed; allowed: a TFDS name such as digits",
    ),
    (
        good("{name: digits}", '{name: "digits\\n"}'),
        "x.yaml:3:14: data.name: 'digits\\n' is not allowed; allowed: a TFDS name",
    ),
    (
        good("{name: digits}", '{name: digits, data_dir: "a\\0b"}'),
        "x.yaml:3:32: data.data_dir: 'a\\x00b' is not allowed; allowed: null or a path",
    ),
    (
        good("{name: digits}", "{name: digits, train_split: 'train[:'}"),
        "x.yaml:3:35: data.train_split: 'train[:' is not allowed; allowed: a TFDS split such as",
    ),
    (
        good("{name: digits}", "5"),
        "x.yaml:3:7: data: 5 is not allowed; allowed: a mapping with the keys name, data_dir, ",
    ),
    (
        good("{name: digits}", ""),
        "x.yaml:3:6: data: null is not allowed; allowed: a mapping with the keys name, data_dir",
    ),
    (good("name: mlp", "name: gpt"), "x.yaml:5:9: model.name: 'gpt' is not allowed; allowed: one"),
    (
        good("[64, 32]", "[64, '32']"),
        "x.yaml:6:22: model.hidden_sizes[1]: '32' is not allowed (write it without quotes); "
        "allowed: a list of one or more whole numbers >= 1",
    ),
    (good("[64, 32]", "[]"), "x.yaml:6:17: model.hidden_sizes: [] is not allowed; allowed: a lis"),
    (good("[64, 32]", "64"), "x.yaml:6:17: model.hidden_sizes: 64 is not allowed; allowed: a lis"),
    (
        good("[64, 32]", "[64]\n  trainable: some"),
        "x.yaml:7:14: model.trainable: 'some' is not allowed; allowed: one of all, head, biases, ",
    ),
    (
        good("[64, 32]", "[64]\n  trainable: lora\n  lora_rank: 0"),
        "x.yaml:8:14: model.lora_rank: 0 is not allowed; allowed: a whole number >= 1",
    ),
    (
        good("[64, 32]", "[64]\n  lora_rank: 4"),
        "x.yaml:7:14: model.lora_rank: 4 is not allowed: nothing reads it with trainable all; "
        "allowed: 8, or trainable lora",
    ),
    (
        good("name: mlp", "name: cnn\n  trainable: lora"),
        "x.yaml:6:14: model.trainable: 'lora' is not allowed: cnn has no dense layer besides its ",
    ),
    (
        good("[64, 32]", "[64]\n  head_init_scale: -1"),
        "x.yaml:7:20: model.head_init_scale: -1 is not allowed; allowed: a number >= 0",
    ),
    (
        good("[64, 32]", "[64]\n  init_from: w.npz\n  init_is_public: 1"),
        "x.yaml:8:19: model.init_is_public: 1 is not allowed; allowed: true or false",
    ),
    (
        good("[64, 32]", "[64]\n  init_is_public: true"),
        "x.yaml:7:19: model.init_is_public: true is not allowed: nothing reads it without "
        "init_from; allowed: false, or a path in init_from",
    ),
    (
        good("[64, 32]", "[64]\n  fresh_head: true"),
        "x.yaml:7:15: model.fresh_head: true is not allowed: nothing reads it without init_from; ",
    ),
    # Privacy
    (
        good("  policy: per_trial\n"),
        "x.yaml:7:1: privacy.policy: is missing; allowed: one of per_trial",
    ),
    (
        good("  target_epsilon: 8.0\n"),
        "x.yaml:7:1: privacy.target_epsilon: is missing; allowed: a number > 0",
    ),
    (
        good("  target_delta: 1.0e-5\n"),
        "x.yaml:7:1: privacy.target_delta: is missing; allowed: a number in [1e-10, 1)",
    ),
    (
        GOOD[: GOOD.index("privacy:")] + GOOD[GOOD.index("search_space:") :],
        "x.yaml:1:1: privacy: is missing; allowed: a mapping with the keys policy, budget",
    ),
    (
        good("policy: per_trial", "policy: none"),
        "x.yaml:8:11: privacy.policy: 'none' is not allowed; allowed: one of per_trial, declared",
    ),
    (
        good("8.0", "eight"),
        "x.yaml:9:19: privacy.target_epsilon: 'eight' is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", '"8"'),
        "x.yaml:9:19: privacy.target_epsilon: '8' is not allowed (write it without quotes); "
        "allowed: a number > 0",
    ),
    (
        good("8.0", "true"),
        "x.yaml:9:19: privacy.target_epsilon: true is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", ".nan"),
        "x.yaml:9:19: privacy.target_epsilon: nan is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", ".inf"),
        "x.yaml:9:19: privacy.target_epsilon: inf is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", "1e999"),
        "x.yaml:9:19: privacy.target_epsilon: inf is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", "0"),
        "x.yaml:9:19: privacy.target_epsilon: 0 is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", "null"),
        "x.yaml:9:19: privacy.target_epsilon: null is not allowed; allowed: a number > 0",
    ),
    (
        good("8.0", "[8]"),
        "x.yaml:9:19: privacy.target_epsilon: [8] is not allowed; allowed: a number > 0",
    ),
    *[
        (
            good("1.0e-5", text),
            f"x.yaml:10:17: privacy.target_delta: {shown} is not allowed; allowed: a number in [",
        )
        for text, shown in [("0", "0"), ("1e-11", "1e-11"), ("1", "1"), ("-1e-5", "-1e-05")]
    ],
    (
        good("zero_out", "replace_one"),
        "x.yaml:11:25: privacy.neighboring_relation: 'replace_one' is not allowed; allowed: one "
        "of zero_out, add_or_remove_one",
    ),
    # The search space
    *[
        (good(line + "\n"), f"x.yaml:12:1: search_space.{line.split(':')[0].strip()}: is missing;")
        for line in GOOD.splitlines()[12:18]
    ],
    (
        good(LR, "  learning_rate: {grid_search: []}"),
        "x.yaml:14:32: search_space.learning_rate.grid_search: [] is not allowed; allowed: a "
        "list of one or more values",
    ),
    (
        good(LR, "  learning_rate: {grid_search: [1, 2, 1.0]}"),
        "x.yaml:14:39: search_space.learning_rate.grid_search[2]: 1.0 is listed twice; allowed: "
        "different values",
    ),
    (
        good(LR, "  learning_rate: [0.1, 1]"),
        "x.yaml:14:18: search_space.learning_rate: [0.1, 1] is not allowed; allowed: a number > "
        f"0, or one of the domains {NUMBER_DOMAINS}",
    ),
    (
        good(LR, "  learning_rate: {log_uniform: [1, 2]}"),
        "x.yaml:14:19: search_space.learning_rate.log_uniform: unknown domain (did you mean "
        f"loguniform?); allowed: a number > 0, or one of the domains {NUMBER_DOMAINS}",
    ),
    (
        good(LR, "  learning_rate: {uniform: [1, 2], choice: [1]}"),
        "x.yaml:14:18: search_space.learning_rate: 2 domains are given (uniform, choice); "
        "allowed: a number > 0, or one of the domains",
    ),
    (good(LR, "  learning_rate: {}"), "x.yaml:14:18: search_space.learning_rate: 0 domains are"),
    (
        good(LR, "  learning_rate: {uniform: [2, 1]}"),
        "x.yaml:14:28: search_space.learning_rate.uniform: [2, 1] is not allowed; allowed: "
        "[low, high] with low < high",
    ),
    (
        good(LR, "  learning_rate: {uniform: [1, 2, 3]}"),
        "x.yaml:14:28: search_space.learning_rate.uniform: [1, 2, 3] is not allowed; allowed: ",
    ),
    (
        good(LR, "  learning_rate: {uniform: 3}"),
        "x.yaml:14:28: search_space.learning_rate.uniform: 3 is not allowed; allowed: [low, high]",
    ),
    (
        good(LR, "  learning_rate: {loguniform: [0, 1]}"),
        "x.yaml:14:32: search_space.learning_rate.loguniform[0]: 0 is not allowed; allowed: a "
        "number > 0",
    ),
    (
        good(LR, "  learning_rate: {quniform: [0.31, 0.39, 0.1]}"),
        "x.yaml:14:29: search_space.learning_rate.quniform: [0.31, 0.39, 0.1] is not allowed; "
        "allowed: [low, high, step] with low < high and a multiple of step between them (there "
        "is no multiple of step between low and high)",
    ),
    (
        good(LR, "  learning_rate: {quniform: [0.1, 1, 1e-320]}"),
        "x.yaml:14:29: search_space.learning_rate.quniform: [0.1, 1, 1e-320] is not allowed;",
    ),
    (
        good(LR, "  learning_rate: {quniform: [0.1, 1, 0]}"),
        "x.yaml:14:38: search_space.learning_rate.quniform[2]: 0 is not allowed; allowed: a "
        "number > 0",
    ),
    (
        good("{choice: [64, 256]}", "{randint: [1.5, 64]}"),
        "x.yaml:15:35: search_space.expected_batch_size.randint[0]: 1.5 is not allowed; allowed: "
        "a whole number >= 1",
    ),
    (
        good("{choice: [64, 256]}", "0.5"),
        "x.yaml:15:24: search_space.expected_batch_size: 0.5 is not allowed; allowed: a number ",
    ),
    (
        good("150", "150.0"),
        "x.yaml:16:15: search_space.iterations: 150.0 is not allowed; allowed: a whole number ",
    ),
    (
        good("150", "{uniform: [50, 100]}"),
        "x.yaml:16:16: search_space.iterations.uniform: unknown domain; allowed: a whole number "
        "from 1 to 10000000, or one of the domains grid_search, choice, randint, lograndint",
    ),
    (
        good("noise_multiplier: 2.0", "noise_multiplier: -1"),
        "x.yaml:17:21: search_space.noise_multiplier: -1 is not allowed; allowed: a number > 0 "
        "or the word calibrated, or one of the domains",
    ),
    (
        good("noise_multiplier: 2.0", "noise_multiplier: 0"),
        "x.yaml:17:21: search_space.noise_multiplier: 0 is not allowed; allowed: a number > 0",
    ),
    (
        good("noise_multiplier: 2.0", "noise_multiplier: {choice: [1, auto]}"),
        "x.yaml:17:34: search_space.noise_multiplier.choice[1]: 'auto' is not allowed; allowed: "
        "a number > 0 or the word calibrated",
    ),
    (
        good("noise_multiplier: 2.0", "noise_multiplier: {uniform: [1, calibrated]}"),
        "x.yaml:17:35: search_space.noise_multiplier.uniform[1]: 'calibrated' is not allowed; "
        "allowed: a number > 0",
    ),
    (
        good("noise_multiplier: 2.0", "noise_multiplier: .nan"),
        "x.yaml:17:21: search_space.noise_multiplier: nan is not allowed; allowed: a number > 0",
    ),
    (
        good("l2_clip_norm: 1.0", "l2_clip_norm: '1.0'"),
        "x.yaml:18:17: search_space.l2_clip_norm: '1.0' is not allowed (write it without quotes);",
    ),
    (
        good("l2_clip_norm: 1.0", "l2_clip_norm: 1.0\n  weight_decay: -1"),
        "x.yaml:19:17: search_space.weight_decay: -1 is not allowed; allowed: a number >= 0, or "
        "one of the domains",
    ),
    (
        good("l2_clip_norm: 1.0", "l2_clip_norm: 1.0\n  weight_decay: {loguniform: [0, 1]}"),
        "x.yaml:19:31: search_space.weight_decay.loguniform[0]: 0 is not allowed; allowed: a "
        "number > 0",
    ),
    (
        good("l2_clip_norm: 1.0", "l2_clip_norm: 1.0\n  warmup_steps: 1.5"),
        "x.yaml:19:17: search_space.warmup_steps: 1.5 is not allowed; allowed: a whole number "
        "from 0 to 10000000",
    ),
    (
        good("l2_clip_norm: 1.0", "l2_clip_norm: 1.0\n  learning_rate_schedule: step"),
        "x.yaml:19:27: search_space.learning_rate_schedule: 'step' is not allowed; allowed: one "
        "of constant, linear, cosine",
    ),
    (
        good("[sgd, adam]", "[sgd, rmsprop]"),
        "x.yaml:13:34: search_space.optimizer.grid_search[1]: 'rmsprop' is not allowed; allowed: "
        "one of sgd, momentum, nesterov, adam, adamw, lamb, lars",
    ),
    (
        good("{grid_search: [sgd, adam]}", "{uniform: [1, 2]}"),
        "x.yaml:13:15: search_space.optimizer.uniform: unknown domain; allowed: one of sgd, ",
    ),
    # How trials are run
    (
        good("num_samples: 2", "num_samples: -1"),
        f"x.yaml:19:23: search.num_samples: -1 is not allowed; allowed: a whole number from 1 to "
        f"{MAX_TRIALS}",
    ),
    (
        good("num_samples: 2", "num_samples: 20000"),
        "x.yaml:12:1: search_space: the grid times search.num_samples gives 120000 trials; "
        f"allowed: at most {MAX_TRIALS}",
    ),
    (
        good("name: async_hyperband", "name: asha"),
        "x.yaml:20:19: scheduler.name: 'asha' is not allowed; allowed: one of async_hyperband, ",
    ),
    (
        good("name: async_hyperband, "),
        "x.yaml:20:1: scheduler.name: is missing; allowed: one of async_hyperband, fifo",
    ),
    (
        good("name: async_hyperband", "name: fifo").replace(", reduction_factor: 3", ""),
        "x.yaml:20:25: scheduler.grace_period: unknown key; allowed: name",
    ),
    (
        good("reduction_factor: 3", "reduction_factor: 1"),
        "x.yaml:20:72: scheduler.reduction_factor: 1 is not allowed; allowed: a whole number >= 2",
    ),
    (
        good("scheduler: {", "scheduler: fifo #"),
        "x.yaml:20:12: scheduler: 'fifo' is not allowed; allowed: {name: fifo} or {name: async_",
    ),
    (
        good("report_every_steps: 25", "report_every_steps: 0"),
        "x.yaml:21:21: report_every_steps: 0 is not allowed; allowed: a whole number >= 1",
    ),
    (
        good("seed: 0", "seed: -1"),
        "x.yaml:22:7: seed: -1 is not allowed; allowed: a whole number from 0 to 2147483647",
    ),
    (
        good("cpus_per_trial: 1", "cpus_per_trial: 0"),
        "x.yaml:23:55: resources.cpus_per_trial: 0 is not allowed; allowed: a number > 0",
    ),
    # What must hold together
    (
        good("grace_period: 25", "grace_period: 24"),
        "x.yaml:20:50: scheduler.grace_period: 24 is not allowed; allowed: from "
        "report_every_steps, 25, to below the most iterations, 150",
    ),
    (
        good("grace_period: 25", "grace_period: 150"),
        "x.yaml:20:50: scheduler.grace_period: 150 is not allowed; allowed: from ",
    ),
    (
        good("150", "{choice: [10, 150]}"),
        "x.yaml:21:21: report_every_steps: 25 exceeds the fewest iterations of a trial, 10; "
        "allowed: a whole number from 1 to 10",
    ),
    (
        good("report_every_steps: 25\n").replace("150", "{choice: [10, 150]}"),
        "x.yaml:1:1: report_every_steps: 25 (the default) exceeds the fewest iterations",
    ),
    (
        good("gpus_per_trial: 0", "gpus_per_trial: 1.5"),
        "x.yaml:23:74: resources.gpus_per_trial: 1.5 is not allowed; allowed: a whole number, or",
    ),
    (
        good("zero_out", "add_or_remove_one"),
        "x.yaml:3:1: data.declared_num_examples: is missing; allowed: a whole number >= 1. Under "
        "add_or_remove_one the data set's real size is protected, so give a public number",
    ),
    (
        good("{name: digits}", "{name: digits, declared_num_examples: 1400}"),
        "x.yaml:3:45: data.declared_num_examples: 1400 is not allowed; allowed: null, for under "
        "zero_out the data set's size is public and the real one is used",
    ),
    (
        good("{name: digits}", "{name: digits, declared_num_examples: 200}").replace(
            "zero_out", "add_or_remove_one"
        ),
        "x.yaml:15:24: search_space.expected_batch_size: 256 exceeds the 200 declared examples; ",
    ),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message[:70] for _, message in BAD])
def test_a_bad_spec_says_where_what_and_what_else(text, message):
    found = refusal(text)
    assert found.startswith(message)
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("train", "held_out", "disjoint"),
    [
        ("train", "test", True),
        ("train", "train", False),
        ("train", "train[:10%]", False),
        ("train[:80%]", "train[80%:]", True),
        ("train[:80%]", "train[79%:]", False),
        ("train[:-20%]", "train[80%:]", True),
        ("train[-0%:]", "train[80%:]", False),
        ("train[10%:20%]", "train[:10%]", True),
        ("train[1000:]", "train[:1000]", True),
        ("train[:1001]", "train[1000:]", False),
        ("train[:-500]", "train[-500:]", True),
        ("train[:-500]", "train[-501:]", False),
        ("train[:500]", "train[-500:]", False),
        ("train[:100]", "train[50%:]", False),
        ("train[:]", "train[50%:]", False),
        ("train+validation", "test", True),
        ("train + validation", "validation", False),
        ("train", "validation+train[:5]", False),
        ("all", "test", False),
        ("train", "all", False),
    ],
)
def test_metrics_are_never_shown_of_training_examples(train, held_out, disjoint):
    text = good("{name: digits}", f"{{name: d, train_split: '{train}', eval_split: '{held_out}'}}")
    if disjoint:
        assert parse_spec(text).data.eval_split == held_out
    else:
        assert f": data.eval_split: '{held_out}' may share examples" in refusal(text)


def test_add_or_remove_one_with_a_declared_size():
    text = good("{name: digits}", "{name: digits, declared_num_examples: 1400}")
    spec = parse_spec(text.replace("zero_out", "add_or_remove_one"))
    assert spec.data.declared_num_examples == 1400


def test_all_problems_are_listed_in_the_order_of_the_text():
    text = good("8.0", "eight").replace("digits}", "../etc}").replace("noise_mult", "noise_mul")
    lines = refusal(text).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "data.name",
        "privacy.target_epsilon",
        "search_space.noise_multiplier",
        "search_space.noise_muliplier",
    ]


def test_no_jargon_of_the_validator_leaks():
    everything = "\n".join(refusal(text) for text, _ in BAD).lower()
    for word in ("pydantic", "input should", "valid ", "tag '", "union", "discriminator"):
        assert word not in everything


def test_a_missing_file_is_a_spec_error(tmp_path):
    with pytest.raises(SpecError, match="there is no such file"):
        load_spec(tmp_path / "absent.yaml")


def test_what_is_found_later_is_placed_in_the_document_that_was_kept():
    document = parse_yaml(GOOD, source="x.yaml")
    assert validate_spec(document) == parse_spec(GOOD)
    later = SpecError([Problem(message="is too large", key_path="privacy.target_epsilon")])
    assert str(document.placed(later)) == "x.yaml:9:19: privacy.target_epsilon: is too large"


def test_a_spec_is_frozen():
    spec = parse_spec(GOOD)
    with pytest.raises(pydantic.ValidationError):
        spec.seed = 1


def test_hash_ignores_layout_and_sees_every_value():
    spec = parse_spec(GOOD)
    assert len(spec.spec_hash()) == 64
    assert parse_spec("# comment\n" + good("8.0", "8")).spec_hash() == spec.spec_hash()
    assert parse_spec(good("[0.1, 1, 8]", "[1e-1, 1.0, 8.0]")).spec_hash() == spec.spec_hash()
    spelled_out = good("  target_delta", "  accountant: pld\n  target_delta")
    assert parse_spec(spelled_out).spec_hash() == spec.spec_hash()
    for text in (good("8.0", "8.1"), good("seed: 3", "seed: 4"), good("[64, 32]", "[32, 64]")):
        assert parse_spec(text).spec_hash() != spec.spec_hash()


def test_hash_is_the_same_in_another_process():
    code = (
        f"from sweeps.spec.reading import load_spec; print(load_spec({str(DIGITS)!r}).spec_hash())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == load_spec(DIGITS).spec_hash()


def test_reading_a_spec_imports_no_heavy_library():
    code = (
        "import sys; import sweeps.search_space, sweeps.spec.reading; "
        "print([m for m in ('jax', 'ray', 'mlflow', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_example_is_allowed():
    spec = load_spec(DIGITS)
    assert spec.name == "digits"
    assert spec.search_space.expected_batch_size.kind == "grid_search"


@pytest.mark.parametrize("name", get_args(ModelName))
def test_every_model_can_be_named(name):
    spec = parse_spec(good("name: mlp", f"name: {name}"))
    assert spec.model.name == name
    data = {**GOOD_DATA, "model": {"name": name}}
    assert not list(jsonschema.Draft202012Validator(json_schema()).iter_errors(data))


@pytest.mark.parametrize(
    ("name", "ok"),
    [
        ("our_models.nets:Net", True),
        ("nets:make_net", True),
        ("our_models.nets", False),
        ("our_models..nets:Net", False),
        ("our_models.nets:Net.inner", False),
        ("mlp:", False),
        ("mlp2", False),
        ("../nets:Net", False),
        ("nets:Net()", False),
    ],
)
def test_a_model_of_ones_own_is_named_by_its_import_path(name, ok):
    data = {**GOOD_DATA, "model": {"name": name}}
    schema = jsonschema.Draft202012Validator(json_schema())
    assert schema.is_valid(data) == ok
    text = good("name: mlp", f"name: {name!r}")
    if ok:
        assert parse_spec(text).model.name == name
    else:
        assert "or package.module:attribute for a model of your own" in refusal(text)


def test_the_type_that_models_compute_in():
    assert parse_spec(GOOD).model.dtype == "float32"
    assert parse_spec(good("name: mlp", "name: mlp\n  dtype: bfloat16")).model.dtype == "bfloat16"
    told = refusal(good("name: mlp", "name: mlp\n  dtype: float16"))
    assert told.startswith("x.yaml:6:10: model.dtype: 'float16' is not allowed; allowed: one of ")
    told = refusal(good("name: mlp", "name: nets:Net\n  dtype: bfloat16"))
    assert told == (
        "x.yaml:6:10: model.dtype: bfloat16 is not allowed with nets:Net, which chooses itself; "
        "allowed: float32"
    )


def test_the_schema_file_is_current():
    assert json.loads(SCHEMA.read_text()) == json_schema(), "write it anew: make schema"


def test_the_schema_takes_the_example_and_refuses_what_the_reader_refuses():
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert not list(validator.iter_errors(GOOD_DATA))
    assert not list(validator.iter_errors(json.loads(load_spec(DIGITS).canonical_json())))
    for section, key, value in [
        ("privacy", "target_epsilon", "8"),
        ("privacy", "target_epsilon", 0),
        ("privacy", "policy", "none"),
        ("data", "name", "../etc"),
        ("search_space", "learning_rate", {"grid_search": []}),
        ("search_space", "learning_rate", {"log_uniform": [1, 2]}),
        ("search_space", "iterations", {"uniform": [1, 2]}),
        ("search_space", "noise_multiplier", "auto"),
        ("search", "typo", 1),
    ]:
        bad = copy.deepcopy(GOOD_DATA)
        bad[section][key] = value
        assert list(validator.iter_errors(bad)), (section, key, value)


def test_every_field_is_described():
    def undescribed(node, path):
        if isinstance(node, dict):
            for name, field in node.get("properties", {}).items():
                if "$ref" not in field and "description" not in field and "items" not in field:
                    yield f"{path}.{name}"
            for key, value in node.items():
                yield from undescribed(value, f"{path}/{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from undescribed(value, f"{path}/{index}")

    assert list(undescribed(json_schema(), "")) == []


# --- Whatever is handed in -----------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["sgd", "calibrated", "per_trial", "fifo", "async_hyperband", "grid_search"]),
)
NAMES = st.sampled_from(["grid_search", "uniform", "quniform", "name", "a"]) | st.text(max_size=5)
JUNK = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(NAMES, children, max_size=3),
    max_leaves=8,
)


def paths(node, prefix=()):
    yield prefix
    if isinstance(node, dict):
        children = list(node.items())
    else:
        children = list(enumerate(node)) if isinstance(node, list) else []
    for key, value in children:
        yield from paths(value, (*prefix, key))


@st.composite
def mutated_specs(draw):
    data = copy.deepcopy(GOOD_DATA)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted((p for p in paths(data) if p), key=repr)))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[path[-1]] = draw(JUNK)
            case "remove":
                del parent[path[-1]]
            case _ if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = draw(JUNK)
            case _:
                parent.append(draw(JUNK))
        if not data:
            break
    return data


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=200)
@given(mutated_specs())
def test_a_mutated_spec_is_read_or_refused_with_places(data):
    problems = []
    try:
        spec = parse_spec(json.dumps(data), source="x.yaml")
    except SpecError as error:
        problems = error.problems
    else:
        assert isinstance(spec, SweepSpec)
        assert parse_spec(spec.canonical_json()) == spec
    for problem in problems:
        assert str(problem).startswith("x.yaml:")
        assert str(problem).isprintable()
