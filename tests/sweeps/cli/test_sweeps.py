"""The command line in this process, without Ray: decisions, bad input, exit codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sweeps.forecast import reckoning
from sweeps.forecast.measured import Measured
from tests.sweeps.cli.spec_files import write

ROOT = Path(__file__).resolve().parents[3]
SPECS = ROOT / "specs"


def checkpoint_of_other_data(path):
    from trainer.weights.checkpoints import save_checkpoint

    save_checkpoint(
        path,
        params={"w": [0.0]},
        opt_state=(),
        step=1,
        architecture={"model": "cnn"},
        dataset_fingerprint="0" * 32,
        config_digest="0" * 64,
    )
    return path


# What is changed; the key that the message names; the text of the line; the value it shows.
BAD = {
    "unknown key": ({"privacy.epsilom": 1.0}, "privacy.epsilom", "epsilom: 1.0", "unknown key"),
    "wrong type": (
        {"search_space.iterations": "many"},
        "search_space.iterations",
        "iterations: many",
        "'many'",
    ),
    "negative noise": (
        {"search_space.noise_multiplier": -1.0},
        "search_space.noise_multiplier",
        "noise_multiplier: -1.0",
        "-1.0",
    ),
    "epsilon in words": (
        {"privacy.target_epsilon": "eight"},
        "privacy.target_epsilon",
        "target_epsilon: eight",
        "'eight'",
    ),
    "delta of zero": (
        {"privacy.target_delta": 0},
        "privacy.target_delta",
        "target_delta: 0",
        "0 is not allowed",
    ),
    "empty grid": (
        {"search_space.expected_batch_size": {"grid_search": []}},
        "search_space.expected_batch_size",
        "grid_search: []",
        "[]",
    ),
    "missing noise": (
        {"search_space.noise_multiplier": ...},
        "search_space.noise_multiplier",
        "search_space:",
        "is missing",
    ),
    "no such data set": (
        {"data.name": "no_such_set"},
        "data.name",
        "name: no_such_set",
        "'no_such_set'",
    ),
    "no such split": (
        {"data.eval_split": "valid"},
        "data.eval_split",
        "eval_split: valid",
        "'valid'",
    ),
    "no such checkpoint": (
        {"model.init_from": "/nowhere"},
        "model.init_from",
        "init_from: /nowhere",
        "'/nowhere'",
    ),
    "batch larger than the data": (
        {"search_space.expected_batch_size": 2000},
        "search_space.expected_batch_size",
        "expected_batch_size: 2000",
        "2000",
    ),
}


@pytest.mark.parametrize("verb", ["check", "run"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_place_value_and_what_is_allowed(command, home, tmp_path, verb, case):
    changes, key, line_text, value = BAD[case]
    path = write(tmp_path, changes)
    code, out, err = command(verb, path)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert f"{path}:" in err
    line = int(err.split(f"{path}:")[1].split(":")[0])
    assert path.read_text().splitlines()[line - 1].strip() == line_text
    assert key in err
    assert value in err
    assert "allowed" in err or "no such" in err or "Prepare it" in err or "It has" in err
    assert not home.exists(), "nothing may be written"


@pytest.mark.parametrize(
    "content",
    [b"\x00\xff\xfe", b"- a\n- b\n", b"", b"a: [1,\n", b"just words\n", b"a: !!python/x 1"],
)
def test_a_file_that_is_no_specification(command, home, tmp_path, content):
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    code, out, err = command("check", path)
    assert (code, out) == (2, "")
    assert str(path) in err
    assert "Traceback" not in err
    assert not home.exists()


@pytest.mark.parametrize("verb", ["check", "run"])
def test_a_file_that_is_not_there(command, home, tmp_path, verb):
    code, _, err = command(verb, tmp_path / "absent.yaml")
    assert code == 2
    assert "absent.yaml" in err
    assert not home.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "checkpoint.json").write_text("{}"),
        lambda path: (path / "params" / "extra").write_text(""),
        lambda path: None,  # whole, but of another model
    ],
)
def test_a_checkpoint_that_is_not_one(command, home, tmp_path, damage):
    checkpoint = checkpoint_of_other_data(tmp_path / "checkpoint")
    damage(checkpoint)
    path = write(tmp_path, {"model.init_from": str(checkpoint)})
    code, _, err = command("run", path)
    assert code == 2
    assert "model.init_from" in err
    assert "Traceback" not in err
    assert not home.exists()


def test_foreign_weights_need_somebodys_word(command, home, tmp_path):
    file = tmp_path / "weights.npz"
    np.savez(file, kernel=np.ones((64, 10), np.float32))
    code, _, err = command("check", write(tmp_path, {"model.init_from": str(file)}))
    assert code == 2
    assert "model.init_from" in err
    assert "model.init_is_public: true" in err
    vouched = {"model.init_from": str(file), "model.init_is_public": True}
    assert command("check", write(tmp_path, vouched))[0] == 0
    file.write_bytes(file.read_bytes()[:-5])
    code, _, err = command("run", write(tmp_path, vouched))
    assert code == 2
    assert "not a whole .npz file" in err
    assert not home.exists()


def test_check_lists_every_configuration_with_its_decision(command, home, tmp_path):
    code, out, _ = command("check", write(tmp_path), "--json")
    document = json.loads(out)
    assert code == 0
    assert [trial["decision"] for trial in document["trials"]] == ["admitted", "rejected"]
    for trial in document["trials"]:
        assert set(trial) == {"config", "repeat", "epsilon", "delta", "decision", "reason"}
        assert trial["delta"] == 1e-5
    cheap, dear = document["trials"]
    assert cheap["epsilon"] <= 3.0 < dear["epsilon"]
    assert "exceeds the budget of 3" in dear["reason"]
    assert cheap["config"]["expected_batch_size"] == 32
    assert cheap["config"]["sampling_prob"] == pytest.approx(32 / 1437)
    assert (document["admitted"], document["rejected"]) == (1, 1)
    assert "NOT" in document["guarantee"]
    assert not home.exists(), "looking writes nothing"


def test_check_as_a_table(command, tmp_path):
    code, out, _ = command("check", write(tmp_path))
    assert code == 0
    assert "1 admitted, 1 rejected" in out
    assert "exceeds the budget of 3" in " ".join(out.split())


def test_calibrated_noise_meets_the_budget_and_no_more(command, tmp_path):
    path = write(tmp_path, {"search_space.noise_multiplier": "calibrated"})
    code, out, _ = command("check", path, "--json")
    assert code == 0
    for trial in json.loads(out)["trials"]:
        assert trial["decision"] == "admitted"
        assert 3.0 * 0.99 <= trial["epsilon"] <= 3.0
        assert trial["config"]["noise_multiplier"] > 0


def test_a_moving_clip_norm_costs_what_a_fixed_one_does(command, home, tmp_path):
    _, out, _ = command("check", write(tmp_path), "--json")
    flat = json.loads(out)
    path = write(tmp_path, {"search_space.expected_batch_size": 32}, clipping={"mode": "quantile"})
    code, out, _ = command("check", path, "--json")
    document = json.loads(out)
    assert code == 0
    (trial,) = document["trials"]
    assert trial == flat["trials"][0]
    assert "Clipping is quantile: the clip norm follows the 0.5 quantile" in document["guarantee"]
    assert not home.exists()


@pytest.mark.parametrize(("noise", "epsilon"), [(1.5, 3.0), ("calibrated", 0.3)])
def test_a_count_that_leaves_nothing_is_rejected_before_anything_starts(
    command, home, tmp_path, noise, epsilon
):
    # Allowed is noise below a tenth of the batch size: 0.8 and 3.2. Calibrated it is 0.95, 1.64.
    path = write(
        tmp_path,
        {
            "search_space.expected_batch_size": {"grid_search": [8, 32]},
            "search_space.noise_multiplier": noise,
            "privacy.target_epsilon": epsilon,
        },
        clipping={"mode": "quantile"},
    )
    code, out, _ = command("check", path, "--json")
    assert code == 0
    few, many = json.loads(out)["trials"]
    assert (few["decision"], many["decision"]) == ("rejected", "admitted")
    assert few["epsilon"] is None
    assert few["config"]["sampling_prob"] == pytest.approx(8 / 1437)
    for words in ("clipping.count_noise_stddev=0.4 ", "expected_batch_size / 20", "noise_multi"):
        assert words in few["reason"]
    assert not home.exists()


def test_a_protected_size_is_never_looked_at(command, tmp_path):
    path = write(
        tmp_path,
        {
            "privacy.neighboring_relation": "add_or_remove_one",
            "data.declared_num_examples": 1000,
            "search_space.expected_batch_size": 32,
        },
    )
    code, out, _ = command("check", path, "--json")
    assert code == 0
    assert json.loads(out)["trials"][0]["config"]["sampling_prob"] == 0.032


def test_how_long_it_takes_is_unknown_until_it_is_measured(command, home, tmp_path, monkeypatch):
    path = write(tmp_path)
    code, out, _ = command("check", path)
    assert code == 0
    words = " ".join(out.split())
    assert "How long it takes is unknown, for no trial of these shapes ran yet" in words

    def calibrated(plan, on_trial):
        on_trial()
        config = plan.admitted[0].config
        return [
            Measured(config=config, start_secs=5.0, step_secs=0.5, checkpoint_bytes=1, where="CPU")
        ]

    monkeypatch.setattr(reckoning, "calibrate", calibrated)
    code, out, _ = command("check", path, "--calibrate")
    assert code == 0
    words = " ".join(out.split())
    assert "Takes about 0.004167 accelerator-hours and about 15 s, 1 trial at a time" in words
    assert "(calibrated here on CPU with random data)" in words
    assert "Checkpoints take 1 byte on disk in the end, 3 bytes meanwhile" in words
    assert not home.exists()


def test_nothing_admitted_has_an_exit_code_of_its_own(command, home, tmp_path):
    path = write(tmp_path, {"privacy.target_epsilon": 0.01})
    code, out, _ = command("check", path, "--json")
    assert code == 3
    assert json.loads(out)["admitted"] == 0
    # Running it records the decisions, and starts neither a worker nor Ray.
    code, out, _ = command("run", path, "--json")
    document = json.loads(out)
    assert code == 3
    assert {trial["state"] for trial in document["trials"]} == {"REJECTED"}
    assert all(trial["eval_accuracy"] is None for trial in document["trials"])
    assert Path(document["report"]["png"]).stat().st_size > 0
    code, out, _ = command("show", "--json")
    assert json.loads(out)["sweep_id"] == document["sweep_id"]
    code, out, _ = command("list")
    assert document["sweep_id"] in out


def test_the_example_specification_rejects_what_exceeds_its_budget(command):
    code, out, _ = command("check", SPECS / "digits.yaml", "--json")
    trials = json.loads(out)["trials"]
    assert code == 0
    assert sum(trial["decision"] == "admitted" for trial in trials) >= 12
    assert any(trial["decision"] == "rejected" for trial in trials)
    for trial in trials:
        assert (trial["epsilon"] <= 8.0) == (trial["decision"] == "admitted")


def test_the_example_of_banded_noise_is_calibrated_to_its_budget(command):
    code, out, _ = command("check", SPECS / "digits_banded.yaml", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["admitted"], document["rejected"]) == (4, 0)
    assert document["sampling"] == "cyclic_poisson"
    assert all(2.98 < trial["epsilon"] <= 3.0 for trial in document["trials"])


def test_the_schema_is_the_one_in_the_repository(command):
    code, out, _ = command("schema")
    assert code == 0
    assert json.loads(out) == json.loads((SPECS / "schema.json").read_text())


@pytest.mark.parametrize("verb", [["list"], ["show"], ["sync"], ["show", "nothing"]])
def test_looking_at_no_ledger_creates_none(command, home, verb):
    code, _, err = command(*verb)
    assert code == 1
    assert "dp-sweeps run" in err
    assert not home.exists()


def test_a_home_that_cannot_be_made_is_named(command, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DP_SWEEPS_HOME", str(tmp_path / "file" / "home"))
    code, out, err = command("run", write(tmp_path))
    assert (code, out) == (1, "")
    assert "DP_SWEEPS_HOME=" in err
    assert "Traceback" not in err


def test_nothing_is_left_to_a_ray_that_ends_with_its_command(command, home):
    for arguments in (["run", "specs/digits.yaml"], ["resume"], ["fork", "t", "--set", "a=1"]):
        code, _, err = command(*arguments, "--detach")
        assert code == 2
        assert "--detach: allowed with the --address of a cluster that stays" in err
    assert not home.exists()


def test_help_has_examples(command):
    budget = ("create", "list", "show", "grant", "freeze", "thaw", "retire")
    verbs = [["check"], ["run"], ["list"], ["show"], ["sync"], ["schema"]]
    verbs += [["budget"], ["data"], ["ledger"]]
    verbs += [["budget", verb] for verb in budget]
    verbs += [["data", verb] for verb in ("list", "show", "prepare", "declare")]
    verbs += [["ledger", verb] for verb in ("show", "verify", "export")]
    for verb in verbs:
        code, out, _ = command(*verb, "--help")
        assert code == 0
        assert f"Example: dp-sweeps {' '.join(verb)}" in " ".join(out.split())
    code, out, _ = command("--help")
    assert "Examples:" in out


def test_help_loads_nothing_that_takes_long():
    program = """
