"""What a run promises names everything that its cost rests on, and what has no protection."""

import dataclasses

import pytest

from tests.trainer.small_trial import CONFIG
from trainer.alone.statement import NON_PRIVATE, statement
from trainer.config import ClippingConfig, DataConfig, ModelConfig
from trainer.config_sections import EvaluationConfig, MechanismConfig


def said(eval_epsilon=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    return statement(config, iterations=6, epsilon=1.23456, eval_epsilon=eval_epsilon)


def test_the_plain_case():
    text = " ".join(said())
    for words in (
        "Policy per_trial; privacy unit example; neighbouring relation zero_out; delta 1e-05.",
        "(1.235, 1e-05)-differentially private",  # rounded up
        "does NOT cover choosing the best",
        "each example takes part with probability 0.25",
        "clipped to L2 norm 1",
        "noise of 1 times that norm",
        "6 iterations",
        "privacy loss distributions",
        "evaluation examples are treated as public",
    ):
        assert words in text
    assert NON_PRIVATE not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"accountant": "rdp"}, "Rényi"),
        ({"neighboring_relation": "add_or_remove_one"}, "adding or removing one example"),
        ({"sampling_prob": 1.0}, "every example takes part"),
        ({"mechanism": MechanismConfig(bands=3)}, "correlated over 3 steps"),
        (
            {"mechanism": MechanismConfig(truncated_batch_size=30, num_units=40)},
            "at most 30 of the 40 examples",
        ),
        (
            {
                "data": DataConfig(name="digits", user_feature="who"),
                "mechanism": MechanismConfig(examples_per_user=2),
            },
            "the gradient of one user",
        ),
        ({"clipping": ClippingConfig(mode="per_layer")}, "layer by layer"),
        ({"clipping": ClippingConfig(mode="automatic")}, "scaled to L2 norm at most 1"),
        (
            {"clipping": ClippingConfig(mode="quantile", count_noise_stddev=2.0)},
            "count that moves the norm gets noise of standard deviation 2",
        ),
        (
            {"model": ModelConfig(name="mlp", init_from="w.npz", init_is_public=True)},
            "the weights 'w.npz', which count as public",
        ),
        ({"evaluation": EvaluationConfig(protection="non_private")}, "NON-PRIVATE EVALUATION"),
    ],
    ids=str,
)
def test_what_differs_is_said(changes, words):
    assert words in " ".join(said(**changes))
    assert words not in " ".join(said())


def test_counts_with_noise_have_an_epsilon_of_their_own():
    evaluation = EvaluationConfig(protection="dp", noise_multiplier=5.0)
    text = " ".join(said(eval_epsilon=0.5, evaluation=evaluation))
    assert "noise of standard deviation 5" in text
    assert "(0.5, 1e-05)-differentially private for them" in text
    assert "treated as public" not in text
