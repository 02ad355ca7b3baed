"""Connecting to Ray, and leaving it as it was found."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# Ray's annotations are partial.

import dataclasses
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import ray
from ray.exceptions import RayError

from cluster.errors import ClusterError

LOCAL = "local"
NAMESPACE = "dp-sweeps"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSession:
    """A connection that is up.

    Attributes:
        address: The address that was asked for.
        nodes: Resources of each live node.
    """

    address: str
    nodes: Sequence[Mapping[str, float]]


@contextmanager
def connect(
    address: str = LOCAL, *, num_cpus: int | None = None, env_vars: Mapping[str, str]
) -> Generator[ClusterSession]:
    """Starts a Ray of our own on this machine, or joins one.

    Args:
        address: ``local`` starts a Ray on this machine and stops it at the end. Anything else
            is an address as `ray.init` takes it; that cluster is left running. A local Ray is
            always a new one: it never joins one that happens to be there.
        num_cpus: CPUs that a local Ray offers; None takes all of the machine's.
        env_vars: Environment of every worker. Readable by whoever may use the cluster.

    Yields:
        The session.

    Raises:
        ClusterError: If Ray cannot be started or reached, or is connected already.
    """
    if ray.is_initialized():
        raise ClusterError("Ray is connected already in this process; disconnect it first")
    # Ray asks for consent and reports usage unless told; a tool for private data stays silent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What Ray announces as its next default, and warns about until it is chosen.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    local: dict[str, Any] = {"include_dashboard": False, "num_cpus": num_cpus}
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            runtime_env={"env_vars": dict(env_vars)},
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=True,
            **(local if address == LOCAL else {}),
        )
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(f"Ray at {address!r}: {_first_line(error)}") from error
    try:
        nodes = cast(list[dict[str, Any]], ray.nodes())
        yield ClusterSession(
            address=address, nodes=[node["Resources"] for node in nodes if node["Alive"]]
        )
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
