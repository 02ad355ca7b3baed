import math

import jax
import pytest

from trainer import device_memory
from trainer.device_memory import free_bytes, is_out_of_memory

MEMINFO = "MemTotal:       100 kB\nMemFree:         10 kB\nMemAvailable:    60 kB\n"


class Device:
    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A CPU machine with 60 KiB to spare and no control group."""
    (tmp_path / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(device_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    return tmp_path


def test_caches_of_the_machine_count_as_free(machine):
    assert free_bytes() == 60 * 1024


def test_a_container_has_what_its_limit_leaves(machine):
    (machine / "memory.max").write_text("50000\n")
    (machine / "memory.current").write_text("20000\n")
    assert free_bytes() == 30000


@pytest.mark.parametrize("limit", ["max\n", "", "?"])
def test_a_container_without_a_limit(machine, limit):
    (machine / "memory.max").write_text(limit)
    assert free_bytes() == 60 * 1024


def test_a_machine_that_does_not_say(machine):
    (machine / "meminfo").unlink()
    assert 2**20 < free_bytes() < math.inf


def test_a_device_of_its_own_says_itself(machine, monkeypatch):
    stats = {"bytes_limit": 1000, "bytes_in_use": 300}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(stats)])
    assert free_bytes() == 700


def test_what_is_out_of_memory():
    assert is_out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    assert not is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: something else"))
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
