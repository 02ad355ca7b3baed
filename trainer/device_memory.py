"""How much memory is left on a device, and whether a failure was for want of it."""

import contextlib
import os
from pathlib import Path

import jax

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> float:
    """What programs can still take on the first device; for a CPU, of the machine's memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return min(_free_on_machine(), _free_in_container())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a program failed because the device had too little memory for it."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def _free_on_machine() -> float:
    # Caches count as free here, as they do not in SC_AVPHYS_PAGES.
    with contextlib.suppress(OSError, ValueError):
        for line in _MEMINFO.read_text(encoding="utf-8").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return 1024.0 * int(rest.split()[0])
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _free_in_container() -> float:
    """Under the limit of a control group, version 2; infinite where there is none."""
    with contextlib.suppress(OSError, ValueError):
        limit = int((_CGROUP / "memory.max").read_text(encoding="utf-8"))
        return float(limit - int((_CGROUP / "memory.current").read_text(encoding="utf-8")))
    return float("inf")
