"""Machines: connecting to Ray, what a worker may use, and the environment it starts in.

Knows neither models nor privacy, and imports no JAX.
"""

from cluster.environment import worker_environment
from cluster.errors import ClusterError
from cluster.kept import call_there, keep
from cluster.resources import WorkerResources
from cluster.session import LOCAL, ClusterSession, connect
from cluster.shared import Shared, share

__all__ = [
    "LOCAL",
    "ClusterError",
    "ClusterSession",
    "Shared",
    "WorkerResources",
    "call_there",
    "connect",
    "keep",
    "share",
    "worker_environment",
]
