"""Will it fit? What this machine still has."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on `device`; on the CPU, within the limits of the process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
