"""What a run promises, in words that could stand in a paper, and what it does not."""

import accounting
from accounting.policies import shown_epsilon
from trainer.config import TrialConfig
from trainer.training.plan import noise_of_gradients

NON_PRIVATE = (
    "NON-PRIVATE EVALUATION. Accuracies and losses of this run are exact functions of evaluation "
    "examples that are private: no guarantee covers them, and none of them may be published as if "
    "one did."
)
_ACCOUNTANTS = {
    "pld": "privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022)",
    "rdp": "Rényi differential privacy (Mironov et al. 2019)",
}
_CLIPPED = {
    "flat": "clipped to L2 norm {clip:g}",
    "per_layer": "clipped layer by layer, within L2 norm {clip:g} as a whole",
    "automatic": "scaled to L2 norm at most {clip:g}",
    "quantile": "clipped to an L2 norm that begins at {clip:g} and follows the {quantile:g} "
    "quantile of the norms",
}


def statement(
    config: TrialConfig, *, iterations: int, epsilon: float, eval_epsilon: float | None
) -> list[str]:
    """The guarantee of a trial and everything that it rests on, a sentence or more an item.

    Args:
        config: The trial.
        iterations: Iterations that are charged.
        epsilon: What they cost.
        eval_epsilon: What has been spent on the evaluation examples, where that is counted.
    """
    sentences = [
        f"Policy per_trial; privacy unit {config.privacy_unit}; neighbouring relation "
        f"{config.neighboring_relation}; delta {config.target_delta:g}.",
        accounting.guarantee(
            "per_trial",
            epsilon=epsilon,
            delta=config.target_delta,
            neighboring_relation=config.neighboring_relation,
            privacy_unit=config.privacy_unit,
        ),
        _mechanism(config, iterations),
        _evaluation(config, eval_epsilon),
    ]
    if config.model.init_from is not None:
        sentences.append(
            f"It started from the weights {config.model.init_from!r}, which count as public: they "
            "must not have seen the training data."
        )
    return sentences


def _mechanism(config: TrialConfig, iterations: int) -> str:
    """Which mechanism is accounted, with all numbers that its cost depends on."""
    unit, chosen = config.privacy_unit, config.mechanism
    drawn = f"each {unit} takes part with probability {config.sampling_prob:.6g}"
    if config.sampling_prob == 1:
        drawn = f"every {unit} takes part"
    if chosen.bands > 1:
        drawn = f"one of {chosen.bands} groups has its turn, and of it {drawn}"
    if chosen.truncated_batch_size is not None:
        drawn += (
            f"; a batch keeps at most {chosen.truncated_batch_size} of the {chosen.num_units} "
            f"{unit}s, at random, which is accounted for"
        )
    clipped = _CLIPPED[config.clipping.mode].format(
        clip=config.l2_clip_norm, quantile=config.clipping.target_quantile
    )
    noise = f"Gaussian noise of {config.noise_multiplier:.6g} times that norm"
    if chosen.bands > 1:
        noise += f", correlated over {chosen.bands} steps (banded matrix factorisation)"
    stddev = config.count_noise_stddev
    if stddev is not None:
        of_sum = noise_of_gradients(config.noise_multiplier, stddev)
        noise = (
            f"Gaussian noise of {of_sum:.6g} times that norm; the count that moves the norm gets "
            f"noise of standard deviation {stddev:g}; both together cost as much as a noise "
            f"multiplier of {config.noise_multiplier:.6g}"
        )
    return (
        f"DP-SGD, {iterations} iterations: in each, {drawn}; the gradient of one {unit} is "
        f"{clipped}, and the sum of gradients gets {noise}. Accounted by "
        f"{_ACCOUNTANTS[config.accountant]}."
    )


def _evaluation(config: TrialConfig, eval_epsilon: float | None) -> str:
    """What becomes of the examples on which the trial is measured."""
    match config.evaluation.protection:
        case "non_private":
            return NON_PRIVATE
        case "dp":
            spent = shown_epsilon(eval_epsilon or 0.0)
            return (
                "The evaluation examples are protected on their own: right answers are counted "
                f"with noise of standard deviation {config.evaluation.noise_multiplier:g}, and "
                f"all counts together are ({spent}, {config.target_delta:g})-differentially "
                "private for them, where neighbouring data sets differ by blanking one example "
                "(their number is public)."
            )
        case _:
            return "The evaluation examples are treated as public and get no protection."
