"""The folder of a run: its name, what is written about the run, and what it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastppo.errors import ConfigError
from fastppo.runtime.device import cpu_name

_PACKAGES = ("fastppo", "torch", "gymnasium", "numpy", "ale-py", "mujoco", "envpool")


def create_run_dir(wanted: Path | None, env_id: str, name: str, seed: int) -> Path:
    """A new folder: `wanted`, or runs/<env>/<name>-<seed>-<time>.

    Raises:
        ConfigError: `wanted` is in use, or the folder can't be made.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            if any(wanted.iterdir()):
                raise ConfigError(f"run_dir={wanted} is not empty and runs are never overwritten; name a new folder.")
            return wanted
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in env_id).lstrip(".")
        base = Path("runs") / (safe or "env") / f"{name}-{seed}-{stamp}"
        for attempt in range(1, 1000):
            path = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
        raise ConfigError(f"{base} and its next 998 names are taken; use --run-dir.")
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"run_dir={wanted} is, or lies in, a file; name a new folder.") from None
    except OSError as error:
        where = wanted or Path("runs").resolve()
        raise ConfigError(
            f"run_dir: can't make {where} ({error.strerror}); name a folder that can be written."
        ) from None


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, machine, command and git commit of this process, as JSON-able values."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "versions": versions,
        "device": str(device),
        "device_name": gpu or cpu_name(),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "command": sys.argv,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=2) + "\n")
    temporary.replace(path)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