import sys
import sweeps.cli
heavy = "jax ray mlflow dp_accounting scipy tensorflow_datasets matplotlib pydantic".split()
print([name for name in heavy if name in sys.modules])
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


DECLARED = {"privacy.policy": "declared", "privacy.target_epsilon": 8.0}
SELECTION = {
    "privacy.policy": "private_selection",
    "privacy.target_epsilon": 30.0,
    "privacy.selection": {"distribution": "geometric", "mean": 5},
    "search_space.expected_batch_size": {"choice": [32, 64]},
}


def test_check_says_what_the_trials_cost_together(command, tmp_path):
    path = write(tmp_path, {**DECLARED, "search_space.noise_multiplier": 4.0})
    code, out, _ = command("check", path, "--json")
    document = json.loads(out)
    assert code == 0
    dearest = max(trial["epsilon"] for trial in document["trials"])
    assert dearest < document["total_epsilon"] <= 8.0
    assert document["epsilon_before"] == 0
    assert [other["policy"] for other in document["alternatives"]] == ["private_selection"]
    code, out, _ = command("check", path)
    said = " ".join(out.split())
    assert "Together: epsilon" in said
    assert "of 8 at delta 1e-05" in said
    assert "As private_selection this would cost epsilon" in said
    _, out, _ = command("check", write(tmp_path))
    assert "Together" not in out, "under per_trial nothing adds up"


