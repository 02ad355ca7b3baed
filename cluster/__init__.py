"""Machines: connecting to Ray, what a worker may use, and the environment it starts in.

Knows neither models nor privacy, and imports no JAX.
"""

from cluster.environment import worker_environment
from cluster.errors import ClusterError
from cluster.resources import WorkerResources
from cluster.session import ClusterSession, connect

__all__ = ["ClusterError", "ClusterSession", "WorkerResources", "connect", "worker_environment"]
