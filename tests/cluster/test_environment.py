from pathlib import Path

from cluster import WorkerResources, worker_environment


def test_a_worker_without_gpus_stays_on_the_cpu():
    environment = worker_environment(WorkerResources(cpus=2), Path("/cache"))
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert environment["OMP_NUM_THREADS"] == environment["NPROC"] == "2"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/cache"


def test_a_worker_with_a_whole_gpu_may_take_its_memory():
    environment = worker_environment(WorkerResources(gpus=1), Path("/cache"))
    assert "JAX_PLATFORMS" not in environment
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in environment


def test_workers_that_share_a_gpu_do_not_preallocate():
    environment = worker_environment(WorkerResources(cpus=0.5, gpus=0.25), Path("/cache"))
    assert environment["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert environment["OMP_NUM_THREADS"] == "1"
