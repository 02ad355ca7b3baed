"""Machines: connecting to Ray, what a worker may use, and the environment it starts in.

Knows neither models nor privacy, and imports no JAX.
"""

from cluster.environment import worker_environment
from cluster.errors import ClusterError
from cluster.resources import WorkerResources
from cluster.session import ClusterSession, connect
from cluster.shared import Shared, share

__all__ = [
    "ClusterError",
    "ClusterSession",
    "Shared",
    "WorkerResources",
    "connect",
    "share",
    "worker_environment",
]
