"""What a sweep promises, in the words that stand on everything it shows."""

from collections.abc import Mapping
from typing import Any, cast

import accounting
from sweeps.spec.domains import BY, FULL

_EVALUATION = "The evaluation examples are treated as public and get no protection."
_CLOCK = (
    "How long the search takes depends on how many trials there are: who watches the machine or "
    "the clock learns about that number, and is not covered."
)
# Flat clipping goes without saying.
_CLIPPING = {
    "flat": "",
    "per_layer": "Clipping is per_layer: layers are clipped one by one, such that the whole "
    "gradient of {one} keeps within the clip norm.",
    "automatic": "Clipping is automatic: the gradient of {one} is scaled to at most the clip "
    "norm.",
    "quantile": "Clipping is quantile: the clip norm follows the {target_quantile:g} quantile of "
    "gradient norms by a count in every step. That count has noise of its own, of standard "
    "deviation {stddev}, and is part of what is accounted: the gradients get as much more noise "
    "as makes both together cost what noise_multiplier says.",
}


def guarantee(spec: Mapping[str, Any]) -> str:
    """The promise of a specification, and its limits.

    Args:
        spec: The specification as plain data. Sections that it has not, as in sweeps from before
            there were such, are as by default.
    """
    privacy = spec["privacy"]
    promise = accounting.guarantee(
        privacy["policy"],
        epsilon=privacy["target_epsilon"],
        delta=privacy["target_delta"],
        neighboring_relation=privacy["neighboring_relation"],
        privacy_unit=privacy_unit(spec),
        sampling=sampling(spec),
    )
    clock = _CLOCK if privacy["policy"] == "private_selection" else ""
    more = (clock, _of_repeats(spec), _of_proxies(spec), _how_drawn(spec), _how_clipped(spec))
    return " ".join(filter(None, (promise, *more, _EVALUATION)))


def _of_repeats(spec: Mapping[str, Any]) -> str:
    """What a mean over repeats touches, where each trial is promised something by itself."""
    repeats = spec.get("search", {}).get("repeats", 1)
    if repeats == 1 or spec["privacy"]["policy"] != "per_trial":
        return ""
    return (
        f"A mean over the {repeats} repeats of a configuration tells of as many trials, so the "
        "guarantee of one of them does not cover it, either."
    )


def proxy_scale(spec: Mapping[str, Any]) -> float:
    """How many times smaller trials are than a specification, as plain data, says; 1 for alike."""
    return float(spec.get("proxy", {}).get("scale", 1.0))


def _of_proxies(spec: Mapping[str, Any]) -> str:
    """What ran, where that is not what the search space says."""
    scale = proxy_scale(spec)
    if scale == 1:
        return ""
    return (
        f"Trials are proxies, with batches and noise {scale:g} times smaller than their "
        "configurations say: all of this and every ε is about what ran. What the run itself would "
        "cost on this data (real_epsilon) comes on top."
    )


def privacy_unit(spec: Mapping[str, Any]) -> accounting.PrivacyUnit:
    """Whose data a specification, as plain data, protects."""
    return "example" if spec.get("data", {}).get("user_feature") is None else "user"


def sampling(spec: Mapping[str, Any], sampling_prob: float | None = None) -> accounting.Sampling:
    """How batches are drawn.

    Args:
        spec: The specification as plain data.
        sampling_prob: Of one of its trials; None for the sweep, all of whose trials have to take
            everybody for it to be full batches.
    """
    mechanism = spec.get("mechanism", {})
    if mechanism.get("bands", 1) > 1:
        return "cyclic_poisson"
    if mechanism.get("truncated_batch_size") is not None:
        return "truncated_poisson"
    everybody = sampling_prob == 1 if sampling_prob is not None else set(_sizes(spec)) == {FULL}
    if proxy_scale(spec) != 1:
        everybody = False  # the probability is that of the run for which a trial stands in
    return "full_batch" if everybody else "poisson"


def _sizes(spec: Mapping[str, Any]) -> list[Any]:
    """The batch sizes that a specification names, words included."""

    def named(domain: Any) -> list[Any]:
        if isinstance(domain, list):
            return cast("list[Any]", domain)
        if not isinstance(domain, Mapping):
            return [domain]
        parts = cast("Mapping[str, Any]", domain).items()
        return [size for key, part in parts if key != BY for size in named(part)]

    return named(spec.get("search_space", {}).get("expected_batch_size"))


def _how_drawn(spec: Mapping[str, Any]) -> str:
    """The numbers of the mechanism, where it has some beside those of a trial."""
    mechanism, unit = spec.get("mechanism", {}), privacy_unit(spec)
    words: list[str] = []
    if unit == "user":
        words.append(
            f"Users are drawn and clipped whole, by {mechanism.get('examples_per_user')} examples "
            "of each in a step."
        )
    if (bands := mechanism.get("bands", 1)) > 1:
        words.append(
            f"There are {bands} groups (bands), so each {unit} takes part in one step of {bands} "
            "at most."
        )
    if (size := mechanism.get("truncated_batch_size")) is not None:
        words.append(f"A batch holds {size} {unit}s at most.")
    if sampling(spec) == "poisson" and FULL in _sizes(spec):
        words.append(f"Where expected_batch_size is {FULL}, every batch is all of the data.")
    return " ".join(words)


def _how_clipped(spec: Mapping[str, Any]) -> str:
    clipping: Mapping[str, Any] = spec.get("clipping") or {}
    stddev = clipping.get("count_noise_stddev")
    return _CLIPPING[clipping.get("mode", "flat")].format(
        one={"example": "an example", "user": "a user"}[privacy_unit(spec)],
        target_quantile=clipping.get("target_quantile", 0.0),
        stddev="expected_batch_size / 20" if stddev is None else f"{stddev:g}",
    )
