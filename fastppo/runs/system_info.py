"""What a run executes on: versions, machine, command, git commit."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

import torch

from fastppo.runtime.device import cpu_name

_PACKAGES = ("fastppo", "torch", "gymnasium", "numpy", "ale-py", "mujoco", "envpool")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def system_info(device: torch.device) -> dict[str, Any]:
    """Return versions, machine, command and git commit of this process, as JSON values."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": versions(),
        "device": str(device),
        "device_name": gpu or cpu_name(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
