"""Memory, file descriptors and disk space: how much is left, and checks that a run fits."""

from __future__ import annotations

import contextlib
import resource
import shutil
from pathlib import Path

import psutil
import torch

from fastppo.errors import ConfigError
from fastppo.runtime.cgroups import control_groups

# For each version of control groups: the files of the limit and of the usage, and the entry of memory.stat for the
# page cache, which the kernel reclaims before it refuses memory
_MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}
_RESERVED_DESCRIPTORS = 64  # for log files, libraries and the interpreter


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Return the bytes that can still be allocated on `device`; on the CPU, within this process's control groups.

    Args:
        device: CPU or CUDA.
        root: the folder that holds /proc and /sys.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    groups = [left for group in control_groups("memory", root) if (left := _left_in_group(*group)) is not None]
    return min([int(psutil.virtual_memory().available), *groups])


def _left_in_group(version: int, folder: Path) -> int | None:
    """Return the bytes left in one control group, its page cache counted as free; None without a limit."""
    limit_file, usage_file, cache_entry = _MEMORY_FILES[version]
    try:
        limit, used = ((folder / name).read_text().strip() for name in (limit_file, usage_file))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - int(used) + int(stat.get(cache_entry, 0)))


def check_descriptors(each: int, n: int, setting: str) -> None:
    """Check that this process may open `each * n` more file descriptors.

    Args:
        each: descriptors per unit of the setting.
        n: value of the setting.
        setting: its name for the message, such as "n_envs".

    Raises:
        ConfigError: with the descriptors needed, the limit and the largest value that fits.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    try:
        open_now = len(list(Path("/proc/self/fd").iterdir()))
    except OSError:
        open_now = 0
    left = max(0, limit - open_now - _RESERVED_DESCRIPTORS)
    if each * n > left:
        raise ConfigError(
            f"{setting}={n} needs {each * n} file descriptors, {each} each; {open_now} are open and {limit} are "
            f"allowed. At most {setting}={left // each} fits; or raise the limit with ulimit -n."
        )


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Check that the disk of `folder` has `needed` bytes left for `what`.

    Raises:
        ConfigError: with the bytes needed and the bytes free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"{folder} has {free / 2**20:,.0f} MB left; {what} need {needed / 2**20:,.0f} MB. "
            "Choose another --run-dir, or keep fewer checkpoints (--keep-checkpoints)."
        )


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes.

    Read from /proc where available: the figure of getrusage starts from the peak of the parent process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
