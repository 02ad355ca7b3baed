"""Errors of the cluster room.

ClusterError    Ray cannot be reached, or the machines cannot do what is asked
"""


class ClusterError(Exception):
    """Ray cannot be started or reached, or the machines cannot do what is asked."""