def test_check_of_a_list_that_is_too_dear(command, tmp_path):
    space = {"search_space.expected_batch_size": 512, "search_space.noise_multiplier": 4.0}
    changes = {**DECLARED, **space, "privacy.target_epsilon": 3.0, "search.num_samples": 40}
    code, out, _ = command("check", write(tmp_path, changes))
    assert code == 3
    assert "which exceeds 3 at delta 1e-05" in " ".join(out.split())


def test_a_private_selection_that_is_too_dear_is_one_rejected_row(command, home, tmp_path):
    path = write(tmp_path, {**SELECTION, "privacy.target_epsilon": 1.2})
    code, out, _ = command("run", path, "--json")
    (trial,) = json.loads(out)["trials"]
    assert code == 3
    assert (trial["state"], trial["iterations"], trial["curve"]) == ("REJECTED", None, [])
    assert re.search(r"selection costs epsilon [\d.]+, which exceeds 1.2 at", trial["reason"])
    assert trial["epsilon"] > 1.2
    # What every draw has in common, and nothing that is drawn.
    assert trial["config"].keys() >= {"optimizer", "learning_rate", "iterations"}
    assert "expected_batch_size" not in trial["config"]
    assert not (home / "secrets").exists()
    code, out, _ = command("show")
    assert "exceeds 1.2" in " ".join(out.split())


