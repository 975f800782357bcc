"""The control groups that limit this process (Linux; both versions of the interface)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """Yield the version (1 or 2) and the folder of each group whose `controller` may limit this process.

    The limits of a group also hold for the groups inside it, so its parents are included. A folder may not exist.
    Nothing is yielded on a system without control groups.

    Args:
        controller: such as "cpu" or "memory".
        root: the folder that holds /proc and /sys.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        # version 2 has a single hierarchy, whose line lists no controllers
        if controllers and controller not in controllers.split(","):
            continue
        hierarchy = root / "sys/fs/cgroup" / (controller if controllers else "")
        # inside a container the mounted root may be the process's own group, while /proc gives its path on the host
        parts = [part for part in group.split("/") if part]
        for depth in range(len(parts) + 1):
            yield 1 if controllers else 2, hierarchy.joinpath(*parts[:depth])
