"""Atomic and durable file writes, and a lock between processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastppo.runtime.faults import fault_point

_CHUNK = 2**20  # bytes per write


def write_synced(path: Path, data: bytes) -> None:
    """Write `data` to `path` and flush it to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for start in range(0, len(data), _CHUNK):
            fault_point("write")
            rest = memoryview(data)[start : start + _CHUNK]
            while rest:
                rest = rest[os.write(file, rest) :]
        fault_point("fsync")
        os.fsync(file)
    finally:
        os.close(file)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that new and renamed files survive a power loss."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows can't open folders
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`.

    A reader of `path` sees the old content or the new one, never a part. The temporary file is removed if `write`
    fails.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON, atomically."""
    text = json.dumps(values, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time into the block, by a lock on the file `path`; the others wait.

    The kernel releases the lock when its process ends, however it ends. On Windows there is no lock.
    """
    with path.open("a") as file:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
