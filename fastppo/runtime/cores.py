"""The number of cores that this process may keep busy."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fastppo.runtime.cgroups import control_groups


def usable_cores(root: Path = Path("/")) -> int:
    """Return the cores available to this process: its affinity, within the quota of its control groups.

    Training processes on one machine share the cores of their parent, unless each is bound to cores of its own.
    At least 1.

    Args:
        root: the folder that holds /proc and /sys.
    """
    quota = min((_quota(*group) for group in control_groups("cpu", root)), default=math.inf)
    share = min(_affinity(os.getppid()), quota) / local_processes()
    return max(1, math.floor(min(_affinity(0), share)))


def processes() -> int:
    """Return the number of training processes, from torchrun's WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """Return the number of training processes on this machine, from torchrun's LOCAL_WORLD_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _affinity(pid: int) -> int:
    try:
        return len(os.sched_getaffinity(pid))
    except (AttributeError, OSError):  # not Linux, or the parent has exited
        return os.cpu_count() or 1


def _quota(version: int, folder: Path) -> float:
    """Return the CPU time per wall time that one group allows, in cores; infinity without a limit."""
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
