import dataclasses
import math

import jax
import numpy as np
import pytest

import accounting
from trainer import checkpoints, loop
from trainer.config import DataConfig, ModelConfig, TrialConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.keys import BranchKeys
from trainer.loop import checkpoint_path, run_trial, trial_reports
from trainer.plan import make_plan, mechanism_of
from trainer.reporting import DP, PRIVATE, PUBLIC, TrialReport, releasable

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
    assert report.eval_accuracy >= 0.90
    assert report.epsilon == pytest.approx(5.566, abs=1e-3)


def test_steps_are_charged_before_anything_of_them_leaves(data_home, tmp_path, monkeypatch):
    events = []
    evaluate, save = loop.evaluate, loop.save_checkpoint

    def spy_evaluate(*args):
        events.append("evaluate")
        return evaluate(*args)

    def spy_save(*args, **kwargs):
        events.append("save")
        save(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", spy_evaluate)
    monkeypatch.setattr(loop, "save_checkpoint", spy_save)

    def charge(step):
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
        event
        for step in (4, 8, 10)
        for event in (f"charge {step}", "evaluate", "save", f"report {step}")
    ]
    assert events == expected


def test_a_refused_charge_releases_nothing(data_home, tmp_path):
    def charge(step):
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


def test_where_memory_is_short_microbatches_shrink_and_nothing_else_changes(
    data_home, monkeypatch, caplog
):
    keys = BranchKeys()
    monkeypatch.setattr(loop, "BranchKeys", lambda: keys)
    want = run_trial(CONFIG, data_home=data_home).report
    sizes = []

    def make_segment(*settings):
        *_, size = settings
        segment = real(*settings)

        def run(state, *arguments):
            sizes.append(size)
            if size is None or size > 100:
                jax.tree.map(lambda leaf: leaf.delete(), state)  # donated, and lost
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            return segment(state, *arguments)

        return run

    real = loop.make_segment
    monkeypatch.setattr(loop, "make_segment", make_segment)
    got = run_trial(CONFIG, data_home=data_home).report
    capacity = make_plan(CONFIG, 1437).sampler.capacity
    assert sizes == [None, capacity // 2, *[capacity // 4] * 3]
    assert "out of memory" in caplog.text
    assert got.step == want.step
    assert got.eval_loss == pytest.approx(want.eval_loss, rel=1e-4)


def test_memory_that_is_too_short_for_one_example_is_an_error(data_home, monkeypatch):
    def make_segment(*settings):
        def run(*arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

        return run

    monkeypatch.setattr(loop, "make_segment", make_segment)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        run_trial(CONFIG, data_home=data_home)


def test_stopping_means_not_asking_for_more(data_home):
    charged = []
    reports = trial_reports(
        CONFIG, data_home=data_home, charge=lambda step: charged.append(step) or step
    )
    assert next(reports).step == 4
    reports.close()
    assert charged == [4]


def test_only_the_newest_checkpoint_is_kept(data_home, tmp_path):
    result = run_trial(CONFIG, data_home=data_home, checkpoint_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
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

    def charge(step):
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
        run_trial(other, data_home=data_home, resume_from=first.checkpoint, charge=lambda s: s)


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


@dataclasses.dataclass(frozen=True)
class Leaky:
    step: int = dataclasses.field(metadata=PUBLIC)
    epsilon: float = dataclasses.field(metadata=DP)
    train_loss: float = dataclasses.field(metadata=PRIVATE)
    forgotten: float = math.nan


def test_only_public_and_dp_fields_leave():
    assert releasable(Leaky(1, 2.0, 3.0, 4.0)) == {"step": 1, "epsilon": 2.0}


def test_every_field_of_a_report_is_labelled():
    labels = {field.name: field.metadata.get("label") for field in dataclasses.fields(TrialReport)}
    assert set(labels.values()) <= {"public", "dp"}
