"""What would void a policy is refused when the specification is read, with the reason."""

import pytest

from sweeps.errors import SpecError
from sweeps.spec.reading import parse_spec

SPEC = """\
version: 1
name: digits
data: {name: digits}
model: {name: logistic_regression}
privacy:
  policy: POLICY
  target_epsilon: 8.0
  target_delta: 1.0e-5
search_space:
  optimizer: {choice: [sgd, adam]}
  learning_rate: {loguniform: [0.1, 8.0]}
  expected_batch_size: {choice: [64, 256]}
  iterations: 150
  noise_multiplier: 2.0
  l2_clip_norm: 1.0
"""
SELECTION = "  selection: {distribution: geometric, mean: 10}\n"


def spec_of(policy: str, more: str = "") -> str:
    return SPEC.replace("POLICY\n", f"{policy}\n{more}")


def refusals(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, source="x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("policy", "more", "accountant"),
    [
        ("per_trial", "", "pld"),
        ("declared", "", "pld"),
        ("open", "", "rdp"),
        ("private_selection", SELECTION, "rdp"),
    ],
)
def test_each_policy_takes_an_accountant_that_it_allows(policy, more, accountant):
    spec = parse_spec(spec_of(policy, more))
    assert (spec.privacy.policy, spec.privacy.accountant) == (policy, accountant)


def test_what_is_stored_reads_back():
    spec = parse_spec(spec_of("private_selection", SELECTION))
    assert parse_spec(spec.canonical_json()) == spec


@pytest.mark.parametrize("policy", ["open", "private_selection"])
def test_sums_of_loss_distributions_are_refused_under_adaptive_choice(policy):
    more = "  accountant: pld\n" + (SELECTION if policy == "private_selection" else "")
    found = refusals(spec_of(policy, more))
    assert "x.yaml:7:15: privacy.accountant: pld is not allowed under " + policy in found
    assert "allowed: rdp" in found


@pytest.mark.parametrize("name", ["async_hyperband", "hyperband", "median_stopping_rule"])
def test_selection_allows_no_scheduler_that_compares(name):
    text = spec_of("private_selection", SELECTION)
    found = refusals(text + f"scheduler: {{name: {name}, grace_period: 25}}\n")
    assert f"scheduler.name: {name} is not allowed under private_selection" in found
    assert "allowed: fifo" in found


def test_selection_allows_no_population():
    mutations = "{learning_rate: {loguniform: [0.1, 1.0]}}"
    rule = f"{{name: pbt, perturbation_interval: 50, hyperparam_mutations: {mutations}}}"
    found = refusals(spec_of("private_selection", SELECTION) + f"scheduler: {rule}\n")
    assert "scheduler.name: pbt is not allowed under private_selection" in found


def test_selection_shows_no_losers():
    loser = SELECTION.replace("mean: 10", "mean: 10, reveal: all_trials")
    found = refusals(spec_of("private_selection", loser))
    assert "privacy.selection.reveal: all_trials is not allowed" in found
    assert "allowed: winner" in found


def test_selection_draws_independently_and_as_often_as_it_says_itself():
    text = spec_of("private_selection", SELECTION).replace("choice: [sgd", "grid_search: [sgd")
    found = refusals(text + "search: {num_samples: 4}\n")
    assert "search_space.optimizer: grid_search is not allowed under private_selection" in found
    assert "search.num_samples: 4 is not allowed under private_selection" in found
    repeated = refusals(spec_of("private_selection", SELECTION) + "search: {repeats: 2}\n")
    assert "search.repeats: 2 is not allowed under private_selection, which lets the" in repeated


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (spec_of("private_selection"), "privacy.selection: is missing"),
        (spec_of("open", SELECTION), "privacy.selection: is not allowed under open"),
        (spec_of("per_trial", "  trial_epsilon: 1.0\n"), "allowed: null under per_trial"),
        (spec_of("open", "  trial_epsilon: 9.0\n"), "9 exceeds target_epsilon; allowed: <= 8"),
        (spec_of("open", "  trial_epsilon: 0\n"), "privacy.trial_epsilon: 0 is not allowed"),
        (spec_of("open", "  budget: ../x\n"), "privacy.budget: '../x' is not allowed"),
        (spec_of("open", "  team: ''\n"), "privacy.team: '' is not allowed"),
        (
            spec_of("private_selection", SELECTION.replace("10", "0.5")),
            "privacy.selection.mean: 0.5 is not allowed; allowed: a number from 1 to 10000",
        ),
        (
            spec_of("private_selection", SELECTION.replace("mean: 10", "mean: 10, shape: 0.5")),
            "privacy.selection.shape: 0.5 is not allowed for geometric; allowed: null",
        ),
        (
            spec_of("private_selection", SELECTION.replace("geometric", "negative_binomial")),
            "privacy.selection.shape: null is not allowed for negative_binomial",
        ),
        (
            spec_of("open").replace("noise_multiplier: 2.0", "noise_multiplier: calibrated"),
            "privacy.trial_epsilon: is missing",
        ),
        (SPEC.replace("POLICY", "declared").replace("1.0e-5", "1.0e-11"), "target_delta"),
        (
            SPEC.replace("POLICY", "declared\n  neighboring_relation: add_or_remove_one"),
            "data.declared_num_examples: is missing",
        ),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(text, message):
    assert message in refusals(text)


def test_calibrated_noise_under_selection_needs_listed_costs():
    text = spec_of("private_selection", SELECTION + "  trial_epsilon: 2.0\n")
    text = text.replace("noise_multiplier: 2.0", "noise_multiplier: calibrated")
    assert parse_spec(text).privacy.trial_epsilon == 2.0
    found = refusals(text.replace("{choice: [64, 256]}", "{uniform: [64, 256]}"))
    assert "search_space.expected_batch_size: uniform is not allowed with calibrated" in found
