"""The folder of a run: its name, what is written about the run, and what it ran on."""

from __future__ import annotations

import contextlib
import datetime
import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastppo.errors import ConfigError
from fastppo.runtime.device import cpu_name

_PACKAGES = ("fastppo", "torch", "gymnasium", "numpy", "ale-py", "mujoco", "envpool")


def create_run_dir(wanted: Path | None, env_id: str, name: str, seed: int, *, again: bool = False) -> Path:
    """A new folder: `wanted`, or runs/<env>/<name>-<seed>-<time>.

    `again`: `wanted` may hold a run that ended before its first checkpoint.

    Raises:
        ConfigError: `wanted` is in use, or the folder can't be made.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in wanted.iterdir()} - {".lock"}
            if names and not (again and all(map(_OWN.fullmatch, names))):
                raise ConfigError(f"run_dir={wanted} is not empty and runs are never overwritten; name a new folder.")
            return wanted
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        base = Path("runs") / _safe(env_id) / f"{name}-{seed}-{stamp}"
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


# What a run leaves that ended before its first checkpoint
_OWN = re.compile(
    r"(config|run|result|model)\.json|model\.safetensors|metrics\.(jsonl|tmp)|events\..*|checkpoints|samples|wandb|\..*\.tmp"
)


class RunLock:
    """A run folder has one trainer at a time; the kernel lets go of the lock when the process ends, however it ends.

    Attributes:
        release: lets go of it; may be called twice.
    """

    def __init__(self, run_dir: Path) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process has it, on which machine and with which number.
        """
        self.release: Callable[[], object] = lambda: None
        try:
            import fcntl
        except ImportError:  # Windows
            return
        path = run_dir / ".lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self.release = weakref.finalize(self, os.close, file)  # also where nobody does
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(file, 0)
            os.write(file, f"pid {os.getpid()} on {platform.node()}\n".encode())
        except BlockingIOError:
            who = path.read_text().strip() or "unknown"
            self.release()
            raise ConfigError(
                f"{run_dir} is in use by another trainer ({who}); stop that one, or wait for it."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{run_dir} can't be locked ({error.strerror}); is it a folder that can be written?"
            ) from None


def appears(folder: Path, patience: float = 60.0) -> bool:
    """Whether `folder` is here, or comes within so many seconds: file servers may be late to show a new one."""
    until = time.monotonic() + patience
    while not folder.is_dir():
        if time.monotonic() > until:
            return False
        time.sleep(1)
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)  # asks the server anew
    return True


def find_run(env_id: str, name: str, seed: int) -> Path | None:
    """The latest folder under runs/<env>/ of that name and seed that holds checkpoints."""
    base = Path("runs") / _safe(env_id)
    ends = [f"checkpoints/step-{12 * '[0-9]'}{end}" for end in ("", ".old")]  # old: a save was killed in the middle
    folders = base.glob(f"{glob.escape(name)}-{seed}-*")
    found = [path for path in folders if any(any(path.glob(end)) for end in ends)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _safe(env_id: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in env_id).lstrip(".") or "env"


def versions() -> dict[str, str]:
    """Of Python, and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions, machine, command and git commit of this process, as JSON-able values."""
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
