import dataclasses
import math
import typing

import jax
import numpy as np
import pytest

import accounting
from trainer import trial as trial_module
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.config_sections import AveragingConfig, EvaluationConfig
from trainer.errors import CheckpointError, ConfigError, OutOfMemory
from trainer.loop import run_trial, trial_reports
from trainer.mechanism.keys import BranchKeys
from trainer.reporting import Dp, Private, Public, TrialReport, label_of, releasable
from trainer.training import devices
from trainer.training.evaluation import Utility, with_noise
from trainer.training.plan import evaluation_mechanism, make_plan, mechanism_of
from trainer.trial import Trial
from trainer.weights import checkpoint_writer, checkpoints
from trainer.weights.checkpoint_writer import checkpoint_path

CONFIG = TrialConfig(
    data=DataConfig(name="digits"),
    model=ModelConfig(name="logistic_regression"),
    optimizer="sgd",
    learning_rate=8.0,
    l2_clip_norm=1.0,
    noise_multiplier=2.0,
    sampling_prob=0.18,
    expected_batch_size=0.18 * 1437,
    iterations=10,
    report_every_steps=4,
    target_delta=1e-5,
    accountant="rdp",
)


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def test_a_trial_reports_regularly_and_at_its_end(data_home):
    reports = []
    result = run_trial(CONFIG, data_home=data_home, on_report=reports.append)
    assert [report.step for report in reports] == [4, 8, 10]
    assert [report.outcome for report in reports] == ["running", "running", "completed"]
    assert result.report == reports[-1]
    assert result.checkpoint is None
    for report in reports:
        spent = mechanism_of(CONFIG).after(report.step)
        assert report.epsilon == accounting.epsilon(spent, delta=1e-5, accountant="rdp")


@pytest.mark.slow
def test_digits_reach_the_accuracy_that_the_budget_allows(data_home):
    # Logistic regression at epsilon 5.6: 0.932 in the mean of three runs; 0.90 leaves room for
    # the noise of one (std about 0.008).
    config = dataclasses.replace(CONFIG, iterations=150, report_every_steps=150, accountant="pld")
    report = run_trial(config, data_home=data_home).report
    assert (report.eval_accuracy or 0) >= 0.90
    assert report.epsilon == pytest.approx(5.566, abs=1e-3)


def test_steps_are_charged_before_anything_of_them_leaves(data_home, tmp_path, monkeypatch):
    events = []
    evaluate, save = trial_module.evaluate, checkpoint_writer.save_checkpoint

    def spy_evaluate(*args):
        events.append("evaluate")
        return evaluate(*args)

    saved = []

    def spy_save(*args, **kwargs):
        # In the background: what matters is what had been charged by then.
        saved.append((kwargs["step"], [event for event in events if event.startswith("charge")]))
        save(*args, **kwargs)

    monkeypatch.setattr(trial_module, "evaluate", spy_evaluate)
    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", spy_save)

    def charge(branch, step):
        assert branch.start_step == 0
        events.append(f"charge {step}")
        return step

    run_trial(
        CONFIG,
        data_home=data_home,
        checkpoint_dir=tmp_path,
        charge=charge,
        on_report=lambda report: events.append(f"report {report.step}"),
    )
    expected = [
        event for step in (4, 8, 10) for event in (f"charge {step}", "evaluate", f"report {step}")
    ]
    assert events == expected
    assert [step for step, _ in saved] == [4, 8, 10]
    assert all(f"charge {step}" in charged for step, charged in saved)


def test_a_refused_charge_releases_nothing(data_home, tmp_path):
    def charge(branch, step):
        if step > 4:
            raise RuntimeError("refused")
        return step

    reports = []
    with pytest.raises(RuntimeError, match="refused"):
        run_trial(
            CONFIG,
            data_home=data_home,
            checkpoint_dir=tmp_path,
            charge=charge,
            on_report=reports.append,
        )
    assert [report.step for report in reports] == [4]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def failing(trial, monkeypatch, most):
    """Lets a trial's steps fail for want of memory with more than so many at a time."""
    sizes = []
    real = trial.runner.advance

    def advance(recipe, state, **arguments):
        sizes.append(recipe.microbatch_size)
        if recipe.microbatch_size is None or recipe.microbatch_size > most:
            jax.tree.map(lambda leaf: leaf.delete(), state)  # donated, and lost
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return real(recipe, state, **arguments)

    monkeypatch.setattr(trial.runner, "advance", advance)
    return sizes


