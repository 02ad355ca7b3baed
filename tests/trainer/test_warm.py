"""A process that has run a trial: its next one of the same shape finds everything at hand."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import monitoring

import trainer.trial
from tests.trainer.killed_trial import CONFIG
from trainer.config import ClippingConfig, ModelConfig
from trainer.loop import run_trial
from trainer.training.devices import topology
from trainer.training.plan import shape_of
from trainer.trial import Trial

FIRST = dataclasses.replace(
    CONFIG, model=ModelConfig(name="mlp", hidden_sizes=(5,)), clipping=ClippingConfig()
)
# All in which trials of one shape may differ.
NEXT = dataclasses.replace(
    FIRST,
    learning_rate=0.25,
    learning_rate_schedule="cosine",
    warmup_steps=2,
    weight_decay=0.1,
    l2_clip_norm=2.0,
    noise_multiplier=3.0,
    iterations=8,
    report_every_steps=2,
)


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def work():
    """What JAX traces and XLA compiles, by name, from here on."""
    found = []

    def note(event, duration_secs, **facts):
        if event.startswith("/jax/core/compile/"):
            found.append(facts.get("fun_name"))

    monitoring.register_event_duration_secs_listener(note)
    yield found
    monitoring.unregister_event_duration_listener(note)


def test_the_next_trial_traces_compiles_reads_and_draws_nothing(
    data_home, tmp_path, monkeypatch, work
):
    def run(config, name):
        folder = tmp_path / name
        return run_trial(
            config,
            data_home=data_home,
            checkpoint_dir=folder / "checkpoints",
            secrets_dir=folder / "secrets",
        )

    def refuse(*_):
        raise AssertionError("it is there already")

    run(FIRST, "first")
    assert work, "the first has to"
    work.clear()
    monkeypatch.setattr(trainer.trial, "load", refuse)
    monkeypatch.setattr(trainer.trial, "resident_data", refuse)
    assert run(NEXT, "next").report.step == NEXT.iterations
    assert work == []


def test_every_trial_begins_with_the_same_parameters(data_home):
    first = Trial(FIRST, data_home, topology(1))
    drawn = first.network.init(first.data.info.image_shape, FIRST.seed)
    run_trial(FIRST, data_home=data_home)  # which writes over its own
    for config in (FIRST, NEXT):
        begun = Trial(config, data_home, topology(1)).start(None, None)
        jax.tree.map(np.testing.assert_array_equal, begun.state.params, drawn.trainable)
    other = dataclasses.replace(FIRST, seed=FIRST.seed + 1)
    begun = Trial(other, data_home, topology(1)).start(None, None)
    drawn = first.network.init(first.data.info.image_shape, other.seed)
    jax.tree.map(np.testing.assert_array_equal, begun.state.params, drawn.trainable)


def test_shapes_tell_what_is_compiled_anew():
    assert shape_of(FIRST) == shape_of(NEXT)
    assert shape_of(FIRST) == shape_of(dataclasses.replace(FIRST, seed=7))
    for other in (
        dataclasses.replace(FIRST, optimizer="adam"),
        dataclasses.replace(FIRST, sampling_prob=0.1),
        dataclasses.replace(FIRST, model=CONFIG.model),
        dataclasses.replace(FIRST, clipping=ClippingConfig(mode="quantile")),
    ):
        assert shape_of(other) != shape_of(FIRST)
