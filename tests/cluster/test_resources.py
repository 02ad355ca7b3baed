import pytest

from cluster import ClusterError, WorkerResources


def test_ray_form_leaves_out_what_is_not_wanted():
    assert WorkerResources(cpus=2).as_ray() == {"CPU": 2.0}
    assert WorkerResources(cpus=1, gpus=0.5).as_ray() == {"CPU": 1.0, "GPU": 0.5}


def test_a_request_must_fit_on_one_node():
    nodes = [{"CPU": 2.0}, {"CPU": 4.0, "GPU": 1.0}]
    WorkerResources(cpus=4, gpus=1).check_fits(nodes)
    with pytest.raises(ClusterError, match=r"asks for 6 CPU on one node; .* offers 4 CPU"):
        WorkerResources(cpus=6).check_fits(nodes)
    with pytest.raises(ClusterError, match="asks for 1 CPU and 2 GPU"):
        WorkerResources(gpus=2).check_fits(nodes)
    # 3 CPUs are on the node without a GPU only.
    with pytest.raises(ClusterError):
        WorkerResources(cpus=3, gpus=1).check_fits([{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}])