def test_of_a_private_selection_no_candidate_may_exceed_the_limit_of_one(command, tmp_path):
    path = write(tmp_path, {**SELECTION, "privacy.trial_epsilon": 0.01})
    code, out, _ = command("run", path, "--json")
    (trial,) = json.loads(out)["trials"]
    assert (code, trial["state"], trial["epsilon"]) == (3, "REJECTED", None)
    assert trial["reason"].startswith("no candidate may be drawn: epsilon ")


def test_a_private_selection_is_reckoned(command, home, tmp_path):
    path = write(tmp_path, SELECTION)
    code, out, _ = command("check", path, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["selection"]["mean"] == 5
    assert [other["policy"] for other in document["alternatives"]] == ["declared"]
    drawn = {**SELECTION, "search_space.learning_rate": {"loguniform": [0.125, 8.0]}}
    _, out, _ = command("check", write(tmp_path, drawn))
    words = " ".join(out.split())
    assert "2 candidates: 2 admitted" in words
    assert "A secret number of trials is run, 5 on average" in words
    assert "learning_rate" not in words, "which has no value"
    assert not home.exists()


def test_a_large_grid_is_cut_unless_all_is_asked_for(command, tmp_path):
    path = write(tmp_path, {"search_space.learning_rate": {"grid_search": [*range(1, 126)]}})
    _, out, _ = command("check", path)
    assert "and 50 more: " in out
    _, out, _ = command("check", path, "--all")
    assert "more: " not in out
    assert " 249 " in out


def test_the_command_is_installed():
    assert shutil.which("dp-sweeps", path=str(Path(sys.executable).parent))
