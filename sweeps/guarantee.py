"""What a sweep promises, in the words that stand on everything it shows."""

from collections.abc import Mapping
from typing import Any

import accounting

_EVALUATION = "The evaluation examples are treated as public and get no protection."
# Flat clipping goes without saying.
_CLIPPING = {
    "flat": "",
    "per_layer": "Clipping is per_layer: layers are clipped one by one, such that an example's "
    "whole gradient keeps within the clip norm.",
    "automatic": "Clipping is automatic: each example's gradient is scaled to at most the clip "
    "norm.",
    "quantile": "Clipping is quantile: the clip norm follows the {target_quantile:g} quantile of "
    "gradient norms by a count in every step. That count has noise of its own, of standard "
    "deviation {stddev}, and is part of what is accounted: the gradients get as much more noise "
    "as makes both together cost what noise_multiplier says.",
}


def guarantee(privacy: Mapping[str, Any], clipping: Mapping[str, Any] | None = None) -> str:
    """The promise of a specification's privacy section, and its limits.

    Args:
        privacy: The section as plain data: ``policy``, ``target_epsilon``, ``target_delta`` and
            ``neighboring_relation``.
        clipping: The clipping section as plain data; None, as in sweeps from before there was
            one, is flat.
    """
    promise = accounting.guarantee(
        privacy["policy"],
        epsilon=privacy["target_epsilon"],
        delta=privacy["target_delta"],
        neighboring_relation=privacy["neighboring_relation"],
    )
    return " ".join(filter(None, (promise, _how_clipped(clipping or {}), _EVALUATION)))


def _how_clipped(clipping: Mapping[str, Any]) -> str:
    stddev = clipping.get("count_noise_stddev")
    return _CLIPPING[clipping.get("mode", "flat")].format(
        target_quantile=clipping.get("target_quantile", 0.0),
        stddev="expected_batch_size / 20" if stddev is None else f"{stddev:g}",
    )
