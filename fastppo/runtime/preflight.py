"""Will it fit? What this machine still has."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path, PurePosixPath

import psutil
import torch

# Names of a control group's limit, usage and page cache that the kernel gives up first, in both versions of groups
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that may still be allocated on `device`; on the CPU, within the limits of the process's control groups.

    `root` is where /proc and /sys are found.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, group = line.split(":", 2)
        base = root / "sys/fs/cgroup"
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (base / "memory", _V1) if controllers else (base, _V2)
        # a container may see its own group as the root while /proc names it by the path outside
        own = PurePosixPath(group)
        for place in (own, *own.parents):
            free = min(free, _room(base / str(place).lstrip("/"), *names))
    return free


def _room(folder: Path, limit: str, usage: str, cache: str) -> int:
    """Bytes left in one control group, its file cache counted as free; plenty where there is no limit."""
    plenty = 2**63
    try:
        most, used = ((folder / name).read_text().strip() for name in (limit, usage))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return plenty
    if most == "max":
        return plenty
    return max(0, int(most) - int(used) + int(stat.get(cache, 0)))


def peak_memory() -> int:
    """The most bytes that this process has held.

    From /proc where that is: the system call's figure begins with that of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
