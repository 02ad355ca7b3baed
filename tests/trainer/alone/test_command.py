"""The command line: what it answers, what it refuses, and how it ends."""

import json
import stat

import numpy as np
import pytest

import accounting
from tests.trainer.alone.trial_files import run_command, write
from trainer.alone.run_directory import RunDirectory
from trainer.errors import RunError
from trainer.weights.checkpoint_writer import checkpoints_in

DIGITS = 1437


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        return run_command(monkeypatch, capsys, *arguments)

    return run


def test_check_prints_the_cost_and_trains_nothing(command, tmp_path):
    trial = write(tmp_path)
    code, out, err = command(trial, "--check", "--json")
    assert (code, err) == (0, "")
    cost = json.loads(out)
    mechanism = accounting.DpSgdMechanism(
        noise_multiplier=2.0, sampling_prob=100 / DIGITS, iterations=20
    )
    assert cost["epsilon"] == accounting.epsilon(mechanism, delta=1e-5)
    assert cost["config"]["sampling_prob"] == 100 / DIGITS
    code, out, err = command(trial, "--check")
    assert (code, err) == (0, "")
    for words in (
        "1437 training and 360 evaluation examples",
        "sampling probability 0.0695894",
        "noise multiplier 2",
        "does NOT cover",
    ):
        assert words in out
    assert not (tmp_path / "runs").exists()


def test_check_tells_no_number_that_is_protected(command, tmp_path):
    changes = {"neighboring_relation": "add_or_remove_one", "sampling_prob": 0.07}
    code, out, _ = command(write(tmp_path, changes), "--check")
    assert code == 0
    assert str(DIGITS) not in out


def test_check_of_an_absent_data_set_says_so(command, tmp_path):
    trial = write(tmp_path, {"data.name": "cifar10", "sampling_prob": 0.07})
    code, out, err = command(trial, "--check")
    assert code == 0
    assert "epsilon" in out
    assert "is not prepared" in err
    code, out, err = command(trial)
    assert (code, out) == (2, "")
    assert "is not prepared" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing argument"),
        (["trial.yaml", "--fast"], "No such option"),
        (["nowhere.yaml"], "nowhere.yaml: there is no such file"),
        (["trial.yaml", "--devices", "0"], "--devices='0': allowed"),
        (["trial.yaml", "--devices", "many"], "--devices='many': allowed"),
        (["trial.yaml", "--devices", "4096"], "devices=4096: allowed"),
        (["trial.yaml", "--resume"], "holds no run to go on with"),
        (["trial.yaml", "--check", "--resume"], "--resume: allowed is --check without"),
        (["trial.yaml", "--coordinator", "a:1"], "allowed are all three or none"),
        (["trial.yaml", "--process-id", "0"], "allowed are all three or none"),
        (
            ["trial.yaml", "--coordinator", "a", "--num-processes", "2", "--process-id", "0"],
            "allowed is HOST:PORT",
        ),
        (
            ["trial.yaml", "--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"],
            "--num-processes=0: allowed",
        ),
        (
            ["trial.yaml", "--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id=2: allowed",
        ),
        (["trial.yaml", "--out", "trial.yaml"], "trial.yaml: cannot be made"),
        (["unknown_model.yaml"], "no_such_module"),
    ],
    ids=str,
)
def test_bad_input_ends_with_2_and_leaves_nothing(command, tmp_path, arguments, words):
    write(tmp_path)
    write(tmp_path, {"model.name": "no_such_module:Model"}, name="unknown_model.yaml")
    code, out, err = command(*arguments)
    assert code == 2
    assert words in err
    assert out == ""
    runs = tmp_path / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_help_has_examples(command):
    code, out, _ = command("--help")
    assert code == 0
    assert "python -m trainer specs/trials/digits.yaml --out runs/first --resume" in out


