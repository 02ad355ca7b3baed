"""What other mechanisms and other privacy units cost and promise, by the command line."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

import accounting
from tests.sweeps.cli.spec_files import write
from tests.trainer.data.prepared import FEATURES, examples, prepare

NUM_EXAMPLES = 1437
BATCH = {"search_space.expected_batch_size": 64}
CALIBRATED = {"search_space.noise_multiplier": "calibrated"}
NUM_USERS = 40


@pytest.fixture
def check(command, tmp_path):
    """Decides on a spec; gives the exit code and the document, or what was said instead."""

    def run(changes):
        code, out, err = command("check", write(tmp_path, changes), "--json")
        assert "Traceback" not in err
        return code, json.loads(out) if out else err

    return run


@pytest.fixture
def of_users(tmp_path, capsys):
    """Changes after which a spec protects the forty people of a small data set."""
    tfds.disable_progress_bar()
    images = np.random.default_rng(1).integers(0, 256, (180, 4, 5, 3), dtype=np.uint8)
    names = [f"p{i % NUM_USERS}" for i in range(150)] + ["q"] * 30
    rows = examples(images, np.arange(180) % 3, patient=names)
    features = {**FEATURES, "patient": tfds.features.Text()}
    prepare(tmp_path / "tfds", features=features, splits={"train": rows[:150], "test": rows[150:]})
    capsys.readouterr()  # TFDS talks while it writes
    return {
        "data.name": "shapes",
        "data.data_dir": str(tmp_path / "tfds"),
        "data.user_feature": "patient",
        "mechanism.examples_per_user": 2,
        "search_space.expected_batch_size": 4,
    }


def only(document):
    (trial,) = document["trials"]
    return trial


# -- truncated batches -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["per_trial", "declared"])
def test_truncated_batches_are_accounted_as_such(check, policy):
    size = {"mechanism.truncated_batch_size": 100}
    code, document = check({**BATCH, **size, "privacy.policy": policy})
    trial = only(document)
    mechanism = accounting.TruncatedDpSgdMechanism(
        noise_multiplier=1.5,
        sampling_prob=64 / NUM_EXAMPLES,
        iterations=20,
        num_examples=NUM_EXAMPLES,
        truncated_batch_size=100,
    )
    assert (code, trial["decision"]) == (0, "admitted")
    assert trial["epsilon"] == accounting.epsilon(mechanism, delta=1e-5)
    assert document["sampling"] == "truncated_poisson"
    assert "A batch holds 100 examples at most." in document["guarantee"]


@pytest.mark.parametrize("noise", [{}, CALIBRATED], ids=["given", "calibrated"])
def test_a_largest_batch_that_is_too_small_makes_no_trial(check, noise):
    size = {"mechanism.truncated_batch_size": 95}
    batches = {"search_space.expected_batch_size": {"grid_search": [32, 64]}}
    code, document = check({**batches, **size, **noise})
    small, large = document["trials"]
    assert code == 0
    assert (small["decision"], large["decision"]) == ("admitted", "rejected")
    assert large["epsilon"] is None
    assert "truncated_batch_size must be at least 96, 4 standard deviations" in large["reason"]


def test_noise_is_calibrated_for_truncated_batches(check):
    _, plain = check({**BATCH, **CALIBRATED})
    _, document = check({**BATCH, **CALIBRATED, "mechanism.truncated_batch_size": 96})
    assert 2.9 < only(document)["epsilon"] <= 3.0
    noises = [only(one)["config"]["noise_multiplier"] for one in (document, plain)]
    assert noises[0] > noises[1], "truncation costs a little"


# -- banded noise ----------------------------------------------------------------------------


def test_noise_is_calibrated_for_bands(check):
    code, document = check({**BATCH, **CALIBRATED, "mechanism.bands": 8})
    trial = only(document)
    config = trial["config"]
    assert code == 0
    assert config["sampling_prob"] == 8 * 64 / NUM_EXAMPLES
    mechanism = accounting.DpSgdMechanism(
        noise_multiplier=config["noise_multiplier"],
        sampling_prob=config["sampling_prob"],
        iterations=3,  # of 20 steps a unit may join three
        neighboring_relation="zero_out",
    )
    assert trial["epsilon"] == accounting.epsilon(mechanism, delta=1e-5)
    assert 2.9 < trial["epsilon"] <= 3.0
    assert document["sampling"] == "cyclic_poisson"


def test_a_batch_larger_than_a_group_is_refused_with_its_place(check, tmp_path):
    code, err = check({"mechanism.bands": 8, "search_space.expected_batch_size": 180})
    assert code == 2
    assert f"{tmp_path}/spec.yaml:14:24: search_space.expected_batch_size: " in err
    assert "exceeds a group, one of 8" in err
    assert "allowed: at most 179.625" in err


# -- full batches ----------------------------------------------------------------------------


def test_full_batches_are_the_gaussian_mechanism(check):
    code, document = check({"search_space.expected_batch_size": "full", **CALIBRATED})
    config = only(document)["config"]
    assert code == 0
    assert (config["expected_batch_size"], config["sampling_prob"]) == (1437.0, 1.0)
    mechanism = accounting.DpSgdMechanism.full_batch(
        noise_multiplier=config["noise_multiplier"], iterations=20
    )
    assert only(document)["epsilon"] == accounting.epsilon(mechanism, delta=1e-5)
    assert document["sampling"] == "full_batch"


# -- users -----------------------------------------------------------------------------------


def test_users_are_drawn_where_users_are_protected(check, of_users):
    code, document = check({**of_users, "search_space.noise_multiplier": 4.0})
    assert code == 0
    assert only(document)["config"]["sampling_prob"] == 4 / NUM_USERS
    assert only(document)["decision"] == "admitted"
    assert (document["privacy_unit"], document["num_users"]) == ("user", NUM_USERS)
    assert document["num_train"] is None, "how many examples people have is protected"
    assert "blanking all examples of one user" in document["guarantee"]
    code, document = check({**of_users, **CALIBRATED, "search_space.expected_batch_size": "full"})
    assert only(document)["config"]["expected_batch_size"] == NUM_USERS


def test_more_users_than_there_are_cannot_be_drawn(check, of_users):
    code, err = check({**of_users, "search_space.expected_batch_size": 41})
    assert code == 2
    assert "expected_batch_size 41 exceeds the 40 users of shapes train" in err


def test_a_protected_number_of_users_is_never_looked_at(check, of_users):
    code, document = check(
        {
            **of_users,
            "privacy.neighboring_relation": "add_or_remove_one",
            "data.declared_num_examples": 50,
            "search_space.noise_multiplier": 4.0,
        }
    )
    assert code == 0
    assert only(document)["config"]["sampling_prob"] == 4 / 50
    assert document["num_users"] is document["num_train"] is None
    assert "adding or removing all examples of one user" in document["guarantee"]


def test_a_budget_of_users_pays_for_users_alone(command, check, of_users, tmp_path):
    shared = {**of_users, "search_space.noise_multiplier": 4.0, "privacy.budget": "people"}
    path = write(tmp_path, shared)
    code, out, err = command("budget", "create", "people", "--from", path, "--json")
    assert code == 0, err
    assert json.loads(out)["privacy_unit"] == "user"
    code, document = check(shared)
    assert (code, document["admitted"]) == (0, 1)
    examples_alone = {
        key: value
        for key, value in shared.items()
        if key not in ("data.user_feature", "mechanism.examples_per_user")
    }
    code, err = check(examples_alone)
    assert code == 2
    assert "privacy.budget: 'people' protects whole users, and trials without data.user_" in err
    more = ("--privacy-unit", "example")
    command("budget", "create", "rows", "--from", path, *more)
    code, err = check({**shared, "privacy.budget": "rows"})
    assert code == 2
    assert "protects single examples, and trials with data.user_feature draw whole users" in err


def test_what_would_fit_tells_mechanisms_apart(command, tmp_path):
    changes = {**BATCH, "mechanism.bands": 4, "privacy.policy": "declared"}
    path = write(tmp_path, changes)
    command("budget", "create", "b", "--from", path)
    _, out, _ = command("budget", "show", "b", "--for", path, "--json")
    (fit,) = json.loads(out)["room"]["fits"]
    assert (fit["mechanism"], fit["iterations"]) == ("4 bands", 20)
    _, out, _ = command("budget", "show", "b", "--for", path)
    assert "4 bands" in out
