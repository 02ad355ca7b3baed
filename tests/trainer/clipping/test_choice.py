"""`auto`: what is measured, what is remembered, and what happens where memory is short."""

import json
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import device_memory
from trainer.clipping import choice as choice_module
from trainer.clipping import clipped_grad
from trainer.clipping.choice import Measurement, _best, _fastest

ARGS = ({"w": jnp.ones((3, 2))}, jnp.ones((4, 5, 3)))


def loss(params, rows):
    """A weight that meets five rows, so there is something to weigh."""
    return jnp.mean(jnp.tanh(rows @ params["w"]))


@pytest.fixture
def measured(monkeypatch):
    """The programs that are measured, without running them."""
    seen = []

    def time(self, engine, size):
        seen.append((engine, size))
        return Measurement(engine, size, {"vmap": 1.0}.get(engine, 2.0), 100)

    monkeypatch.setattr(choice_module._Bench, "time", time)
    return seen


def home_files():
    return sorted((Path(os.environ["DP_SWEEPS_HOME"]) / "clipping").iterdir())


def auto(fun=loss, **options):
    return clipped_grad(fun, l2_clip_norm=1.0, **options)


def forget():
    choice_module._in_memory.cache_clear()


@pytest.mark.slow
def test_what_is_chosen_gives_what_any_engine_gives():
    want = clipped_grad(loss, l2_clip_norm=1.0, engine="vmap")(*ARGS)
    np.testing.assert_allclose(jax.jit(auto())(*ARGS)["w"], want["w"], rtol=1e-5)
    record = json.loads(home_files()[0].read_text())
    assert {m["engine"] for m in record["choice"]["measurements"]} == {
        "vmap",
        "two_pass",
        "book_keeping",
    }
    assert all(m["secs"] > 0 for m in record["choice"]["measurements"])


def test_measures_once_for_each_program_and_shape(measured):
    auto()(*ARGS)
    count = len(measured)
    assert count > 0
    auto()(*ARGS)
    forget()
    auto()(*ARGS)
    assert len(measured) == count
    auto()(ARGS[0], jnp.ones((6, 5, 3)))
    assert len(measured) == 2 * count
    auto(lambda params, rows: 2 * loss(params, rows))(*ARGS)
    assert len(measured) == 3 * count
    assert len(home_files()) == 3


def test_what_is_chosen_can_be_kept_elsewhere(measured, tmp_path):
    with choice_module.kept_in(tmp_path / "clipping"):
        auto()(*ARGS)
    count = len(measured)
    assert count > 0
    assert len(list((tmp_path / "clipping").iterdir())) == 1
    assert not (Path(os.environ["DP_SWEEPS_HOME"]) / "clipping").exists()
    auto()(*ARGS)
    assert len(measured) == 2 * count, "nor is it known here"
    assert len(home_files()) == 1


def test_measures_while_the_caller_traces_and_closes_over_traced_values(measured):
    @jax.jit
    def step(params, rows, factor):
        scaled = lambda params, rows: factor * loss(params, rows)
        return auto(scaled)(params, rows)

    plain = clipped_grad(lambda p, r: 3 * loss(p, r), l2_clip_norm=1.0, engine="vmap")(*ARGS)
    np.testing.assert_allclose(step(*ARGS, 3.0)["w"], plain["w"], rtol=1e-5)
    assert measured


@pytest.mark.slow
def test_a_real_measurement_inside_a_traced_program():
    @jax.jit
    def step(params, rows, factor):
        return auto(lambda params, rows: factor * loss(params, rows))(params, rows)

    plain = clipped_grad(lambda p, r: 3 * loss(p, r), l2_clip_norm=1.0, engine="vmap")(*ARGS)
    np.testing.assert_allclose(step(*ARGS, 3.0)["w"], plain["w"], rtol=1e-5)


def test_a_damaged_file_is_measured_again(measured):
    auto()(*ARGS)
    (path,) = home_files()
    for content in (
        "",
        "{",
        "[]",
        '{"choice": {"engine": "vmap"}}',
        '{"choice": {"measurements": 3}}',
    ):
        path.write_text(content)
        forget()
        count = len(measured)
        auto()(*ARGS)
        assert len(measured) > count
        assert json.loads(path.read_text())["choice"]["engine"] == "vmap"


def test_a_folder_that_cannot_be_written_is_said_and_costs_a_measurement_only(
    measured, monkeypatch, tmp_path, caplog
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DP_SWEEPS_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, "trainer.clipping"):
        auto()(*ARGS)
    assert "cannot be kept" in caplog.text
    count = len(measured)
    auto()(*ARGS)
    assert len(measured) == count


def test_says_what_it_chose_and_why(measured, caplog):
    with caplog.at_level(logging.INFO, "trainer.clipping"):
        auto()(*ARGS)
    assert "clipping by vmap" in caplog.text
    assert "book_keeping 2x" in caplog.text


def test_weights_that_meet_one_row_need_no_measurement(measured):
    auto()({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)))
    assert measured == []


def test_a_settled_size_is_kept(measured):
    auto(microbatch_size=2)(*ARGS)
    assert {size for _, size in measured} == {2}


@pytest.mark.slow
def test_halves_until_the_memory_suffices(monkeypatch):
    wanted = []
    real = choice_module._Bench.time

    def time(self, engine, size):
        result = real(self, engine, size)
        wanted.append(result)
        return result

    monkeypatch.setattr(choice_module._Bench, "time", time)
    monkeypatch.setattr(choice_module, "free_bytes", lambda: -1.0)
    got = auto()(*ARGS)
    assert [m.microbatch_size for m in wanted if m.engine == "vmap"] == [None, 2, 1]
    want = clipped_grad(loss, l2_clip_norm=1.0, engine="vmap")(*ARGS)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-5)


def test_a_choice_that_no_longer_fits_is_measured_again_for_this_process_alone(
    measured, monkeypatch
):
    auto()(*ARGS)
    count, (file,) = len(measured), home_files()
    kept = file.read_text()
    monkeypatch.setattr(choice_module, "free_bytes", lambda: 10.0)
    auto()(*ARGS)
    assert len(measured) == 2 * count
    assert file.read_text() == kept
    monkeypatch.setattr(choice_module, "free_bytes", device_memory.free_bytes)
    forget()
    auto()(*ARGS)
    assert len(measured) == 2 * count


@pytest.mark.slow
def test_halves_when_the_device_runs_out_of_memory(monkeypatch):
    calls = []

    def run(call):
        calls.append(call)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return 1.0

    monkeypatch.setattr(choice_module, "_median_secs", run)
    auto()(*ARGS)
    record = json.loads(home_files()[0].read_text())["choice"]["measurements"]
    first, second, *_ = record
    assert (first["secs"], first["microbatch_size"]) == (None, None)
    assert (second["secs"], second["microbatch_size"]) == (1.0, 2)


def test_never_takes_one_that_was_slower_than_vmap():
    results = [
        Measurement("book_keeping", None, 1.2, 0),
        Measurement("two_pass", None, None, 0),
        Measurement("vmap", None, 1.0, 0),
    ]
    assert _fastest(results) == results[2]
    best = _best(results, 8)
    assert (best.engine, best.microbatch_size) == ("vmap", None)
    assert "two_pass no fit" in best.reason
