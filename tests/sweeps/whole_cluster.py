"""A Ray cluster in processes of its own, and somebody else who uses its accountant.

    python -m tests.sweeps.whole_cluster cluster CPUS
    python -m tests.sweeps.whole_cluster customer ADDRESS BUDGET

The first prints its address; at a line of input it ends in order, at ``kill`` by SIGKILL of all
that Ray consists of. The second draws on a budget through the shared accountant, again and again,
prints what it was told has been paid, and leaves the accountant's process id in the home.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

from tests.sweeps.whole_sweep import DEADLINE_SECS, environment_of_users


@contextlib.contextmanager
def cluster(num_cpus):
    """A cluster and its address; whatever of it still lives at the end of the block is ended."""
    with _process("cluster", str(num_cpus)) as process:
        try:
            yield process, _line(process, "address")
        finally:
            if process.poll() is None:
                process.communicate("\n", timeout=DEADLINE_SECS)


def kill_all(process):
    """Kills everything of a cluster."""
    process.communicate("kill\n", timeout=DEADLINE_SECS)


@contextlib.contextmanager
def customer(address, budget, environment, said):
    """Somebody who draws on a budget; what it was told is added to a list of lines."""
    with _process("customer", address, budget, **environment) as process:
        try:
            yield process
        finally:
            process.kill()
            out, _ = process.communicate(timeout=DEADLINE_SECS)
            said += out.splitlines()


def _process(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.sweeps.whole_cluster", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment_of_users(), **environment},
    )


def _line(process, begin):
    return next(line for line in process.stdout if line.startswith(begin)).split()[1]


def _say(*words):
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


def _be_cluster(num_cpus):
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus})
    _say("address", made.address)
    if sys.stdin.readline().strip() != "kill":
        made.shutdown()
        return
    assert made.head_node is not None
    for processes in made.head_node.all_processes.values():
        for info in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(info.process.pid, signal.SIGKILL)
    os._exit(0)


def _be_customer(address, budget):
    from accounting import DpSgdMechanism
    from cluster import ClusterError, Shared, connect
    from cluster.shared import process_of
    from sweeps.accountant import shared_ledger

    mechanism = DpSgdMechanism(
        noise_multiplier=20.0, sampling_prob=0.01, iterations=10, neighboring_relation="zero_out"
    )
    environment = {name: os.environ[name] for name in ("DP_SWEEPS_HOME", "PYTHONPATH")}
    with connect(address, env_vars=environment):
        ledger = shared_ledger()
        number = 0
        while True:
            # Each call is made until it is answered, as somebody would who needs an answer.
            for call in (
                lambda name: ledger.reserve(budget, mechanism, request_id=name),
                lambda name: ledger.charge(name, 5),
                lambda name: ledger.settle(name),
            ):
                while True:
                    with contextlib.suppress(ClusterError):
                        call(f"other-{os.getpid()}-{number}")
                        break
            _say("paid", f"other-{os.getpid()}-{number}")
            Path(os.environ["DP_SWEEPS_HOME"], "accountant.pid").write_text(
                str(process_of(cast(Shared, ledger)))
            )
            number += 1
            time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        _be_cluster(int(sys.argv[2]))
    else:
        _be_customer(*sys.argv[2:])
