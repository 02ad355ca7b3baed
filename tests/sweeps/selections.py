"""Specifications of private selections, and what their budgets would pay for."""

import hashlib

import accounting
from sweeps.errors import SweepError
from sweeps.search.selection_draws import SelectionDraws
from sweeps.search_space import candidates, trial_config
from sweeps.spec.reading import parse_spec
from trainer.training.plan import mechanism_of

UNITS = 1437
SPACE = {
    "optimizer": "{choice: [sgd, adam]}",
    "learning_rate": "{loguniform: [0.01, 10]}",
    "expected_batch_size": "{choice: [32, 64, 128]}",
    "iterations": "12",
    "noise_multiplier": "4.0",
    "l2_clip_norm": "1",
}
LAW = "{distribution: geometric, mean: 5}"


def text_of(law=LAW, privacy="", every=4, clipping="flat", **fields):
    space = "\n".join(f"  {name}: {text}" for name, text in {**SPACE, **fields}.items())
    return f"""
version: 1
name: select
data: {{name: digits}}
model: {{name: logistic_regression}}
clipping: {{mode: {clipping}, engine: vmap}}
privacy:
  policy: private_selection
  target_epsilon: 50
  target_delta: 1e-5
  selection: {law}
{privacy}
search_space:
{space}
report_every_steps: {every}
"""


def spec_of(*law, **more):
    return parse_spec(text_of(*law, **more))


def paid_for(spec, *, noise=None):
    """What a budget would pay for: every candidate of a specification."""
    wanted = spec.privacy.selection
    found = [
        mechanism_of(
            trial_config(
                spec,
                setting,
                num_units=UNITS,
                noise_multiplier=noise or float(setting.noise_multiplier),
            )
        )
        for setting in candidates(spec)
    ]
    return accounting.Selection(
        candidates=tuple(found),
        distribution=wanted.distribution,
        mean=wanted.mean,
        shape=wanted.shape,
    )


def secret(number):
    """The same secrets in every run of the tests."""
    return hashlib.sha256(f"secret {number}".encode()).digest()


def draws_of(spec, number, selection=None):
    return SelectionDraws(secret(number), spec, selection or paid_for(spec), UNITS)


def secret_with(spec, condition):
    """The first secret whose draws are as a test wants them."""
    selection = paid_for(spec)
    for number in range(10_000):
        draws = draws_of(spec, number, selection)
        try:
            if condition(draws):
                return secret(number)
        except SweepError:
            continue
    raise AssertionError("there is none")
