"""How many cores this process may keep busy."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on: of its affinity, within its control groups' quota, shared with its siblings.

    Siblings are the processes that train together on this machine; where each was bound to cores of its own, what
    they share is their parent's. `root` is where /proc and /sys are found.
    """
    shared = min(_affinity(os.getppid()), _quota(root)) / local_processes()
    return max(1, math.floor(min(_affinity(0), shared)))


def _affinity(pid: int) -> int:
    try:
        return len(os.sched_getaffinity(pid))
    except (AttributeError, OSError):  # not on Linux; a parent that is gone
        return os.cpu_count() or 1


def local_processes() -> int:
    """How many of the processes that train together are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _quota(root: Path) -> float:
    """Cores' worth of time that control groups allow (version 2: cpu.max; 1: cpu.cfs_quota_us); inf: no limit."""
    least = math.inf
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        # a container may see its own group as the root while /proc names it by the path outside
        parts = [part for part in group.split("/") if part]
        for depth in range(len(parts) + 1):
            least = min(least, _limit(base.joinpath(*parts[:depth])))
    return least


def _limit(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota in ("max", "-1") else int(quota) / int(period)
