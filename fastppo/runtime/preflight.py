"""Will it fit? What this machine still has."""

from __future__ import annotations

import contextlib
import resource
import shutil
from pathlib import Path, PurePosixPath

import psutil
import torch

from fastppo.errors import ConfigError

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


_SPARE = 64  # descriptors for log files, libraries and the interpreter


def check_descriptors(each: int, n: int, what: str, root: Path = Path("/")) -> None:
    """Refuse what takes more file descriptors than this process may open.

    Args:
        each: how many one of them takes.
        n: how many of them there are.
        what: their name in the message, such as "n_envs".
        root: where /proc is found.

    Raises:
        ConfigError: with the need, the limit and the largest number that fits.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    try:
        open_now = len(list((root / "proc/self/fd").iterdir()))
    except OSError:
        open_now = 0
    room = max(0, limit - open_now - _SPARE)
    if each * n > room:
        raise ConfigError(
            f"{what}={n} takes {each * n} file descriptors, {each} each; {open_now} are open and {limit} are allowed. "
            f"At most {what}={room // each} fits; or raise the limit with ulimit -n."
        )


def check_disk(folder: Path, need: int, what: str) -> None:
    """Refuse to begin where the disk has no room for what will be written.

    Raises:
        ConfigError: with the need and what is free.
    """
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ConfigError(
            f"{folder} has {free / 2**20:,.0f} MB left; {what} take {need / 2**20:,.0f} MB. "
            "Name another --run-dir, or keep fewer (--keep-checkpoints)."
        )


def peak_memory() -> int:
    """The most bytes that this process has held.

    From /proc where that is: the system call's figure begins with that of the process that started this one.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