def test_where_memory_is_short_microbatches_shrink_and_nothing_else_changes(
    data_home, monkeypatch, caplog
):
    monkeypatch.setattr(devices, "BranchKeys", lambda: BranchKeys(bytes(32)))
    want = run_trial(CONFIG, data_home=data_home).report
    trial = Trial(CONFIG, data_home, devices.topology(1))
    sizes = failing(trial, monkeypatch, most=100)
    at = trial.start(None, None)
    for step in (4, 8, 10):
        at = trial.advance(at, step, lambda step: None)
    capacity = make_plan(CONFIG, 1437).sampler.capacity
    assert sizes == [None, capacity // 2, *[capacity // 4] * 3]
    assert "out of memory" in caplog.text
    assert trial.report(at, 10, 0).eval_loss == pytest.approx(want.eval_loss, rel=1e-4)


def test_memory_that_is_too_short_for_one_example_is_an_error(data_home, monkeypatch):
    trial = Trial(CONFIG, data_home, devices.topology(1))
    sizes = failing(trial, monkeypatch, most=0)
    with pytest.raises(OutOfMemory, match="microbatch_size=1: allowed is a device") as refused:
        trial.advance(trial.start(None, None), 4, lambda step: None)
    assert refused.value.microbatch_size == sizes[-1] == 1


def test_stopping_means_not_asking_for_more(data_home):
    charged = []
    reports = trial_reports(
        CONFIG, data_home=data_home, charge=lambda branch, step: charged.append(step) or step
    )
    assert next(reports).step == 4
    reports.close()
    assert charged == [4]


def test_the_newest_two_checkpoints_are_kept(data_home, tmp_path):
    result = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["step-00000008", "step-00000010"]
    assert result.checkpoint == checkpoint_path(tmp_path, 10)
    assert checkpoints.read_manifest(checkpoint_path(tmp_path, 10)).step == 10


def params_of(checkpoint, config=CONFIG):
    from trainer.models import init_params, make_model

    like = init_params(make_model(config.model, 10), (8, 8, 1), 0)
    return checkpoints.load_params(checkpoint, like)


def test_a_resumed_trial_starts_from_the_checkpoints_parameters(data_home, tmp_path):
    config = dataclasses.replace(CONFIG, optimizer="momentum", iterations=4)
    first = run_trial(config, data_home=data_home, checkpoint_dir=tmp_path / "a")
    longer = dataclasses.replace(config, iterations=6)
    charged = []

    def charge(branch, step):
        charged.append(step)
        return 7  # an earlier branch had taken one more step than the checkpoint holds

    result = run_trial(
        longer,
        data_home=data_home,
        resume_from=first.checkpoint,
        charge=charge,
        checkpoint_dir=tmp_path / "b",
    )
    assert charged == [6]
    assert result.report.step == 6
    # Epsilon speaks of every iteration charged, not of this branch's steps.
    assert result.report.epsilon == accounting.epsilon(
        mechanism_of(longer).after(7), delta=1e-5, accountant="rdp"
    )
    # A step of learning rate 8 with noise 2 on 259 examples moves each weight by about 0.06.
    moved = jax.tree.map(np.subtract, params_of(result.checkpoint), params_of(first.checkpoint))
    largest = max(float(np.max(np.abs(leaf))) for leaf in jax.tree.leaves(moved))
    assert 0 < largest < 2


def test_resuming_needs_a_ledger(data_home, tmp_path):
    first = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path)
    longer = dataclasses.replace(CONFIG, iterations=20)
    with pytest.raises(ConfigError, match="resume_from without charge"):
        run_trial(longer, data_home=data_home, resume_from=first.checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 1.0},
        {"l2_clip_norm": 2.0},
        {"optimizer": "adam"},
        {"sampling_prob": 0.2},
        {"model": ModelConfig(name="mlp")},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_configurations_checkpoint_is_not_resumed(data_home, tmp_path, change):
    first = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path)
    other = dataclasses.replace(CONFIG, iterations=20, **change)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        run_trial(other, data_home=data_home, resume_from=first.checkpoint, charge=lambda b, s: s)


def test_a_trial_on_the_same_data_may_not_start_from_a_checkpoint_for_free(data_home, tmp_path):
    first = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path)
    model = dataclasses.replace(CONFIG.model, init_from=str(first.checkpoint))
    with pytest.raises(CheckpointError, match="budget that nobody accounts for"):
        run_trial(dataclasses.replace(CONFIG, model=model), data_home=data_home)


def test_a_trial_may_start_from_public_parameters(data_home, tmp_path, monkeypatch):
    # The checkpoint of other data of the same form, which a fingerprint of its own stands for.
    first = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path / "public")
    assert first.checkpoint is not None
    manifest = first.checkpoint / "checkpoint.json"
    manifest.write_text(
        manifest.read_text().replace(
            checkpoints.read_manifest(first.checkpoint).dataset_fingerprint, "0" * 32
        )
    )
    model = dataclasses.replace(CONFIG.model, init_from=str(first.checkpoint))
    # So little learning that the parameters stay where they began.
    config = dataclasses.replace(CONFIG, model=model, learning_rate=1e-9, iterations=1)
    result = run_trial(config, data_home=data_home, checkpoint_dir=tmp_path / "private")
    for ours, theirs in zip(
        jax.tree.leaves(params_of(result.checkpoint)),
        jax.tree.leaves(params_of(first.checkpoint)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_a_diverged_trial_ends_and_says_so(data_home):
    config = dataclasses.replace(
        CONFIG, learning_rate=1e38, l2_clip_norm=1e3, optimizer="momentum"
    )
    reports = []
    run_trial(config, data_home=data_home, on_report=reports.append)
    assert reports[-1].outcome == "diverged"
    assert reports[-1].step < config.iterations


def test_two_runs_of_one_configuration_have_different_noise(data_home, tmp_path):
    one = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path / "1")
    two = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path / "2")
    first, second = params_of(one.checkpoint), params_of(two.checkpoint)
    assert not np.array_equal(jax.tree.leaves(first)[1], jax.tree.leaves(second)[1])


