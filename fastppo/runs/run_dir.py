"""The run folder: its name and its lock."""

from __future__ import annotations

import contextlib
import datetime
import glob
import os
import platform
import re
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fastppo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # imports torch, which commands do without until their arguments are checked
    from fastppo.runtime.distributed import World

# The files of a run that ended before its first checkpoint
_RUN_FILE = re.compile(
    r"(config|run|result|model)\.json|model\.safetensors|metrics\.jsonl|events\..*|checkpoints|samples|wandb|\..*\.tmp"
)


def create_run_dir(wanted: Path | None, env_id: str, name: str, seed: int, *, begin_again: bool = False) -> Path:
    """Create a new folder, `wanted` or runs/<env>/<name>-<seed>-<time>, and return it.

    `begin_again` accepts a `wanted` with a run that ended before its first checkpoint.

    Raises:
        ConfigError: `wanted` is in use, or the folder can't be made.
    """
    try:
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
            check_new_folder(wanted, begin_again=begin_again)
            return wanted
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        base = Path("runs") / _file_name(env_id) / f"{name}-{seed}-{stamp}"
        for attempt in range(1, 1000):
            path = base if attempt == 1 else base.with_name(f"{base.name}-{attempt}")
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
        raise ConfigError(f"{base} and 998 numbered variants exist already; use --run-dir.")
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"run_dir={wanted} is a file or is below one; name a new folder.") from None
    except OSError as error:
        where = wanted or Path("runs").resolve()
        raise ConfigError(f"run_dir: can't make {where} ({error.strerror}); name a writable folder.") from None


def check_new_folder(folder: Path, *, begin_again: bool = False) -> None:
    """Check that a run can begin in `folder`: it is new or empty.

    `begin_again` accepts a run that ended before its first checkpoint.

    Raises:
        ConfigError: it holds files.
    """
    names = {path.name for path in folder.iterdir()} - {".lock"} if is_folder(folder) else set()
    if names and not (begin_again and all(map(_RUN_FILE.fullmatch, names))):
        raise ConfigError(f"run_dir={folder} is not empty and runs are never overwritten; name a new folder.")


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder.

    Raises:
        ConfigError: the file system can't say, for example because the name is too long or a folder above is closed.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise ConfigError(f"{path} can't be a folder here ({error.strerror}); name another.") from None


def check_run_folder(folder: Path) -> None:
    """Check that `folder` is a run folder or one of its checkpoints, by the files that it holds.

    Raises:
        CheckpointError: it is neither.
        ConfigError: it can't be a folder.
    """
    found = is_folder(folder)
    if found and any((folder / name).exists() for name in ("config.json", "model.json", "state-0.json", "checkpoints")):
        return
    hint = "name one as train prints it."
    if not found:
        why = "it is a file" if folder.exists() else "there is no such folder"
    else:
        why = "it holds no config.json, model.json or checkpoints"
        nested = next((path for depth in ("*", "*/*") for path in folder.glob(f"{depth}/config.json")), None)
        hint = f"name one of its runs, such as {nested.parent}." if nested else hint
    raise CheckpointError(f"{folder} is not a run folder ({why}); {hint}")


def check_output(path: Path, work: str) -> None:
    """Check that `work`, such as "export", can write a file to `path`, before the work is done.

    Raises:
        ConfigError: it is a folder, there is no folder for it, or it is a file of a run, which would be lost.
    """
    if is_folder(path):
        raise ConfigError(f"{work}: {path} is a folder; name a file in it.")
    if not is_folder(path.parent):
        raise ConfigError(f"{work}: {path} can't be written (there is no folder {path.parent}).")
    if path.exists() and (_RUN_FILE.fullmatch(path.name) or path.name.startswith("state-")):
        raise ConfigError(f"{work}: {path} is a file that runs keep, which would be lost; name another.")


class RunLock:
    """A lock that gives a run folder one trainer at a time; the kernel releases it when the process ends."""

    def __init__(self, run_dir: Path) -> None:
        """Take the lock.

        Raises:
            ConfigError: another process holds it (names machine and process id), or the folder isn't writable.
        """
        self._close: Callable[[], object] = lambda: None
        try:
            import fcntl
        except ImportError:  # Windows
            return
        path = run_dir / ".lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._close = weakref.finalize(self, os.close, file)  # also if the owner is dropped without a release
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(file, 0)
            os.write(file, f"pid {os.getpid()} on {platform.node()}\n".encode())
        except BlockingIOError:
            holder = path.read_text().strip() or "unknown"
            self.release()
            raise ConfigError(
                f"{run_dir} is in use by another trainer ({holder}); stop that one, or wait for it."
            ) from None
        except OSError as error:
            raise ConfigError(f"{run_dir} can't be locked ({error.strerror}); is the folder writable?") from None

    def release(self) -> None:
        """Release the lock; may be called more than once."""
        self._close()


def claim_run_dir(make: Callable[[], Path], world: World) -> tuple[Path, RunLock | None]:
    """Create and lock the run folder on the main rank; return it and, on the main rank, its lock.

    Raises:
        ConfigError: the folder can't be made, is in use, or can't be seen by this rank.
    """
    locks: list[RunLock] = []
    run_dir = world.shared(make)
    world.shared(lambda: locks.append(RunLock(run_dir)))
    if not wait_for_folder(run_dir):
        raise ConfigError(
            f"run_dir={run_dir} was created by process 0, but can't be seen by process {world.rank}: "
            "machines that train together need a shared folder."
        )
    return run_dir, locks[0] if locks else None


def wait_for_folder(folder: Path, timeout: float = 60.0) -> bool:
    """Wait up to `timeout` seconds until `folder` exists; network file systems show new folders late.

    Returns:
        Whether it exists.
    """
    deadline = time.monotonic() + timeout
    while not folder.is_dir():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
        with contextlib.suppress(OSError):
            os.listdir(folder.parent)  # refreshes the client's cache
    return True


def find_run(env_id: str, name: str, seed: int) -> Path | None:
    """Return the latest folder under runs/<env>/ with that name and seed that holds a checkpoint, or None."""
    base = Path("runs") / _file_name(env_id)
    # .old: the process was killed while it replaced a checkpoint
    checkpoints = [f"checkpoints/step-{12 * '[0-9]'}{suffix}" for suffix in ("", ".old")]
    folders = base.glob(f"{glob.escape(name)}-{seed}-*")
    found = [path for path in folders if any(any(path.glob(pattern)) for pattern in checkpoints)]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _file_name(env_id: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in env_id).lstrip(".") or "env"
