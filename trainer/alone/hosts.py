"""Several processes as one trial, through `jax.distributed`.

Each is started alike, with a number of its own; the first charges, writes and shows. All of them
need the run directory and the data set at the same paths.
"""

import dataclasses
import os
import re
import sys

from trainer.errors import ConfigError

_ADDRESS = re.compile(r"[^\s:]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """Which of how many processes this is.

    Attributes:
        coordinator: ``host:port`` of the first; None where there is no other.
        num_processes: How many there are.
        process_id: Which this is, from 0.
    """

    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return self.process_id == 0

    def connect(self) -> None:
        """Meets the others; before anything else uses JAX."""
        if self.coordinator is None:
            return
        import jax

        # Only CPUs read it; other devices bring their own.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _keep_standard_output_clean()
        jax.distributed.initialize(self.coordinator, self.num_processes, self.process_id)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes; all have to ask."""
        if self.coordinator is None:
            return flag
        import numpy as np
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def _keep_standard_output_clean() -> None:
    """Leaves standard output to Python alone: gloo greets on it, in between the answers."""
    sys.stdout.flush()
    answers = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(answers, "w", encoding="utf-8")  # noqa: SIM115


def hosts_of(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Hosts:
    """Checks the three options that belong together.

    Raises:
        ConfigError: One is missing or not allowed.
    """
    given = (coordinator, num_processes, process_id)
    if coordinator is None or num_processes is None or process_id is None:
        if any(each is not None for each in given):
            raise ConfigError(
                f"--coordinator={coordinator} --num-processes={num_processes} "
                f"--process-id={process_id}: allowed are all three or none"
            )
        return Hosts()
    if not _ADDRESS.fullmatch(coordinator):
        raise ConfigError(f"--coordinator={coordinator!r}: allowed is HOST:PORT")
    if num_processes < 1:
        raise ConfigError(f"--num-processes={num_processes}: allowed is a whole number >= 1")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id={process_id}: allowed is a whole number from 0 to {num_processes - 1}"
        )
    return Hosts(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
