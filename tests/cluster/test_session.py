import os

import pytest
import ray

from cluster import ClusterError, connect


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_ray_gives_workers_their_environment_and_ends_with_the_block():
    with connect(num_cpus=1, env_vars={"DP_SWEEPS_TEST": "here"}) as session:
        assert session.address == "local"
        assert [node["CPU"] for node in session.nodes] == [1.0]
        read = ray.remote(lambda: os.environ.get("DP_SWEEPS_TEST"))
        assert ray.get(read.remote()) == "here"
        with pytest.raises(ClusterError, match="connected already"), connect(env_vars={}):
            pass
        assert ray.is_initialized()
    assert not ray.is_initialized()


def test_an_address_where_no_ray_is_gives_one_line():
    with (
        pytest.raises(ClusterError, match=r"^Ray at 'nonsense://nowhere': [^\n]+$"),
        connect("nonsense://nowhere", env_vars={}),
    ):
        pass
    assert not ray.is_initialized()
