import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.training.devices import topology

ROOT = Path(__file__).parents[2]


def environment(num_devices):
    # Its own variables, but for the devices: XLA reads them when a process begins.
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def data_home(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
def test_eight_devices_train_as_one_does(data_home):
    script = Path(__file__).with_name("on_many_devices.py")
    done = subprocess.run(
        [sys.executable, str(script), str(data_home)],
        env=environment(8),
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["devices"] == 8
    for case, (difference, moved) in result["cases"].items():
        # Six steps of float32 sums in another order, parameters of order 1.
        assert difference < 2e-5, case
        assert moved > 0.05, case


@pytest.mark.slow
def test_two_processes_train_one_trial(data_home, tmp_path):
    script = Path(__file__).with_name("on_two_hosts.py")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"

    def started(count, number, out):
        arguments = [str(data_home), str(tmp_path / out), address, str(count), str(number)]
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env=environment(4 // count),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def results(processes):
        ends = [process.communicate() for process in processes]
        for process, (_, errors) in zip(processes, ends, strict=True):
            assert process.returncode == 0, errors
        return [json.loads(out.splitlines()[-1]) for out, _ in ends]

    (alone,) = results([started(1, 0, "alone")])
    first, second = results([started(2, 0, "two"), started(2, 1, "two")])
    assert alone["devices"] == first["devices"] == second["devices"] == 4
    for placement in ("device", "streamed"):
        loss, charges = first[placement]
        assert loss == second[placement][0]
        assert loss == pytest.approx(alone[placement][0], rel=1e-4)
        # The first alone charges and writes, and all stop where it is refused.
        assert (charges, second[placement][1]) == (1, 0)
        assert (tmp_path / "two" / placement / "step-00000006" / "checkpoint.json").is_file()
    assert (first["refused"], second["refused"]) == ("RuntimeError", "TrainerError")


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match="devices=64"):
        topology(64)
    with pytest.raises(ConfigError, match="devices=0"):
        topology(0)
