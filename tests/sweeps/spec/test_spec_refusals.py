"""Each refusal of a specification says where, what and what else."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sweeps.errors import SpecError
from sweeps.spec.reading import load_spec, parse_spec
from sweeps.spec.search_spec import MAX_TRIALS
from sweeps.spec.sweep_spec import SweepSpec
from tests.sweeps.spec.spec_text import GOOD, GOOD_DATA, good, refusal

NUMBER_DOMAINS = "grid_search, choice, uniform, loguniform, quniform, randint, lograndint"
PBT = (
    "{name: pbt, perturbation_interval: 50, "
    "hyperparam_mutations: {learning_rate: {loguniform: [0.1, 1]}}}"
)
ASHA = "{name: async_hyperband, grace_period: 25, reduction_factor: 3}"
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
        "x.yaml:20:1: scheduler.name: is missing; allowed: one of async_hyperband, fifo, "
        "hyperband, median_stopping_rule, pbt",
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
        "x.yaml:20:12: scheduler: 'fifo' is not allowed; allowed: {name: fifo}, {name: async_",
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
        good("reduction_factor: 3", "promotion: 1"),
        "x.yaml:20:65: scheduler.promotion: 1 is not allowed; allowed: true or false",
    ),
    (
        good(ASHA, "{name: hyperband, grace_period: 24}"),
        "x.yaml:20:44: scheduler.grace_period: 24 is not allowed; allowed: from "
        "report_every_steps, 25, to the most iterations / reduction_factor, 50",
    ),
    (
        good(ASHA, "{name: hyperband, grace_period: 51}"),
        "x.yaml:20:44: scheduler.grace_period: 51 is not allowed; allowed: from ",
    ),
    (
        good(ASHA, "{name: hyperband, reduction_factor: 7}"),
        "x.yaml:20:48: scheduler.reduction_factor: 7 is not allowed; allowed: at most the most "
        "iterations, 150, / report_every_steps, 25 (otherwise nothing can be pruned",
    ),
    (
        good(ASHA, "{name: hyperband, grace_period: 0}"),
        "x.yaml:20:44: scheduler.grace_period: 0 is not allowed; allowed: null or a whole number",
    ),
    (
        good(ASHA, "{name: hyperband, max_t: 150}"),
        "x.yaml:20:30: scheduler.max_t: unknown key; allowed: name, grace_period, reduction_fac",
    ),
    (
        good(ASHA, PBT.replace("50", "20")),
        "x.yaml:20:47: scheduler.perturbation_interval: 20 is not allowed; allowed: from "
        "report_every_steps, 25, to below the most iterations, 150",
    ),
    (
        good(ASHA, PBT.replace("learning_rate: {loguniform: [0.1, 1]}", "")),
        "x.yaml:20:51: scheduler.hyperparam_mutations: names no field; allowed: at least one of "
        "learning_rate, l2_clip_norm, weight_decay, noise_multiplier",
    ),
    (
        good(ASHA, PBT.replace("{loguniform: [0.1, 1]}", "0.5")),
        "x.yaml:20:89: scheduler.hyperparam_mutations.learning_rate: 0.5 is not allowed; "
        "allowed: one of the domains choice, uniform, ",
    ),
    (
        good(ASHA, PBT.replace("loguniform: [0.1, 1]", "grid_search: [0.5]")),
        "x.yaml:20:90: scheduler.hyperparam_mutations.learning_rate.grid_search: unknown domain",
    ),
    (
        good(ASHA, PBT.replace("learning_rate", "iterations")),
        "x.yaml:20:74: scheduler.hyperparam_mutations.iterations: unknown key (did you mean ",
    ),
    (
        good(ASHA, PBT.replace("50", "50, quantile_fraction: 0.6")),
        "x.yaml:20:70: scheduler.quantile_fraction: 0.6 is not allowed; allowed: a number > 0, "
        "at most 0.5",
    ),
    (
        good(ASHA, PBT.replace("50", "50, resample_probability: -1")),
        "x.yaml:20:73: scheduler.resample_probability: -1 is not allowed; allowed: a number from",
    ),
    (
        good(ASHA, PBT).replace("policy: per_trial", "policy: declared"),
        "x.yaml:20:19: scheduler.name: pbt is not allowed under declared, whose list of trials is "
        "fixed before the first of them runs; allowed: another scheduler, or the policy open",
    ),
    (
        good(ASHA, PBT)
        .replace("grid_search", "choice")
        .replace("{num_samples: 2", "{name: optuna, num_samples: 9"),
        "x.yaml:19:16: search.name: optuna is not allowed with pbt, whose population is there "
        "from the beginning; allowed: random or quasi_random",
    ),
    (
        good(ASHA, PBT)
        .replace("grid_search", "choice")
        .replace("num_samples: 2", "num_samples: 1"),
        "x.yaml:19:23: search.num_samples: 1 is not allowed with pbt and a space without a grid; "
        "allowed: at least 2",
    ),
    (
        good(ASHA, PBT) + "mechanism: {bands: 2}\n",
        "x.yaml:24:20: mechanism.bands: 2 is not allowed with pbt, for noise that is correlated",
    ),
    (
        good(ASHA, "{name: median_stopping_rule, grace_period: 20}"),
        "x.yaml:20:55: scheduler.grace_period: 20 is not allowed; allowed: from "
        "report_every_steps, 25, to below the most iterations, 150",
    ),
    (
        good(ASHA, "{name: median_stopping_rule, grace_period: 150}"),
        "x.yaml:20:55: scheduler.grace_period: 150 is not allowed; allowed: from ",
    ),
    (
        good(ASHA, "{name: median_stopping_rule}"),
        "x.yaml:20:1: scheduler.grace_period: is missing",
    ),
    (
        good(ASHA, "{name: median_stopping_rule, grace_period: 25, min_samples_required: 0}"),
        "x.yaml:20:81: scheduler.min_samples_required: 0 is not allowed; allowed: a whole",
    ),
    (
        good(ASHA, "{name: median_stopping_rule, grace_period: 25, hard_stop: false}"),
        "x.yaml:20:59: scheduler.hard_stop: unknown key; allowed: name, grace_period, min_sampl",
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
        good("gpus_per_trial: 0", "gpus_per_trial: 2, trials_per_worker: 4"),
        "x.yaml:23:96: resources.trials_per_worker: 4 is not allowed with gpus_per_trial above 1, "
        "for one device runs the program; allowed: 1",
    ),
    (
        good("gpus_per_trial: 0", "gpus_per_trial: 0, trials_per_worker: 0"),
        "x.yaml:23:96: resources.trials_per_worker: 0 is not allowed; allowed: a whole number",
    ),
    (
        good("seed: 0", "seed: 0\nmechanism: {bands: 4}").replace(
            "gpus_per_trial: 0", "gpus_per_trial: 0, trials_per_worker: 4"
        ),
        "x.yaml:24:96: resources.trials_per_worker: 4 is not allowed with mechanism.bands above 1",
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
