"""The tuned specification reaches what its comment and the README say."""

from pathlib import Path

import pytest
import yaml

import accounting
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.loop import run_trial

SPEC = Path(__file__).parents[2] / "specs" / "digits_tuned.yaml"


def trained(data_home):
    spec = yaml.safe_load(SPEC.read_text())
    space = spec["search_space"]
    sampling_prob = space["expected_batch_size"] / 1437
    noise_multiplier = accounting.calibrate_noise_multiplier(
        target_epsilon=8.0,
        target_delta=1e-5,
        sampling_prob=sampling_prob,
        iterations=space["iterations"],
        neighboring_relation="zero_out",
    )
    config = TrialConfig(
        data=DataConfig(**spec["data"]),
        model=ModelConfig(name="cnn", channels=tuple(spec["model"]["channels"])),
        optimizer="momentum",
        learning_rate=space["learning_rate"],
        learning_rate_schedule=space["learning_rate_schedule"],
        l2_clip_norm=space["l2_clip_norm"],
        noise_multiplier=noise_multiplier,
        sampling_prob=sampling_prob,
        expected_batch_size=float(space["expected_batch_size"]),
        iterations=space["iterations"],
        report_every_steps=space["iterations"],
        target_delta=1e-5,
    )
    return run_trial(config, data_home=data_home).report


@pytest.mark.slow
def test_tuned_digits_reach_93_percent(tmp_path, as_users_run_it):
    # 0.968 in the mean of five that differ in noise and initialisation, with a standard deviation
    # of 0.008. The bar is 4.8 of these below, so a false alarm comes once in a million runs.
    report = as_users_run_it(trained, tmp_path)
    assert report.epsilon <= 8.0
    assert (report.eval_accuracy or 0) >= 0.93
