"""Every command of docs/trainer.md runs, and every snippet is a change that would be taken."""

import ast
import dataclasses
import inspect
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

import accounting
import trainer
from tests.trainer.alone.trial_files import INFO, run_command
from trainer.alone import command as command_module
from trainer.alone import resolution
from trainer.alone.resolution import resolve
from trainer.alone.trial_file import read_trial_file
from trainer.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
SPECS = ROOT / "specs" / "trials"
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^\$ (.*)$", PAGE, re.MULTILINE)


def test_the_page_has_what_is_tested():
    assert len(SNIPPETS) >= 10
    assert len(COMMANDS) >= 6
    assert set(re.findall(r"^```(\w+)", PAGE, re.MULTILINE)) == {"yaml", "console", "python"}


def test_the_call_from_python_names_arguments_that_there_are():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    loop = ast.parse(snippet).body[0]
    assert isinstance(loop, ast.For)
    assert isinstance(loop.iter, ast.Call)
    named = {keyword.arg for keyword in loop.iter.keywords}
    assert len(named) > 5
    assert named <= inspect.signature(trainer.trial_reports).parameters.keys()


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n")[0])
def test_snippets_are_changes_to_the_digits_trial(snippet, tmp_path, monkeypatch):
    monkeypatch.setattr(resolution, "_check_weights", lambda config, dataset: None)
    changes = parse_yaml(snippet).data
    trial = parse_yaml((SPECS / "digits.yaml").read_text()).data
    for name, value in changes.items():
        trial[name] = {**trial.get(name, {}), **value} if isinstance(value, dict) else value
    users = 400 if "user_feature" in trial["data"] else None
    info = dataclasses.replace(INFO, num_users=users)
    monkeypatch.setattr(resolution, "describe", lambda data, data_home: info)
    path = tmp_path / "trial.yaml"
    path.write_text(json.dumps(trial))
    found = resolve(read_trial_file(path), tmp_path)
    assert found.epsilon <= 3
    written = found.config.to_json()
    for name, value in changes.items():
        if isinstance(value, dict):
            assert {**written[name], **value} == written[name]


@pytest.mark.slow
def test_commands_run_in_the_order_of_the_page(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "specs", tmp_path / "specs")
    monkeypatch.chdir(tmp_path)
    several = []

    for line in COMMANDS:
        words = shlex.split(line.partition(" > ")[0])
        assert words[:3] == ["python", "-m", "trainer"]
        with monkeypatch.context() as patched:
            if "--coordinator" in words:
                # Two hosts are for test_program; here their options.
                patched.setattr(
                    command_module, "train", lambda *args: several.append(args[2].hosts)
                )
            code, out, err = run_command(patched, capsys, *words[3:])
        assert code == 0, (line, out, err)
    assert [host.process_id for host in several] == [0, 1]
    (steps,) = {
        tuple(json.loads(text)["step"] for text in path.read_text().splitlines())
        for path in (tmp_path / "runs").glob("*/reports.jsonl")
    }
    assert steps == (25, 50, 75, 100, 125, 150)


def test_the_published_settings_cost_what_is_published(tmp_path):
    file = read_trial_file(SPECS / "cifar10_wrn_16_4.yaml")
    found = resolve(file, tmp_path)
    assert found.epsilon == pytest.approx(0.988, abs=5e-4)
    tight = accounting.epsilon(
        accounting.DpSgdMechanism(
            noise_multiplier=10.0, sampling_prob=4096 / 50000, iterations=875
        ),
        delta=1e-5,
    )
    assert tight == pytest.approx(0.903, abs=5e-4)
    config = found.config
    assert config.sampling_prob == 4096 / 50000
    assert (config.optimizer, config.learning_rate, config.l2_clip_norm) == ("sgd", 2.0, 1.0)
    assert (config.augmentation.views, config.averaging.ema_decay) == (16, 0.999)


def test_every_trial_file_is_in_a_command_that_runs():
    named = {Path(word).name for line in COMMANDS for word in line.split() if "specs/" in word}
    assert named == {path.name for path in SPECS.iterdir()}


def test_files_read_alike_for_everybody_who_reads_yaml():
    for path in SPECS.glob("*.yaml"):
        ours = parse_yaml(path.read_text()).data
        theirs = yaml.safe_load(path.read_text())
        assert ours["target_delta"] == float(theirs["target_delta"]) == 1e-5
