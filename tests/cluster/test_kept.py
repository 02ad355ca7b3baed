"""Work that outlives who asked for it, and its own process, on a cluster that is really there."""

import functools
import os
import signal
import time
from typing import Any

import pytest

from cluster import ClusterError, call_there, connect, keep
from cluster.kept import end, is_kept, process_of
from tests.sweeps.whole_cluster import cluster
from tests.sweeps.whole_sweep import wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def address():
    with cluster(1) as (_, found):
        yield found


def connected(address):
    # What is kept is looked up in this file where it runs.
    return connect(address, env_vars={"PYTHONPATH": os.getcwd()})


def begin_and_wait(folder):
    """Says that it began, uses an actor of its own, and ends when it is told to."""
    import ray

    class Holder:
        def pid(self):
            return os.getpid()

    holder: Any = ray.remote(num_cpus=1)(Holder)
    holder = holder.remote()
    pid = ray.get(holder.pid.remote())  # as long as another holds the CPU, it waits
    (folder / f"began-{os.getpid()}").write_text(str(pid))
    while not (folder / "end").exists():
        time.sleep(0.05)
    (folder / "ended").touch()


def test_work_outlives_its_caller_and_its_process_and_ends_once_it_is_done(address, tmp_path):
    with connected(address):
        keep("work", functools.partial(begin_and_wait, tmp_path))
        first = process_of("work")
        keep("work", functools.partial(begin_and_wait, tmp_path))
        assert process_of("work") == first, "there is one of a name"
    wait_for((tmp_path / f"began-{first}").exists)
    os.kill(first, signal.SIGKILL)
    # Nobody is connected, nobody calls it: it begins again, with the CPU that it had.
    wait_for(lambda: len(list(tmp_path.glob("began-*"))) == 2)
    (tmp_path / "end").touch()
    with connected(address):
        wait_for(lambda: not is_kept("work"))
    assert (tmp_path / "ended").exists()


def test_work_that_is_ended_ends_with_all_that_it_started(address, tmp_path):
    with connected(address):
        keep("endless", functools.partial(begin_and_wait, tmp_path))
        began = wait_for(lambda: list(tmp_path.glob("began-*")))[0]
        holder = int(wait_for(began.read_text))
        end("endless")
        wait_for(lambda: not is_kept("endless"))
        wait_for(lambda: not is_alive(holder))
        end("endless")  # there is nothing to end
        with pytest.raises(ClusterError, match="endless: is not under way"):
            process_of("endless")


def test_a_function_is_called_there(address):
    with connected(address):
        pid = call_there(os.getpid)
        assert pid != os.getpid()
        with pytest.raises(ClusterError, match="ZeroDivisionError"):
            call_there(functools.partial(divmod, 1, 0))


def test_nothing_is_kept_without_a_cluster():
    with pytest.raises(ClusterError, match="Ray is not connected"):
        keep("work", print)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] != "Z"
