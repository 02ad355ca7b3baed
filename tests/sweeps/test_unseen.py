"""Nothing is printed, logged or kept of work that nobody may see; after it all is as before."""

import ctypes
import logging
import os
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sweeps.unseen import unseen
from trainer.clipping import choice


def say():
    os.write(1, b"from below")
    sys.stdout.write("to the terminal")
    sys.stderr.write("to a log")
    libc = ctypes.CDLL(None)
    libc.printf(b"from another language")
    libc.fflush(None)
    logging.getLogger("trainer").error("a message")
    logging.getLogger("somebody.else").critical("another")


def test_nothing_is_said(tmp_path, capfd, caplog):
    with unseen(tmp_path / "cache"):
        say()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    say()
    said = capfd.readouterr()
    assert "from below" in said.out
    assert "to a log" in said.err
    assert [record.message for record in caplog.records] == ["a message", "another"]


def test_what_goes_wrong_is_raised_and_ends_the_silence(tmp_path, capfd):
    with pytest.raises(ZeroDivisionError), unseen(tmp_path / "cache"):
        raise ZeroDivisionError
    os.write(1, b"again")
    assert capfd.readouterr().out == "again"


@pytest.fixture
def home(tmp_path):
    """Where compiled programs are kept, all of them."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path / "home"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for change in (values, before):
        for name, value in change.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if change is values:
            yield tmp_path / "home"


def test_compiled_programs_are_kept_elsewhere(home, tmp_path):
    cache = tmp_path / "secret" / "cache"
    jax.jit(lambda x: x + 1)(1.0)
    outside = {path.name for path in home.iterdir()}
    assert outside
    with unseen(cache):
        jax.jit(lambda x: x * 3 - 2)(1.0)
        assert choice._folder() == cache / "clipping"
    assert {path.name for path in home.iterdir()} == outside
    assert list((cache / "jax").iterdir())
    assert cache.stat().st_mode & 0o777 == 0o700
    jax.jit(lambda x: x * 5 - 4)(1.0)
    assert len(list(home.iterdir())) > len(outside)
