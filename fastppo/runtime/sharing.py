"""Share the cores of a machine with other processes: bound OpenMP's spinning, and count the cores that are free.

torch's threads meet at a barrier after each parallel region, where those that wait spin. With a free core for each
thread that is the fastest way to wait. With fewer cores, a spinning thread holds the core that its partner needs: two
trainings of two threads each on two cores run at a twentieth of their speed. So a run takes no more threads than there
are free cores when it starts, and the spinning has a limit for what changes later.

Nothing here imports torch: OpenMP reads its settings when torch is loaded.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from fastppo.runtime.cores import usable_cores

_SPINS = "10000"
_SHORTEST, _LONGEST = 0.5, 30.0


def bound_spinning() -> None:
    """Limit how long OpenMP's waiting threads spin before they sleep, unless the user set how they wait.

    10,000 rounds are some 0.1 to 0.5 ms, and longer than the regions of an update; GNU's default of 300,000 outlasts
    the time slice of a core. Fewer cost speed: with 2,000, a run of 512 environments on two cores loses a fifth
    (benchmarks/side_by_side.py). Has no effect on a process that has loaded torch already.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def spinning_is_bounded() -> bool:
    """Return whether `bound_spinning` or the user set how long threads spin before torch was loaded."""
    return not _TORCH_CAME_FIRST or "GOMP_SPINCOUNT" in _AT_START or "OMP_WAIT_POLICY" in _AT_START


class CpuTimes(NamedTuple):
    """A reading of this machine's clocks.

    Attributes:
        wall: seconds.
        busy: CPU seconds spent by all processes, on the cores where this process may run.
        own: CPU seconds spent by this process and by its children that have ended.
    """

    wall: float
    busy: float
    own: float


def cpu_times(root: Path = Path("/")) -> CpuTimes | None:
    """Return the present reading; None where the system has no /proc/stat.

    Args:
        root: the folder that holds /proc.
    """
    try:
        lines = (root / "proc/stat").read_text().splitlines()
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for line in lines:
        name, _, fields = line.partition(" ")
        if name in mine:
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, fields.split())
            ticks += user + nice + system + irq + softirq
    return CpuTimes(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]))


def free_cores(since: CpuTimes | None, root: Path = Path("/")) -> int:
    """Return how many of the usable cores other processes leave free: at least 1.

    Others' use is their mean since the earlier reading. Waits up to half a second where that is too recent, or so long
    ago that it tells little of the present.

    Args:
        since: an earlier reading, such as the one at the start of the process.
        root: the folder that holds /proc and /sys.
    """
    cores, now = usable_cores(root), cpu_times(root)
    if since is None or now is None or cores == 1:
        return cores
    if now.wall - since.wall > _LONGEST:
        since = now
    if now.wall - since.wall < _SHORTEST:
        time.sleep(_SHORTEST - (now.wall - since.wall))
        now = cpu_times(root) or now
    others = (now.busy - since.busy - (now.own - since.own)) / (now.wall - since.wall)
    return max(1, min(cores, round(len(os.sched_getaffinity(0)) - others)))


_TORCH_CAME_FIRST = "torch" in sys.modules
_AT_START = dict(os.environ)
AT_START = cpu_times()
