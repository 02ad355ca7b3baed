"""The program as a person starts it: killed, stopped, gone on with, on several hosts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.alone.trial_files import write
from trainer.alone.run_directory import RunDirectory
from trainer.weights.weight_files import read_arrays

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.slow

# Long enough to be killed in, and quick to compile.
ITERATIONS, EVERY = 800, 50
CHANGES = {
    "iterations": ITERATIONS,
    "report_every_steps": EVERY,
    "optimizer": "momentum",
    "averaging.ema_decay": 0.9,
    "clipping.engine": "vmap",
    "evaluation": {"protection": "dp", "noise_multiplier": 30.0},
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Programs are compiled once for all processes here."""
    home = tmp_path_factory.mktemp("home")
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DP_SWEEPS_HOME": str(home),
        "JAX_COMPILATION_CACHE_DIR": str(home / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(environment, *arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "trainer", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(happened, process):
    """Waits until something happened in a run that goes on."""
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpoint_step(run):
    newest = run.newest_checkpoint()
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def charged(run):
    branches = json.loads(run.charges.read_text())["branches"]
    steps = sum(each["step"] - each["start_step"] for each in branches.values())
    return steps, sum(each["counts"] for each in branches.values())


def arrays(run):
    """Everything that the last checkpoint holds, by name."""
    checkpoint = run.newest_checkpoint()
    assert checkpoint is not None
    return {
        f"{part}/{name}": value
        for part in ("params", "opt_state", "averages")
        for name, value in read_arrays(checkpoint / part, "orbax")
    }


def test_a_run_that_was_stopped_and_killed_goes_on_bit_for_bit(environment, tmp_path):
    trial = write(tmp_path, CHANGES)
    killed = RunDirectory(tmp_path / "killed")

    # Stopped by Ctrl-C: the steps to the next report are taken, and are in the checkpoint.
    process = start(environment, trial, "--out", killed.path)
    wait_for(lambda: checkpoint_step(killed) > 0, process)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    stopped_at = checkpoint_step(killed)
    counted_at_stop = charged(killed)[1]
    assert code == 130
    assert "stopping at the next report" in err
    assert f"--out {killed.path} --resume" in err
    assert f"interrupted at step {stopped_at} of {ITERATIONS}" in out
    last = killed.last_report()
    assert last is not None
    assert last["step"] == stopped_at == charged(killed)[0] < ITERATIONS
    undisturbed = RunDirectory(shutil.copytree(killed.path, tmp_path / "undisturbed"))
    keyless = RunDirectory(shutil.copytree(killed.path, tmp_path / "keyless"))

    process = start(environment, trial, "--out", killed.path, "--resume")
    wait_for(lambda: checkpoint_step(killed) > stopped_at, process)
    process.kill()
    end(process)
    killed_at, counted_at_kill = charged(killed)
    assert stopped_at < checkpoint_step(killed) <= killed_at < ITERATIONS

    # Another went on without the key and from the older checkpoint, though more is charged.
    shutil.rmtree(keyless.secrets)
    shutil.copy(killed.charges, keyless.charges)
    processes = [
        start(environment, trial, "--out", run.path, "--resume")
        for run in (killed, undisturbed, keyless)
    ]
    for process in processes:
        code, out, err = end(process)
        assert (code, f"completed at step {ITERATIONS} of" in out) == (0, True), err

    ours, theirs, others = arrays(killed), arrays(undisturbed), arrays(keyless)
    assert ours.keys() == theirs.keys() == others.keys()
    assert len(ours) > 4
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], strict=True)
    assert any(not np.array_equal(value, others[name]) for name, value in ours.items())
    assert charged(killed) == charged(undisturbed) == (ITERATIONS, 2 * ITERATIONS // EVERY)
    assert killed.last_report() == undisturbed.last_report()
    assert list(killed.secrets.iterdir()) == []

    repeated = killed_at - stopped_at
    assert charged(keyless) == (
        ITERATIONS + repeated,
        # Counts are charged after their steps, and the kill may have come between.
        2 * ITERATIONS // EVERY + counted_at_kill - counted_at_stop,
    )
    assert f"{ITERATIONS + repeated} iterations are charged" in out
    last, whole = keyless.last_report(), undisturbed.last_report()
    assert last is not None
    assert whole is not None
    assert last["epsilon"] > whole["epsilon"]
    assert last["eval_epsilon"] > whole["eval_epsilon"]


def test_several_hosts_are_one_trial(environment, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    trial = write(tmp_path, {"clipping.engine": "vmap"})
    run = RunDirectory(tmp_path / "run")
    processes = [
        start(
            environment,
            trial,
            *("--out", run.path, "--json", "--coordinator", address),
            *("--num-processes", 2, "--process-id", number),
        )
        for number in range(2)
    ]
    (code, out, err), (other_code, other_out, other_err) = [end(process) for process in processes]
    assert (code, other_code, other_out) == (0, 0, ""), err + other_err
    assert [json.loads(line)["step"] for line in out.splitlines()] == [10, 20]
    assert charged(run) == (20, 0)
    assert checkpoint_step(run) == 20