def test_averages_are_measured_beside_the_last_iterate(data_home):
    averaging = AveragingConfig(ema_decay=0.9, polyak=True)
    report = run_trial(
        dataclasses.replace(CONFIG, averaging=averaging), data_home=data_home
    ).report
    losses = [report.eval_loss, report.ema_eval_loss, report.polyak_eval_loss]
    assert all(loss is not None and 0 < loss < 2.5 for loss in losses)
    assert len(set(losses)) == 3
    plain = run_trial(CONFIG, data_home=data_home).report
    assert plain.ema_eval_accuracy is plain.polyak_eval_loss is None


DP_EVALUATION = EvaluationConfig(protection="dp", noise_multiplier=4.0)


def test_private_evaluation_counts_with_noise_and_has_an_account_of_its_own(data_home):
    averaging = AveragingConfig(polyak=True)
    config = dataclasses.replace(CONFIG, evaluation=DP_EVALUATION, averaging=averaging)
    charged, reports = [], []

    def charge_counts(branch, step, counts):
        assert len(reports) == len(charged)  # before anything of it is told
        charged.append((step, counts))
        return counts

    run_trial(config, data_home=data_home, charge_counts=charge_counts, on_report=reports.append)
    assert charged == [(4, 2), (8, 4), (10, 6)]
    mechanism = evaluation_mechanism(config)
    assert mechanism is not None
    assert mechanism.iterations == 6
    for report, (_, counts) in zip(reports, charged, strict=True):
        spent = mechanism.after(counts)
        assert report.eval_epsilon == accounting.epsilon(spent, delta=1e-5, accountant="rdp")
        assert report.epsilon == accounting.epsilon(
            mechanism_of(config).after(report.step), delta=1e-5, accountant="rdp"
        )
        assert report.eval_loss is None
        # Noise of 4 on a count out of 360, which is no whole number then.
        assert -0.1 < report.eval_accuracy < 1.1
        assert abs(report.eval_accuracy * 360 - round(report.eval_accuracy * 360)) > 0


def test_a_refused_count_tells_nothing(data_home):
    def refuse(branch, step, counts):
        raise RuntimeError("refused")

    config = dataclasses.replace(CONFIG, evaluation=DP_EVALUATION)
    reports = trial_reports(config, data_home=data_home, charge_counts=refuse)
    with pytest.raises(RuntimeError, match="refused"):
        next(reports)


def test_noise_on_counts_has_its_std():
    # 4,000 draws: the sample std has a relative standard error of 1.1 %; 5 of them.
    keys = BranchKeys(bytes(32))
    told = [
        with_noise(Utility(0.5, 1.0), 1000, 3.0, keys.evaluation_rng(step)).accuracy * 1000
        for step in range(4000)
    ]
    assert np.std(told) == pytest.approx(3.0, rel=0.056)
    assert np.mean(told) == pytest.approx(500, abs=5 * 3 / np.sqrt(4000))


def test_non_private_evaluation_is_private_to_whoever_did_not_ask(data_home):
    config = dataclasses.replace(CONFIG, evaluation=EvaluationConfig(protection="non_private"))
    report = run_trial(config, data_home=data_home).report
    assert report.eval_accuracy is None
    assert 0 < (report.non_private_eval_accuracy or 0) < 1
    released = releasable(report)
    assert not [name for name in released if "eval" in name]
    assert label_of(TrialReport, "non_private_eval_accuracy") == "private"


@dataclasses.dataclass(frozen=True)
class Leaky:
    step: Public[int]
    epsilon: Dp[float]
    train_loss: Private[float]
    forgotten: float = math.nan


def test_only_public_and_dp_fields_leave():
    assert releasable(Leaky(1, 2.0, 3.0, 4.0)) == {"step": 1, "epsilon": 2.0}


def test_every_field_of_a_report_is_labelled_in_its_type():
    hints = typing.get_type_hints(TrialReport, include_extras=True)
    for field in dataclasses.fields(TrialReport):
        assert hints[field.name].__metadata__, field.name
        private = label_of(TrialReport, field.name) == "private"
        assert private == field.name.startswith("non_private_"), field.name
