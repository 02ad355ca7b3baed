"""The proxy section: smaller batches with as much less noise, to look for what a large run needs.

At equal numbers of steps, an update's noise depends on noise_multiplier / expected_batch_size
alone. So a run with both divided by ``scale`` learns about as a full one does at a fraction of the
compute, and what is best for the one is about best for the other. It is dear in privacy, for so
little noise hides little; each trial is charged for what it really runs.

Source: Sander, Stock and Sablayrolles 2022, "TAN Without a Burn: Scaling Laws of DP-SGD".
"""

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from sweeps.spec.domains import CALIBRATED, FULL, AnyDomain
from sweeps.spec.mechanism_spec import MechanismSpec
from sweeps.spec.refusals import Allowed, Refusal
from sweeps.spec.section import Section


class ProxySpec(Section):
    """Whether trials are small stand-ins for the runs that the search space describes."""

    scale: Annotated[float, Field(ge=1), Allowed("a number >= 1")] = Field(
        default=1.0,
        description="By how much trials divide expected_batch_size and noise_multiplier; 1 runs "
        "what the search space says.",
    )
    target_epsilon: Annotated[
        Annotated[float, Field(gt=0)] | None, Allowed("null or a number > 0")
    ] = Field(
        default=None,
        description="What the run itself may cost, where its noise is calibrated. That of the "
        "trials is the privacy section's.",
    )

    @property
    def is_proxy(self) -> bool:
        """Whether trials run anything else than the search space says."""
        return self.scale != 1


def proxy_refusals(
    proxy: ProxySpec,
    *,
    mechanism: MechanismSpec,
    clipping_mode: str,
    expected_batch_size: AnyDomain,
    noise_multiplier: AnyDomain,
) -> Iterator[Refusal]:
    """What the rest of a specification says that its proxies cannot stand in for."""
    calibrated = CALIBRATED in noise_multiplier.values
    given = proxy.target_epsilon
    if given is not None and not (proxy.is_proxy and calibrated):
        message = f"{given:g} is not allowed without {CALIBRATED} noise and a scale; allowed: null"
        yield Refusal(("proxy", "target_epsilon"), message)
    if not proxy.is_proxy:
        return
    if given is None and calibrated:
        message = (
            f"is missing; allowed: a number > 0. {CALIBRATED} noise is that of the run for which "
            "trials stand in, and target_epsilon of the privacy section is of the trials"
        )
        yield Refusal(("proxy", "target_epsilon"), message)
    scaled = f"with proxies, {proxy.scale:g} times smaller"
    if FULL in expected_batch_size.values:
        message = f"{FULL} is not allowed {scaled}; allowed: a number"
        yield Refusal(("search_space", "expected_batch_size"), message)
    elif (least := expected_batch_size.bounds()[0]) < proxy.scale:
        message = f"{least:g} is not allowed {scaled}; allowed: at least {proxy.scale:g}"
        yield Refusal(("search_space", "expected_batch_size"), message)
    for field, value, plain in (
        ("bands", mechanism.bands, 1),
        ("truncated_batch_size", mechanism.truncated_batch_size, None),
    ):
        if value != plain:
            allowed = "null" if plain is None else plain
            message = f"{value} is not allowed with proxies of plain DP-SGD; allowed: {allowed}"
            yield Refusal(("mechanism", field), message)
    if clipping_mode == "quantile":
        message = (
            "quantile is not allowed with proxies, for its count has noise of its own; allowed: "
            "flat, per_layer, automatic"
        )
        yield Refusal(("clipping", "mode"), message)
