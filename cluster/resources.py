"""What one worker may use."""

import dataclasses
from collections.abc import Mapping, Sequence

from cluster.errors import ClusterError


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerResources:
    """Resources that Ray sets aside for one trial.

    Attributes:
        cpus: CPU cores, > 0; a fraction shares one core among trials.
        gpus: GPUs, >= 0; a fraction shares one GPU among trials.
    """

    cpus: float = 1.0
    gpus: float = 0.0

    def as_ray(self) -> dict[str, float]:
        """Ray's form: resource name to amount."""
        wanted = {"CPU": float(self.cpus)}
        if self.gpus:
            wanted["GPU"] = float(self.gpus)
        return wanted

    def check_fits(self, nodes: Sequence[Mapping[str, float]]) -> None:
        """Refuses a request that no node could ever meet: Ray would wait for ever.

        Args:
            nodes: The resources of each node.

        Raises:
            ClusterError: If no single node has enough.
        """
        wanted = self.as_ray()
        if any(all(node.get(name, 0) >= n for name, n in wanted.items()) for node in nodes):
            return
        largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in wanted}
        raise ClusterError(
            f"a trial asks for {_show(wanted)} on one node; the cluster's largest offers "
            f"{_show(largest)}: lower resources.cpus_per_trial or resources.gpus_per_trial, or "
            "connect to a larger cluster"
        )


def _show(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in amounts.items())