@pytest.mark.slow
def test_a_run_from_start_to_end_and_again(command, tmp_path):
    changes = {
        "averaging.ema_decay": 0.9,
        "evaluation": {"protection": "dp", "noise_multiplier": 3.0},
        "clipping.engine": "vmap",
    }
    trial = write(tmp_path, changes)
    code, out, err = command(trial, "--json")
    assert code == 0
    reports = [json.loads(line) for line in out.splitlines()]
    assert [report["step"] for report in reports] == [10, 20]
    assert reports[-1]["outcome"] == "completed"
    assert "step 20/20" in err
    assert "(their number is public)" in err
    run = RunDirectory(tmp_path / "runs" / "trial")
    kept = run.reports.read_text().splitlines()
    assert [json.loads(line) for line in kept] == reports
    assert run.newest_checkpoint() == run.checkpoints / "step-00000020"
    assert stat.S_IMODE(run.secrets.stat().st_mode) == 0o700
    assert list(run.secrets.iterdir()) == []  # forgotten at the end
    (charged,) = json.loads(run.charges.read_text())["branches"].values()
    assert [charged[name] for name in ("start_step", "step", "counts")] == [0, 20, 4]
    assert json.loads(run.config.read_text())["sampling_prob"] == 100 / DIGITS
    spent = reports[-1]["epsilon"], reports[-1]["eval_epsilon"]
    assert spent == tuple(
        json.loads(command(trial, "--check", "--json")[1])[name]
        for name in ("epsilon", "eval_epsilon")
    )

    code, out, err = command(trial, "--devices", 1)
    assert (code, out) == (2, "")
    assert "holds a run already" in err
    assert "--out runs/trial --resume --devices 1;" in err

    code, out, err = command(trial, "--resume")  # nothing is left
    assert code == 0
    assert "nothing is left to run" in err
    assert "completed at step 20 of 20" in out

    changes["evaluation"]["noise_multiplier"] = 4.0
    code, out, err = command(write(tmp_path, changes), "--resume")
    assert (code, out) == (1, "")
    assert "evaluation.noise_multiplier=3.0, now 4.0" in err


@pytest.mark.slow
def test_initial_weights_and_non_private_evaluation_are_marked(command, tmp_path):
    weights = {"head/kernel": np.zeros((64, 10)), "head/bias": np.zeros(10)}
    np.savez(tmp_path / "weights.npz", **weights)
    changes = {
        "evaluation.protection": "non_private",
        "clipping.engine": "vmap",
        "model.init_from": "weights.npz",
        "model.init_is_public": True,
    }
    code, out, err = command(write(tmp_path, changes))
    assert code == 0
    assert "initial weights 'weights.npz': 2 arrays loaded, 0 fresh" in err
    assert "'weights.npz', which count as public" in out
    assert "NON-PRIVATE EVALUATION" in out
    assert "NON-PRIVATE accuracy" in err
    last = RunDirectory(tmp_path / "runs" / "trial").last_report()
    assert last is not None
    assert 0 <= last["non_private_eval_accuracy"] <= 1
    assert "eval_accuracy" not in last


@pytest.mark.slow
def test_a_diverged_trial_fails_and_is_not_gone_on_with(command, tmp_path):
    changes = {
        "learning_rate": 3e38,
        "l2_clip_norm": 1e30,
        "clipping.engine": "vmap",
        "optimizer": "momentum",
    }
    trial = write(tmp_path, changes)
    code, out, _ = command(trial)
    assert code == 1
    assert "diverged at step 10 of 20" in out
    code, _, err = command(trial, "--resume")
    assert code == 2
    assert "diverged at step 10" in err


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [1, 2], ids=["the newest", "all"])
def test_a_damaged_checkpoint_is_passed_over_and_its_steps_are_free(
    command, monkeypatch, tmp_path, damaged
):
    trial = write(tmp_path, {"clipping.engine": "vmap", "report_every_steps": 5})
    run = RunDirectory(tmp_path / "runs" / "trial")
    add_report = RunDirectory.add_report

    def killed(self, line):
        add_report(self, line)
        if json.loads(line)["step"] == 15:
            raise RunError("killed")

    with monkeypatch.context() as short:
        short.setattr(RunDirectory, "add_report", killed)
        code, _, err = command(trial)
    assert code == 2
    assert "killed" in err
    kept = checkpoints_in(run.checkpoints)
    assert [path.name for path in kept] == ["step-00000015", "step-00000010"]
    for path in kept[:damaged]:
        (path / "checkpoint.json").write_text("{")

    code, out, err = command(trial, "--resume")
    assert code == 0
    assert err.count("its checkpoint.json is damaged; going on from step") == damaged
    assert f"going on from step {10 if damaged == 1 else 0}" in err
    (charged,) = json.loads(run.charges.read_text())["branches"].values()
    assert [charged[name] for name in ("start_step", "step")] == [0, 20]
    assert "completed at step 20 of 20" in out
    assert "taken again" not in out


def test_a_run_directory_belongs_to_one_process(tmp_path):
    run, other = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    with (
        run.taken(resume=False, how_to_resume=""),
        pytest.raises(RunError, match="another process works in it"),
        other.taken(resume=True, how_to_resume=""),
    ):
        pass


def test_a_report_that_was_cut_short_is_passed_over(tmp_path):
    run = RunDirectory(tmp_path)
    run.add_report('{"step": 1}')
    with open(run.reports, "a") as file:
        file.write('{"step": 2, "eps')
    assert run.last_report() == {"step": 1}
    run.add_report('{"step": 3}')
    assert run.last_report() == {"step": 3}
