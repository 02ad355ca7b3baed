"""What must be in a worker's environment before it imports JAX.

JAX reads these once, when it is imported; setting them later does nothing and says nothing. Ray
starts workers with them through the job's runtime environment, which anybody with access to the
cluster can read: nothing here may be secret.
"""

from pathlib import Path

from cluster.resources import WorkerResources


def worker_environment(resources: WorkerResources, compilation_cache: Path) -> dict[str, str]:
    """The environment variables of a trial's worker.

    Args:
        resources: What the worker may use.
        compilation_cache: Folder of JAX's persistent compilation cache, shared by workers, so
            that a program is compiled once per machine.

    Returns:
        Variable to value.
    """
    threads = str(max(1, int(resources.cpus)))
    environment = {
        # One trial per worker: more threads than cores would make trials fight.
        "OMP_NUM_THREADS": threads,
        "NPROC": threads,  # the size of XLA's thread pool on CPUs
        "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # TFDS and XLA would otherwise write notes meant for their developers.
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if resources.gpus == 0:
        environment["JAX_PLATFORMS"] = "cpu"
    elif resources.gpus < 1:
        # Several workers share a GPU: none may take all of its memory when it starts.
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    return environment
